"""`firefly data stats`: figures that agree with the files, and a forecast that agrees with what a limit then cuts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.stats import length_summary
from firefly.data.survey import dataset_stats, lost_targets, tokens_stats
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens, encode_dataset
from firefly.errors import InputError
from firefly.recipe import DataSection
from tiny import phrases, save_tokenizer

LIMIT = 24


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, str], Path]:
    """`made(limit, policy)`: a folder with dataset/, model/ and a tokens directory of its name."""
    import random

    root, rng = tmp_path_factory.mktemp("survey"), random.Random(5)
    rows = [
        {"kind": kind, "input": phrases(rng, 1 + number % 12), "target": phrases(rng, 1 + number % 9)}
        for number in range(150)
        for kind in ("Couplet", "Own")
    ]
    (root / "dataset").mkdir()
    for name, part in (("train", rows[:240]), ("validation", rows[240:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (root / "dataset" / f"{name}.jsonl").write_text(lines, "utf-8")
    (root / "model").mkdir()
    save_tokenizer(root / "model")
    lengths = {
        kind: [len(characters(row)) for row in rows if row["kind"] == kind] for kind in ("Couplet", "Own")
    }
    card = {
        "characters": length_summary([len(characters(row)) for row in rows]),
        "kinds": {kind: {"train": 120, "validation": 30, "characters": length_summary(found)}
                  for kind, found in lengths.items()},
    }  # fmt: skip
    (root / "dataset" / "card.json").write_text(json.dumps(card), "utf-8")

    def make(limit: int, policy: str) -> Path:
        out = root / f"tokens-{limit}-{policy}"
        if not out.is_dir():
            data = section(max_seq_length=limit, overlong=policy, allow_lost_targets=True)
            encode_dataset(root / "dataset", root / "model", data, out)
        return out

    return make


def section(**options: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "rows.jsonl"}]} | options)


def characters(row: dict[str, str]) -> str:
    """The text whose length a card tells."""
    return f"{row['input']}\n{row['target']}"


def index(tokens: Path) -> dict[str, Any]:
    loaded = json.loads((tokens / "index.json").read_text("utf-8"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.mark.parametrize("policy", ["right-of-target", "drop"])
def test_the_forecast_is_what_then_happens(made: Callable[[int, str], Path], policy: str) -> None:
    whole, cut = made(4096, "error"), made(LIMIT, policy)
    root = cut.parent
    tokenizer = ModelTokenizer.load(root / "model")
    data = section(overlong=policy)
    result = tokens_stats(cut, root / "out", dataset=root / "dataset", tokenizer=tokenizer, data=data)
    before, after = index(whole), index(cut)
    samples, targets = (sum(before[name].values()) for name in ("samples", "target_tokens"))
    num_cut = sum(sum(reasons.values()) for reasons in after["cuts"].values())
    assert 20 < num_cut < samples - 20
    found = result.forecast[str(LIMIT)]["all"]
    assert round(found["over"] * samples) == num_cut
    assert round((1 - found["lost"]) * targets) == sum(after["target_tokens"].values())
    assert result.notes == [] and result.cuts == after["cuts"]
    # What was cut is measured as if it never was.
    uncut = tokens_stats(whole, root / "out2", dataset=root / "dataset", tokenizer=tokenizer, data=data)
    assert [result.forecast[limit] for limit in ("512", "1024")] == [
        uncut.forecast[limit] for limit in ("512", "1024")
    ]
    for kind in ("Couplet", "Own"):
        assert result.kinds[kind]["tokens_per_character"] == uncut.kinds[kind]["tokens_per_character"]


def test_figures_of_a_tokens_directory_alone(made: Callable[[int, str], Path], tmp_path: Path) -> None:
    tokens = made(LIMIT, "right-of-target")
    result = tokens_stats(tokens, tmp_path / "new" / "out")
    stored = [Tokens.open(tokens, split) for split in ("train", "validation")]
    lengths = np.concatenate([np.diff(split.borders) for split in stored])
    assert result.lengths["count"] == len(lengths) and result.lengths["p50"] == np.percentile(lengths, 50)
    assert sum(row["tokens"] for row in result.kinds.values()) == lengths.sum()
    assert sum(row["target_tokens"] for row in result.kinds.values()) == sum(
        int(s.mask.sum()) for s in stored
    )
    assert sum(row["train"] for row in result.kinds.values()) == len(stored[0])
    assert "not at hand" in result.notes[0]  # it cannot know what cut samples were before
    written = tmp_path / "new" / "out"
    assert sorted(path.name for path in written.iterdir()) == [
        "lengths.png", "report.html", "stats.json", "tasks.png",
    ]  # fmt: skip
    stats = json.loads((written / "stats.json").read_text("utf-8"))
    assert stats["lengths"] == result.lengths and str(tmp_path) not in json.dumps(stats)


def test_figures_of_a_dataset_alone(made: Callable[[int, str], Path], tmp_path: Path) -> None:
    dataset = made(4096, "error").parent / "dataset"
    result = dataset_stats(dataset, tmp_path / "out")
    assert result.unit == "character" and result.forecast == {}
    lengths = [
        len(characters(row))
        for name in ("train", "validation")
        for row in map(json.loads, (dataset / f"{name}.jsonl").read_text("utf-8").splitlines())
    ]
    assert result.lengths["total"] == sum(lengths) and result.lengths["max"] == max(lengths)
    assert (tmp_path / "out" / "README.md").is_file() and (tmp_path / "out" / "stats.json").is_file()


def test_an_unreadable_card_is_one_sentence(tmp_path: Path) -> None:
    for content in ("", "[]", "{"):
        (tmp_path / "card.json").write_text(content)
        with pytest.raises(InputError, match=r"card\.json"):
            dataset_stats(tmp_path)


@given(st.lists(st.booleans(), min_size=3, max_size=60), st.integers(2, 50))
def test_lost_targets(mask: list[bool], limit: int) -> None:
    array = np.asarray([False, False, *mask], np.uint8)
    targets = int(array.sum())
    lost = {p: lost_targets(array, limit, p) for p in ("right-of-target", "drop", "middle-of-input")}
    assert lost["drop"] == targets and lost["right-of-target"] == int(array[limit:].sum())
    assert 0 <= lost["middle-of-input"] <= targets


def test_the_input_gives_way_to_the_last_answer() -> None:
    def sample(*exchanges: tuple[int, int]) -> Any:
        return np.asarray([flag for asked, said in exchanges for flag in [0] * asked + [1] * said], np.uint8)

    assert lost_targets(sample((100, 20)), 64, "middle-of-input") == 0
    assert lost_targets(sample((10, 90)), 64, "middle-of-input") == 90  # the answer alone is too long
    assert lost_targets(sample((10, 20), (10, 30), (10, 15)), 64, "left-of-input") == 20 + 30
    assert lost_targets(sample((10, 20), (10, 30), (10, 15)), 66, "left-of-input") == 20
    assert lost_targets(sample((10, 20), (90, 15)), 64, "middle-of-input") == 20
    assert (
        lost_targets(np.append(sample((10, 20), (90, 15)), 0), 64, "middle-of-input") == 20
    )  # a closing line feed
    assert lost_targets(sample((1, 500)), 64, "drop") == 0  # a plain text is split
