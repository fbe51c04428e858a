"""Looking at a vocabulary: the curve that is drawn is what pruning does; what is dropped is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly import api
from firefly.cli import main
from firefly.errors import InputError, OutputError
from firefly.prune import prune_model
from firefly.prune.chart import coverage_chart, coverage_curve
from firefly.prune.counting import count_tokens
from firefly.prune.tokenizer import load
from firefly.prune.vocabulary import choose

Content = dict[str, Any]
pytestmark = pytest.mark.pictures


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99, 1.0])
def test_every_point_of_the_curve_is_a_choice(content: Content, texts: list[str], coverage: float) -> None:
    counts = count_tokens(load(content), texts)
    wanted = [500, 590]
    sizes, shares = coverage_curve(content, counts, wanted)
    assert (sizes[1:] > sizes[:-1]).all() and (shares[1:] > shares[:-1]).all() and shares[-1] == 1.0
    chosen = choose(content, counts, wanted=wanted, coverage=coverage).new_to_old
    place = int((shares >= coverage).argmax())
    assert sizes[place] == len(chosen)
    assert shares[place] == counts[chosen[chosen < len(counts)]].sum() / counts.sum()


@pytest.fixture
def base(content: Content, tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return tmp_path / "base"


def test_the_verb_draws_and_tells_what_is_dropped(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "zh.txt").write_text("春眠不觉晓\n床前明月光\n", "utf-8")
    (tmp_path / "en.txt").write_text("the firefly glows\nin a summer night\n", "utf-8")
    picture, out = tmp_path / "coverage.png", tmp_path / "out"
    command = ["prune", str(base), str(out), "-c", str(tmp_path / "zh.txt"), "-c", str(tmp_path / "en.txt")]
    with pytest.raises(SystemExit) as end:
        main([*command, "--coverage", "0.9", "--tokenizer-only", "--chart", str(picture), "-q"])
    assert end.value.code == 0 and picture.read_bytes().startswith(b"\x89PNG")
    record = json.loads((out / "prune.json").read_text("utf-8"))
    shown = capsys.readouterr().out
    for name, (before, kept) in record["scripts"].items():
        if kept < before and name in ("Han", "Latin"):
            row = next(line for line in shown.splitlines() if line.startswith(name)).split()
            assert row[1:4] == [str(before), str(kept), str(before - kept)]
            assert repr(record["dropped_examples"][name][0]) in shown
    rates = record["proof"]["tokens_per_character_by_corpus"]
    assert list(rates) == ["en.txt", "zh.txt"]
    tokenizers = {name: load(place / "tokenizer.json") for name, place in (("before", base), ("after", out))}
    for name, rate in rates.items():
        lines = (tmp_path / name).read_text("utf-8").splitlines()
        assert rate["characters"] == sum(map(len, lines))
        for side, tokenizer in tokenizers.items():
            amount = sum(len(tokenizer.encode(line, add_special_tokens=False).ids) for line in lines)
            assert rate[side] == round(amount / rate["characters"], 4)


def test_corpora_of_one_name_are_told_apart(base: Path, tmp_path: Path) -> None:
    paths = []
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths.append(tmp_path / folder / "x.txt")
        paths[-1].write_text("春眠不觉晓\n", "utf-8")
    prune_model(base, tmp_path / "out", coverage=1.0, tokenizer_only=True, corpus=paths)
    record = json.loads((tmp_path / "out" / "prune.json").read_text("utf-8"))
    assert list(record["proof"]["tokens_per_character_by_corpus"]) == [str(path) for path in paths]
    prune_model(base, tmp_path / "out", coverage=1.0, tokenizer_only=True, corpus=paths[:1])
    record = json.loads((tmp_path / "out" / "prune.json").read_text("utf-8"))
    assert "tokens_per_character_by_corpus" not in record["proof"]


def test_a_chart_needs_a_corpus_and_a_place(base: Path, texts: list[str], tmp_path: Path) -> None:
    counts = count_tokens(load(json.loads((base / "tokenizer.json").read_text("utf-8"))), texts)
    curve = coverage_curve(json.loads((base / "tokenizer.json").read_text("utf-8")), counts)
    coverage_chart(tmp_path / "new" / "a.png", *curve, chosen=(300, 0.5))
    with pytest.raises(OutputError, match="Cannot write"):
        coverage_chart(tmp_path / "new" / "a.png" / "b.png", *curve, chosen=(300, 0.5))
    with pytest.raises(InputError, match="holds no tokens"):
        prune_model(base, tmp_path / "out", tokenizer=base, tokenizer_only=True, chart=tmp_path / "a.png")
    assert not (tmp_path / "out").exists()


def test_looking_before_leaping_tells_what_pruning_then_covers(
    bases: Callable[[str], Path], texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, corpus, picture = bases("qwen3-tied"), tmp_path / "a.txt", tmp_path / "a.png"
    corpus.write_text("\n".join(texts), "utf-8")
    for size in (380, 470):
        table = api.prune_sizes(base, vocab_size=size, corpus=[corpus])
        pruned = prune_model(
            base, tmp_path / "out", vocab_size=size, corpus=[corpus], tokenizer_only=True, prove_logits=False
        )
        assert table.coverage == pruned.coverage
    whole = prune_model(base, tmp_path / "out", coverage=1.0, corpus=[corpus], tokenizer_only=True)
    assert (table.coverage_sizes or {})["100 %"] == whole.vocab_after
    command = ["prune", str(base), "--dry-run", "-n", "400", "-c", str(corpus), "--chart", str(picture), "-q"]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 0 and "of the corpus' tokens would be kept (99 % by" in capsys.readouterr().out
    assert (
        picture.read_bytes().startswith(b"\x89PNG") and api.prune_sizes(base, vocab_size=400).coverage is None
    )
    with pytest.raises(InputError, match="holds no tokens"):
        api.prune_sizes(base, vocab_size=400, chart=picture)
