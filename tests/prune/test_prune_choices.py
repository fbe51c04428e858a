"""Ways to say what stays: coverage, scripts, another tokenizer; a directory without weights; what is dropped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firefly import api
from firefly.cli import main
from firefly.errors import FireflyError, InputError, OutputError, ProofError, RecipeError
from firefly.files import exclusive_beside
from firefly.prune import PruneResult, prune_model
from firefly.prune.counting import count_tokens
from firefly.prune.proof import prove_tokenizer
from firefly.prune.prune import parse_id_ranges
from firefly.prune.sample import Sample
from firefly.prune.scripts import ids_in_scripts, script
from firefly.prune.tokenizer import load, read, rebuild, vocabulary
from firefly.prune.vocabulary import BpeDerivation, base_symbols, choose, closure

Content = dict[str, Any]


@pytest.fixture
def base(content: Content, tmp_path: Path) -> Path:
    """A directory that holds a tokenizer and nothing else."""
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    return folder


def pruned(base: Path, **choices: Any) -> PruneResult:
    return prune_model(base, base.parent / "out", tokenizer_only=True, **choices)


@pytest.mark.parametrize("coverage", [0.5, 0.9, 0.99, 0.9999, 1.0])
def test_coverage_is_reached_by_the_smallest_set(content: Content, texts: list[str], coverage: float) -> None:
    counts = count_tokens(load(content), texts)
    keep = choose(content, counts, coverage=coverage)
    assert keep.num_filled == 0
    assert counts[keep.new_to_old[keep.new_to_old < len(counts)]].sum() >= coverage * counts.sum()
    if keep.num_counted:  # one token less, with its closure, is not enough
        least = min(
            (old for old in keep.new_to_old if counts[old] and old < 600), key=lambda old: counts[old]
        )
        assert counts[keep.new_to_old].sum() - counts[least] * keep.num_counted < coverage * counts.sum()
    assert all(set(closure(content)(int(old))) <= set(keep.new_to_old.tolist()) for old in keep.new_to_old)


def test_coverage_grows_to_the_multiple(content: Content, texts: list[str]) -> None:
    counts = count_tokens(load(content), texts[:20])
    smallest = len(choose(content, counts, coverage=0.8).new_to_old)
    padded = choose(content, counts, coverage=0.8, pad_to_multiple=64).new_to_old
    assert len(padded) == -(-smallest // 64) * 64


def test_reserved_and_unused_added_tokens_go_and_are_listed(base: Path, texts: list[str]) -> None:
    content = read(base / "tokenizer.json")
    for place, (token, special) in enumerate(
        [("<unused0>", False), ("<|reserved_1|>", True), ("<keep>", True), ("<mask>", False)]
    ):
        entry = {**content["added_tokens"][-1], "id": 606 + place, "content": token, "special": special}
        content["added_tokens"].append(entry)
    (base / "tokenizer.json").write_text(json.dumps(content), "utf-8")
    (base / "chat_template.jinja").write_text("<think>{{ messages }}", "utf-8")
    result = pruned(base, vocab_size=600, texts=texts)
    assert result.dropped_added_tokens == ["<unused>", "<unused0>", "<|reserved_1|>"]
    kept = vocabulary(read(base.parent / "out" / "tokenizer.json"))
    assert {"<think>", "<keep>", "<s>", "<mask>"} <= kept.keys()
    assert json.loads((base.parent / "out" / "prune.json").read_text("utf-8"))["dropped_added_tokens"]
    (base / "tokenizer_config.json").write_text('{"eos_token": "<|reserved_1|>"}', "utf-8")
    assert "<|reserved_1|>" not in pruned(base, vocab_size=600, texts=texts).dropped_added_tokens
    # In use by the corpus, they are counted like any other token.
    assert "<unused0>" not in pruned(base, coverage=1.0, texts=["<unused0>"]).dropped_added_tokens


def test_scripts_of_texts() -> None:
    assert [script(text) for text in ("春眠不觉晓 the", "the 春", "12", "。,", " \n", "\ufffd", "한글", "⠿x")] == [
        "Han", "Latin", "Digits", "Punctuation", "Spaces", "Partial", "Hangul", "Latin",
    ]  # fmt: skip


def test_keep_script_keeps_all_tokens_of_it(content: Content) -> None:
    tokenizer = load(content)
    ids = sorted(vocabulary(content).values())
    han = {
        tokenizer.decode([old], skip_special_tokens=False) for old in ids_in_scripts(tokenizer, ids, ["han"])
    }
    assert {"不", "不亦"} <= han and not any("a" <= char <= "z" for token in han for char in token)
    latin = ids_in_scripts(tokenizer, ids, ["Latin", "punctuation"])
    assert vocabulary(content)["Ġthe"] in latin and vocabulary(content)["<s>"] in latin
    assert not ids_in_scripts(tokenizer, ids, [])
    with pytest.raises(RecipeError, match="no script 'Hann'; did you mean 'Han'"):
        ids_in_scripts(tokenizer, ids, ["Hann"])


def test_a_kept_script_stays_whatever_the_counts(base: Path) -> None:
    result = pruned(base, coverage=0.5, texts=["the firefly"], keep_script=["Han"])
    before, after = result.scripts["Han"]
    assert before == after > 20
    assert result.scripts["Latin"][1] < result.scripts["Latin"][0]
    assert sum(after for _, after in result.scripts.values()) == result.vocab_after


def test_another_tokenizers_tokens_are_kept_with_their_closure(base: Path, tmp_path: Path) -> None:
    content = read(base / "tokenizer.json")
    derivation = BpeDerivation(content["model"])
    deep = max(range(600), key=lambda old: len(derivation.closure(old)))
    given = [*sorted(base_symbols(content)), deep]
    smaller = {
        **content,
        "added_tokens": [],
        "post_processor": None,
        "model": {
            **content["model"],
            "vocab": {derivation.tokens[old]: new for new, old in enumerate(given)} | {"全新": len(given)},
            "merges": [],
        },
    }
    (tmp_path / "smaller").mkdir()
    (tmp_path / "smaller" / "tokenizer.json").write_text(json.dumps(smaller), "utf-8")
    result = pruned(base, tokenizer=tmp_path / "smaller")
    kept = set(
        parse_id_ranges(
            json.loads((tmp_path / "out" / "prune.json").read_text("utf-8"))["new_to_old"]
        ).tolist()
    )
    assert kept == set(given) | set(derivation.closure(deep)) | {600, 601, 602, 603}
    assert result.not_in_base == ["全新"] and result.coverage == 1.0
    assert result.closure_size == len(kept) - len(given) > 4
    smaller["model"]["vocab"] = {f"other{place}": place for place in range(300)}
    (tmp_path / "smaller" / "tokenizer.json").write_text(json.dumps(smaller), "utf-8")
    with pytest.raises(InputError, match="lacks 300 of its 300 tokens"):
        pruned(base, tokenizer=tmp_path / "smaller")


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({}, "in one way"),
        ({"vocab_size": 400, "coverage": 0.9}, "in one way"),
        ({"coverage": 0.0}, "above 0 and up to 1"),
        ({"coverage": 1.5}, "above 0 and up to 1"),
        ({"vocab_size": 0}, "choose 1 or more"),
        ({"vocab_size": 400, "pad_to_multiple": 0}, "choose 1 or more"),
        ({"coverage": 0.9, "texts": []}, "holds no tokens"),
        ({"vocab_size": 400, "keep_script": ["Klingon"]}, "no script 'Klingon'"),
    ],
)
def test_unclear_choices_are_refused(base: Path, choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(FireflyError, match=sentence):
        pruned(base, **({"texts": ["the firefly"]} | choices))
    assert not (base.parent / "out").exists()


def test_the_verb_prunes_a_tokenizer_alone(
    base: Path, texts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = base.parent / "corpus.csv"
    corpus.write_text("text\n" + "\n".join(f'"{text}"' for text in texts), "utf-8")
    out = base.parent / "out"
    command = [
        "prune",
        str(base),
        str(out),
        "-c",
        str(corpus),
        "--coverage",
        "0.99",
        "--pad-to-multiple",
        "8",
    ]
    with pytest.raises(SystemExit) as end:
        main([*command, "--tokenizer-only", "--keep-script", "Han,Digits", "--json", "-q"])
    assert end.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["vocab_after"] % 8 == 0 and shown["coverage"] >= 0.99 and shown["params_after"] == 0
    assert shown["proof"]["made_up_texts_inside"] > 1000 and shown["corpus_documents"] == len(texts)
    assert {"tokenizer.json", "prune.json"} == {path.name for path in out.iterdir()}
    again = api.prune(base, base.parent / "again", corpus=[corpus], coverage=0.99, tokenizer_only=True)
    assert again.coverage >= 0.99


def test_two_at_once_into_one_place_are_told(base: Path, texts: list[str]) -> None:
    out = base.parent / "out"
    (base.parent / "a.txt").write_text("\n".join(texts), "utf-8")

    def prune() -> int:
        choices: dict[str, Any] = {"corpus": [base.parent / "a.txt"], "coverage": 0.9}
        return api.prune(base, out, tokenizer_only=True, **choices).vocab_after

    with (
        exclusive_beside(out, "firefly prune"),
        pytest.raises(OutputError, match="Another process is working"),
    ):
        prune()
    assert not out.exists() and prune() == prune()
    assert sorted(path.name for path in base.parent.iterdir()) == ["a.txt", "base", "out"]


def test_the_directory_one_is_in_is_no_output(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (Path(), Path.cwd(), Path("..", "here")):
        with pytest.raises(OutputError, match="the directory you are in"):
            prune_model(base, out, coverage=0.9, tokenizer_only=True, texts=["春眠"])
    assert not any(Path().iterdir())


def test_a_misspelt_corpus_is_not_an_unknown_kind(base: Path, tmp_path: Path) -> None:
    for name in ("corpus", "corpora/zh", "zh.text.old"):
        with pytest.raises(InputError, match=f"The file .*{name} does not exist"):
            pruned(base, coverage=0.9, corpus=[tmp_path / name])


# --- mutations: each is caught, and by its name ----------------------------------------------------------


def _drop_closure(content: Content, keep: list[int]) -> tuple[Content, list[int]]:
    derivation = BpeDerivation(content["model"])
    deep = next(old for old in reversed(keep) if old < 600 and len(derivation.closure(old)) > 3)
    lost = derivation.closure(deep)[-2]
    fewer = [old for old in keep if old != lost]
    return rebuild(content, np.array(fewer)), fewer


def _edit(change: Callable[[Content], Any]) -> Callable[[Content, list[int]], tuple[Content, list[int]]]:
    def mutate(content: Content, keep: list[int]) -> tuple[Content, list[int]]:
        new = rebuild(content, np.array(keep))
        change(new)
        return new, keep

    return mutate


def _swap_ids(new: Content) -> None:
    vocab = new["model"]["vocab"]
    vocab["Ġthe"], vocab["a"] = vocab["a"], vocab["Ġthe"]


@pytest.mark.parametrize(
    ("mutate", "sentence"),
    [
        (_drop_closure, "now splits into"),
        (_edit(_swap_ids), "the token '.*' has id"),
        (
            _edit(lambda new: new["post_processor"]["special_tokens"]["<s>"].update(ids=[5])),
            "post_processor inserts other tokens",
        ),
        (_edit(lambda new: new["added_tokens"][0].update(lstrip=True)), "added_tokens inserts other"),
        (_edit(lambda new: new["model"]["merges"].pop()), "merge .* of the pruned tokenizer is None"),
        (_edit(lambda new: new["model"].update(ignore_merges=True)), "ignore_merges has changed"),
        (_edit(lambda new: new.update(normalizer={"type": "NFC"})), "normalizer has changed"),
        (_edit(lambda new: new.update(decoder={"type": "Fuse"})), "decoder has changed"),
    ],
    ids=["closure", "swap", "special", "flags", "merge", "option", "normalizer", "decoder"],
)
def test_mutations_are_caught_by_name(
    base: Path,
    texts: list[str],
    mutate: Callable[[Content, list[int]], tuple[Content, list[int]]],
    sentence: str,
) -> None:
    content = read(base / "tokenizer.json")
    keep = choose(content, count_tokens(load(content), texts), 500).new_to_old
    out = base.parent / "out"
    out.mkdir()

    def prove(new: Content, kept: Any) -> dict[str, Any]:
        (out / "tokenizer.json").write_text(json.dumps(new), "utf-8")
        return prove_tokenizer(base, out, np.array(kept), Sample(texts), generated=500)

    prove(rebuild(content, keep), keep)
    with pytest.raises(ProofError, match=sentence):
        prove(*mutate(content, keep.tolist()))
