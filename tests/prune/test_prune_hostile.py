"""Hostile and damaged tokenizer files: one clear sentence each, at once, and nothing written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly.errors import ModelError
from firefly.prune import prune_model
from firefly.prune.tokenizer import load, read, vocabulary

Content = dict[str, Any]


def _model(**changes: Any) -> Callable[[Content], Any]:
    return lambda content: content["model"].update(changes)


def _token(token: str, token_id: Any) -> Callable[[Content], Any]:
    return lambda content: content["model"]["vocab"].update({token: token_id})


def _merge(merge: Any) -> Callable[[Content], Any]:
    return lambda content: content["model"]["merges"].insert(3, merge)


def _unigram(vocab: Any, unk_id: Any = 0) -> Callable[[Content], Any]:
    model = {"type": "Unigram", "unk_id": unk_id, "vocab": vocab, "byte_fallback": False}
    return lambda content: content.update(model=model, added_tokens=[], post_processor=None)


def _added(**changes: Any) -> Callable[[Content], Any]:
    return lambda content: content["added_tokens"][-1].update(changes)


DAMAGES: list[tuple[str, Callable[[Content], Any], str]] = [
    ("product", _merge(["Ċ", "Ã"]), "merge 3, 'Ċ Ã', uses 'ĊÃ', which is not in the vocabulary"),
    ("part", _merge("Ċ absent"), "merge 3, 'Ċ absent', uses 'absent'"),
    ("triple", _merge("a b c"), "merge 3 is 'a b c', not two tokens"),
    ("number", _merge(7), "merge 3 is 7, not two tokens"),
    ("merges", _model(merges={"a": "b"}), "no list of merges"),
    ("vocab-list", _model(vocab=["a", "b"]), "no vocabulary of tokens"),
    ("vocab-none", _model(vocab=None), "no vocabulary of tokens"),
    ("vocab-empty", _unigram([]), "unk_id is 0|vocabulary is empty"),
    ("prefix", _model(continuing_subword_prefix=5), "continuing_subword_prefix is 5, not a string"),
    ("unk", _model(unk_token=["<unk>"]), "unk_token is .*, not a string"),
    ("huge", _token("x y", 2**32 - 1), "'x y' has the id 4294967295, which no real vocabulary reaches"),
    ("negative", _token("x y", -1), "'x y' has the id -1"),
    ("string-id", _token("x y", "600"), "'x y' has the id '600'"),
    ("float-id", _token("x y", 600.0), "'x y' has the id 600.0"),
    ("true", _token("x y", True), "'x y' has the id True"),
    ("shared", _token("x y", 5), "two tokens share one id"),
    ("added-huge", _added(id=2**32 - 1), "which no real vocabulary reaches"),
    ("added-shared", _added(id=3), "two tokens share one id"),
    ("added-dict", lambda content: content.update(added_tokens={"a": 1}), "added_tokens is not a list"),
    ("added-text", _added(content=None), "lacks its content, id or special flag"),
    ("added-flag", _added(special="yes"), "lacks its content, id or special flag"),
    ("score", _unigram([["<unk>", 0], ["a", "1"]]), "the score of 'a' is '1', not a number"),
    ("nan", _unigram([["<unk>", 0], ["a", float("nan")]]), "the score of 'a' is nan"),
    ("pair", _unigram([["<unk>", 0], ["a"]]), r"piece 1 of the vocabulary is \['a'\]"),
    ("twice", _unigram([["<unk>", 0], ["a", -1], ["a", -2]]), "stands twice"),
    ("unk-range", _unigram([["<unk>", 0]], 9), "unk_id is 9, which no token has"),
    ("unk-type", _unigram([["<unk>", 0]], "0"), "unk_id is '0'"),
    ("dict-unigram", _unigram({"<unk>": 0}), "no list of .* pairs"),
    ("kind", _model(type="Wonder"), "is a Wonder tokenizer; pruning handles BPE, Unigram, WordPiece"),
    ("no-model", lambda content: content.pop("model"), "not a tokenizer.json"),
    ("normalizer", lambda content: content.update(normalizer={"type": "Nothing"}), "broke while loading"),
    (
        "regex",
        lambda content: content.update(
            pre_tokenizer={
                "type": "Split",
                "pattern": {"Regex": "(("},
                "behavior": "Isolated",
                "invert": False,
            }
        ),
        "broke while loading",
    ),
    (
        "stage-id",
        lambda content: content["post_processor"]["special_tokens"]["<s>"].update(ids=[9999]),
        "inserts the id 9999, which no token has",
    ),
    (
        "padding-id",
        lambda content: content.update(
            padding={
                "strategy": "BatchLongest",
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 9999,
                "pad_type_id": 0,
                "pad_token": "<pad>",
            }
        ),
        "inserts the id 9999",
    ),
]


def sentence(error: pytest.ExceptionInfo[ModelError]) -> str:
    text = str(error.value)
    assert len(text) < 500 and "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("damage", "expected"), [row[1:] for row in DAMAGES], ids=[row[0] for row in DAMAGES]
)
def test_every_damage_is_one_sentence(
    content: Content, tmp_path: Path, damage: Callable[[Content], Any], expected: str
) -> None:
    broken = json.loads(json.dumps(content))
    damage(broken)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(broken), "utf-8")
    with pytest.raises(ModelError, match=expected) as error:
        prune_model(tmp_path / "base", tmp_path / "out", vocab_size=450, texts=["a"], tokenizer_only=True)
    assert "tokenizer.json" in sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
        (b"", "not valid JSON"),
        (b'{"model": {"type": "BPE", "voc', "not valid JSON"),
        (b"[1, 2]", "holds a JSON list, not an object"),
        (b'{"model": "\xff"}', "not valid JSON"),
        (b'{"model":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON|has no 'model'"),
        (b'{"model": 5}', "not a tokenizer.json"),
    ],
    ids=["bom", "empty", "cut", "list", "bytes", "deep", "number"],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, raw: bytes, expected: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(raw)
    with pytest.raises(ModelError, match=expected):
        read(tmp_path / "tokenizer.json")


def test_a_pathological_regex_ends_soon_with_a_sentence(content: Content, tmp_path: Path) -> None:
    hostile = json.loads(json.dumps(content))
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    hostile["pre_tokenizer"] = split
    (tmp_path / "tokenizer.json").write_text(json.dumps(hostile), "utf-8")
    start_s = time.monotonic()
    with pytest.raises(ModelError, match=r"broke while tokenizing the corpus: .*retry-limit") as error:
        prune_model(tmp_path, tmp_path / "out", vocab_size=450, texts=["a" * 5000 + "!"], tokenizer_only=True)
    assert time.monotonic() - start_s < 20
    assert "fetch it again" in sentence(error)
    assert not (tmp_path / "out").exists()


def test_holes_among_the_ids_are_closed(content: Content, tmp_path: Path) -> None:
    """The library accepts holes, and so does pruning; the result has none."""
    holes = json.loads(json.dumps(content))
    holes["model"]["vocab"] = {
        token: old + (100 if old >= 300 else 0) for token, old in holes["model"]["vocab"].items()
    }
    for token in holes["added_tokens"]:
        token["id"] += 100
    special = holes["post_processor"]["special_tokens"]["<s>"]
    special["ids"] = [special["ids"][0] + 100]
    (tmp_path / "tokenizer.json").write_text(json.dumps(holes), "utf-8")
    try:
        load(holes)
    except ModelError as error:  # a library that renumbers is told of
        assert "loads it as" in str(error)
        return
    prune_model(
        tmp_path, tmp_path / "out", vocab_size=400, texts=["春眠不觉晓 the firefly"], tokenizer_only=True
    )
    assert sorted(vocabulary(read(tmp_path / "out" / "tokenizer.json")).values()) == list(range(400))
