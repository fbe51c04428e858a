"""Preferences: however one is published it becomes the same pair, and a pair is never torn apart on its way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import firefly.data.conversations  # noqa: F401  registers its importers
from firefly.data.clean import clean
from firefly.data.dataset import build_dataset, read_dataset
from firefly.data.example import Example, Message
from firefly.data.importers import IMPORTERS, Origin, Skipped, Whole, recognise
from firefly.data.loader import TrainingStream, in_order
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens, encode_dataset
from firefly.errors import InputError
from firefly.prune import prune_model
from firefly.prune.remap import remap
from firefly.recipe import CleanSection, DataSection
from tiny import save_tokenizer, write_pairs, write_preferences

USER, ASSISTANT = "user", "assistant"


def turns(*contents: str, speaker: str = "role", text: str = "content") -> list[dict[str, str]]:
    names = (USER, ASSISTANT) if speaker == "role" else ("human", "gpt")
    return [{speaker: names[place % 2], text: content} for place, content in enumerate(contents)]


SINGLE: dict[str, dict[str, Any]] = {
    "ours": {"kind": "Preference", "input": "问", "chosen": "好", "rejected": "差"},
    "prompt": {"prompt": "问", "chosen": "好", "rejected": "差"},
    "instruction": {"instruction": "问", "input": "", "chosen": "好", "rejected": "差"},
    "messages": {"messages": turns("问"), "chosen": "好", "rejected": "差"},
    "turns": {"prompt": turns("问"), "chosen": [turns("", "好")[1]], "rejected": [turns("", "差")[1]]},
    "sharegpt": {
        "conversations": turns("问", speaker="from", text="value"),
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "差"},
    },
    "whole": {"chosen": turns("问", "好"), "rejected": turns("问", "差")},
    "prompt and whole": {"prompt": turns("问"), "chosen": turns("问", "好"), "rejected": turns("问", "差")},
}


def imported(record: dict[str, Any], path: Path = Path("f.jsonl")) -> Any:
    (item,) = IMPORTERS["preferences"](record, Origin(path, 1))
    return item


@pytest.mark.parametrize("name", SINGLE)
def test_every_shape_is_the_same_preference(name: str, tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(SINGLE[name], ensure_ascii=False), encoding="utf-8")
    assert recognise("auto", path, None) == "preferences"
    item = imported(SINGLE[name], path)
    assert isinstance(item, Whole)
    messages = (Message(USER, "问"), Message(ASSISTANT, "好"))
    assert item.example == Example("Preference", messages, "f.jsonl:1", "差")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": turns("甲", "好"), "rejected": turns("乙", "差")}, "no_common_question"),
        ({"chosen": "好", "rejected": "差"}, "no_common_question"),
        ({"prompt": turns("问"), "chosen": turns("好"), "rejected": turns("差")}, "no_answer"),
        ({"prompt": "问", "chosen": [{"role": "tool", "content": "x"}], "rejected": "差"}, "tool_calls"),
    ],
)
def test_what_is_no_preference_is_skipped_with_a_reason(record: dict[str, Any], reason: str) -> None:
    item = imported(record)
    assert isinstance(item, Skipped) and item.reason == reason


def test_a_missing_side_is_an_error() -> None:
    with pytest.raises(InputError, match="'chosen' or 'rejected' is missing"):
        imported({"prompt": "问", "chosen": "好"})
    with pytest.raises(InputError, match="needs a question"):
        Example.from_record({"kind": "K", "messages": [], "chosen": "好", "rejected": "差"}, Path("f"), 1)


TEXT = st.text(min_size=1, max_size=8)


@given(st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0), TEXT, st.booleans())
def test_a_preference_survives_the_file(contents: list[str], rejected: str, system: bool) -> None:
    roles = (USER, ASSISTANT)
    messages = tuple(Message(roles[place % 2], text) for place, text in enumerate(contents))  # type: ignore[arg-type]
    if system:
        messages = (Message("system", "s"), *messages)
    example = Example("K", messages, "f:1", rejected)
    assert Example.from_record(json.loads(example.to_json()), Path("f"), 1) == example
    chosen, worse = example.answered
    assert chosen.messages == messages and worse.messages[:-1] == messages[:-1] and worse.target == rejected


def test_cleaning_mends_both_sides_and_drops_what_prefers_nothing() -> None:
    options = CleanSection()
    example = Example("K", (Message(USER, "问"), Message(ASSISTANT, "好<br>的")), "", "差<br>的")
    mended, reason = clean(example, options)
    assert (mended.target, mended.rejected, reason) == ("好\n的", "差\n的", None)
    for worse in ("", " ", "好 <br>的", "好\n的 "):
        same = Example("K", (Message(USER, "问"), Message(ASSISTANT, "好\n的")), "", worse)
        assert clean(same, options)[1] == "no_preference"


def built(source: Path, folder: Path, model: Path, **options: Any) -> Path:
    table = {"sources": [{"path": str(source)}], "validation_fraction": 0.2} | options
    data = DataSection.model_validate(table)
    build_dataset(data, folder / "dataset")
    encode_dataset(folder / "dataset", model, data, folder / "tokens")
    return folder / "tokens"


def question(tokens: Tokens, number: int) -> list[int]:
    sample = tokens.sample(number)
    return sample.ids[: int(np.argmax(sample.mask))].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("overlong", ["middle-of-input", "left-of-input", "right-of-target", "drop"])
def test_pairs_stay_together_whatever_is_cut(
    tiny: Callable[[str], Path], tmp_path: Path, overlong: str
) -> None:
    source = write_preferences(tmp_path / "p.jsonl")
    options = {"overlong": overlong, "max_seq_length": 56, "allow_lost_targets": True}
    place = built(source, tmp_path, tiny("bloom"), **options)
    index = json.loads((place / "index.json").read_text("utf-8"))
    assert index["cuts"] and index["pairs"]
    tokenizer = ModelTokenizer.load(tiny("bloom"))
    for split in ("train", "validation"):
        tokens = Tokens.open(place, split)
        examples = list(read_dataset(tmp_path / "dataset", split))
        assert tokens.pairs and len(tokens) % 2 == 0 and np.diff(tokens.borders).max() <= 56
        assert (tokens.origins[::2] == tokens.origins[1::2]).all()
        for number in range(0, len(tokens), 2):
            assert question(tokens, number) == question(tokens, number + 1)
            example = examples[tokens.origins[number]]
            for side, answer in ((number, example.target), (number + 1, example.rejected)):
                sample = tokens.sample(side)
                learned = tokenizer.decode(sample.ids[sample.mask.astype(bool)].tolist())
                assert answer is not None and answer.startswith(learned.removesuffix("</s>").rstrip("\ufffd"))
    if overlong == "drop":
        assert len(Tokens.open(place, "train")) < 2 * len(list(read_dataset(tmp_path / "dataset", "train")))


def test_preferences_and_examples_do_not_mix(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    sources = [
        {"path": str(write_pairs(tmp_path / "a.jsonl"))},
        {"path": str(write_preferences(tmp_path / "b.jsonl"))},
    ]
    with pytest.raises(InputError, match=r"mixes 60 preferences .* with 120 plain examples"):
        built(tmp_path, tmp_path, tiny("bloom"), sources=sources)


@given(st.integers(1, 7), st.sampled_from([None, 140, 300]), st.integers(0, 3))
@settings(deadline=None, max_examples=20)
def test_a_batch_holds_whole_pairs(
    pairs_tokens: Tokens, size: int, pack_length: int | None, number: int
) -> None:
    both = TrainingStream(pairs_tokens, size, 3, pack_length=pack_length, pairs=True)
    ids = both.batch(number).sample_ids
    assert all(
        first % 2 == 0 and second == first + 1 for first, second in zip(ids[::2], ids[1::2], strict=True)
    )
    assert pack_length is not None or len(ids) == 2 * size
    alone = TrainingStream(pairs_tokens, size, 3, pack_length=pack_length).batch(number).sample_ids
    assert all(one % 2 == 0 for one in alone)


@pytest.fixture(scope="module")
def pairs_tokens(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    folder = tmp_path_factory.mktemp("pairs")
    return Tokens.open(
        built(write_preferences(folder / "p.jsonl"), folder, tiny("bloom"), max_seq_length=70), "train"
    )


def test_in_order_reads_every_pair_once(pairs_tokens: Tokens) -> None:
    def read(**options: Any) -> list[int]:
        return [one for batch in in_order(pairs_tokens, 200, **options) for one in batch.sample_ids]

    assert read(pairs=True) == list(range(len(pairs_tokens)))
    assert read() == list(range(0, len(pairs_tokens), 2))
    assert read(pairs=True, among={4, 5, 8, 9}) == [4, 5, 8, 9]
    assert all(len(batch.sample_ids) % 2 == 0 for batch in in_order(pairs_tokens, 50, pairs=True))


def test_remapping_keeps_or_drops_both_sides(tmp_path: Path) -> None:
    """A special token that the pruned model lacks stands in some answers."""
    (tmp_path / "base").mkdir()
    save_tokenizer(tmp_path / "base")
    place = built(write_preferences(tmp_path / "p.jsonl"), tmp_path, tmp_path / "base", max_seq_length=300)
    corpus = ["春眠不觉晓，处处闻啼鸟", "今天天气很好，守株待兔"]
    prune_model(tmp_path / "base", tmp_path / "pruned", coverage=1.0, texts=corpus, tokenizer_only=True)
    remap(tmp_path / "base", place, tmp_path / "after", tmp_path / "pruned", drop_outside=True)
    old, new = Tokens.open(place, "train"), Tokens.open(tmp_path / "after", "train")
    before, after = ModelTokenizer.load(tmp_path / "base"), ModelTokenizer.load(tmp_path / "pruned")
    assert new.pairs and len(new) % 2 == 0 and (new.origins[::2] == new.origins[1::2]).all()
    text_of = {
        (int(old.origins[number]), number % 2): before.decode(old.sample(number).ids.tolist())
        for number in range(len(old))
    }
    for number in range(len(new)):
        text = after.decode(new.sample(number).ids.tolist())
        assert text == text_of[int(new.origins[number]), number % 2]
    short = tmp_path / "short"
    index = json.loads((place / "index.json").read_text("utf-8"))
    longest = int(np.diff(new.borders).max())
    short.mkdir()
    for path in place.rglob("*"):
        if path.is_file():
            (short / path.relative_to(place)).parent.mkdir(exist_ok=True)
            (short / path.relative_to(place)).write_bytes(path.read_bytes())
    (short / "index.json").write_text(json.dumps(index | {"max_seq_length": longest - 1}), encoding="utf-8")
    remap(tmp_path / "base", short, tmp_path / "less", tmp_path / "pruned", drop_outside=True)
    less = Tokens.open(tmp_path / "less", "train")
    assert 0 < len(less) < len(new) and (less.origins[::2] == less.origins[1::2]).all()
    for number in range(len(less)):
        text = after.decode(less.sample(number).ids.tolist())
        assert text == text_of[int(less.origins[number]), number % 2]
