"""Unigram and WordPiece beside BPE: the same contract, each by its own means."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.errors import ProofError
from firefly.prune.proof import PROBES, prove_stages, prove_texts, prove_tokens
from firefly.prune.tokenizer import Json, is_placeholder, load, model_vocabulary, rebuild, referenced_ids
from firefly.prune.vocabulary import base_symbols, choose, closure

STAGES: Json = {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": None,
    "post_processor": None,
    "decoder": None,
}


def unigram(pieces: list[tuple[str, float]], **model: Any) -> Json:
    vocab = [["<unk>", 0.0], *([token, score] for token, score in pieces)]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    return {
        **STAGES,
        "pre_tokenizer": metaspace,
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False, **model},
    }


def wordpiece(tokens: list[str], **model: Any) -> Json:
    return {
        **STAGES,
        "pre_tokenizer": {"type": "Whitespace"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": False},
        "model": {
            "type": "WordPiece",
            "unk_token": "[UNK]",
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {token: place for place, token in enumerate(["[UNK]", *tokens])},
            **model,
        },
    }


def ids(content: Json, *tokens: str) -> NDArray[np.int64]:
    return np.array(sorted(model_vocabulary(content["model"])[token] for token in tokens))


def prune(content: Json, wanted: list[int]) -> tuple[Tokenizer, Tokenizer, NDArray[np.int64]]:
    keep = choose(content, np.zeros(1, dtype=np.int64), wanted=wanted).new_to_old
    new = rebuild(content, keep)
    prove_stages(content, new, keep)
    original, pruned = load(content), load(new)
    prove_tokens(original, pruned, keep)
    prove_texts(original, pruned, keep, PROBES)
    return original, pruned, keep


words = st.text("abcx", min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(words, st.integers(-9, -1), min_size=3, max_size=20),
    st.sets(st.integers(0, 30), max_size=8),
    st.randoms(use_true_random=False),
)
def test_unigram_keeps_the_tokens_of_every_text_inside(
    table: dict[str, int], wanted: set[int], rng: random.Random
) -> None:
    """Whole scores make ties likely; `x` stands in pieces but not by itself, and `z` is unknown."""
    singles = [(char, float(rng.randint(-12, -6))) for char in "▁abc"]
    pieces = [(token, float(score)) for token, score in table.items()]
    content = unigram([*singles, *pieces])
    original, pruned, keep = prune(content, [place % (len(pieces) + 5) for place in wanted])
    kept = [original.id_to_token(int(old)) for old in keep[1:]]
    texts = ["".join(rng.choices([*kept, "z"], k=rng.randint(1, 6))) for _ in range(40)]
    for text in texts:
        before, after = original.encode(text), pruned.encode(text)
        if set(before.ids) <= set(keep.tolist()):
            assert before.tokens == after.tokens
        if 0 not in before.ids and "x" not in text:
            assert 0 not in after.ids
            assert pruned.decode(after.ids) == original.decode(before.ids)


def test_unigram_unknowns_keep_their_price() -> None:
    """An unknown character costs 10 more than the lowest score; dropping that token would make it cheap."""
    content = unigram([("▁", -1.0), ("a", -1.0), ("ab", -12.0), ("c", -9.0), ("cc", -14.0)])
    assert ids(content, "cc")[0] in base_symbols(content)
    original, pruned, _ = prune(content, ids(content, "ab").tolist())
    assert original.encode("ab").tokens == pruned.encode("ab").tokens == ["▁", "ab"]
    content = unigram([("▁", -1.0), ("a", -1.0), ("ab", -13.0), ("c", -9.0), ("cc", -99.0)])
    kept = ids(content, "<unk>", "▁", "a", "ab", "c")
    cheap = rebuild(content, kept)
    with pytest.raises(ProofError, match="lowest score is gone"):
        prove_stages(content, cheap, kept)


def test_unigram_ids_are_places_and_unk_follows() -> None:
    content = unigram([("a", -1.0), ("b", -2.0), ("ab", -3.0)], unk_id=2)
    new = rebuild(content, np.array([1, 2, 3]))
    assert new["model"]["vocab"] == [["a", -1.0], ["b", -2.0], ["ab", -3.0]]
    assert new["model"]["unk_id"] == 1 and content["model"]["unk_id"] == 2
    assert 2 in referenced_ids(content)
    new["model"]["unk_id"] = 0
    with pytest.raises(ProofError, match="unknown token's id is 0"):
        prove_stages(content, new, np.array([1, 2, 3]))


def test_unigram_scores_are_the_originals() -> None:
    content = unigram([("a", -1.0), ("b", -2.0)])
    new = rebuild(content, np.arange(3))
    new["model"]["vocab"][1][1] = -1.5
    with pytest.raises(ProofError, match="score of 'a'"):
        prove_stages(content, new, np.arange(3))


def test_single_characters_and_what_only_longer_pieces_can_write_stay() -> None:
    content = unigram([("▁", -1.0), ("a", -2.0), ("aa", -2.5), ("ax", -3.0), ("▁aa", -4.0)])
    tokens = {content["model"]["vocab"][old][0] for old in base_symbols(content)}
    assert tokens == {"<unk>", "▁", "a", "ax", "▁aa"}  # ▁aa has the lowest score
    words = wordpiece(["a", "##a", "aa", "ax", "##xa", "b", "ab", "[unused1]"])
    assert base_symbols(words) == set(ids(words, "[UNK]", "a", "##a", "b", "ax", "##xa", "ab").tolist())


def test_byte_pieces_stand_in_for_dropped_characters() -> None:
    pieces = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    content = unigram([*pieces, ("▁", -1.0), ("中", -2.0), ("文", -3.0)], byte_fallback=True)
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    _, pruned, keep = prune(content, [])
    assert len(keep) == 258
    assert pruned.decode(pruned.encode("中文𠮷").ids) == "中文𠮷"


@settings(max_examples=60, deadline=None)
@given(
    st.sets(words, min_size=3, max_size=20),
    st.sets(st.integers(0, 60), max_size=12),
    st.randoms(use_true_random=False),
)
def test_wordpiece_keeps_the_tokens_of_every_text_inside(
    table: set[str], wanted: set[int], rng: random.Random
) -> None:
    singles = [prefix + char for char in "abc" for prefix in ("", "##")]
    tokens = [
        *singles,
        *(prefix + word for word in sorted(table) for prefix in rng.choice([[""], ["##"], ["", "##"]])),
    ]
    content = wordpiece(tokens)
    original, pruned, keep = prune(content, [place % (len(tokens) + 1) for place in wanted])
    kept = set(keep.tolist())
    for _ in range(40):
        text = " ".join("".join(rng.choices("abc" * 5 + "xz", k=rng.randint(1, 9))) for _ in range(3))
        before, after = original.encode(text), pruned.encode(text)
        if set(before.ids) <= kept and 0 not in before.ids:
            assert before.tokens == after.tokens
        if not set(text) & set("xz"):
            assert pruned.decode(after.ids) == original.decode(before.ids) == text


def test_a_word_unknown_to_wordpiece_may_become_readable_and_that_is_no_failure() -> None:
    """Longest match gives up behind `ab`; without `ab` it goes on. The text held [UNK] before."""
    content = wordpiece(["a", "##a", "b", "##b", "ab", "##bx", "##x"])
    del content["model"]["vocab"]["##x"]
    original, pruned, keep = prune(content, [])
    assert original.encode("abx").tokens == ["[UNK]"] and pruned.encode("abx").tokens == ["a", "##bx"]
    assert prove_texts(original, pruned, keep, ["abx", "ba"])["documents_outside_unknown_before_too"] == 1


def test_closures_hold_the_token_alone() -> None:
    for content in (unigram([("a", -1.0), ("aa", -1.0)]), wordpiece(["a", "##a", "aa"])):
        assert closure(content)(2) == [2]


@pytest.mark.parametrize(
    ("token", "reserved"),
    [
        ("<unused6241>", True),
        ("[unused12]", True),
        ("<|reserved_special_token_7|>", True),
        ("<｜place▁holder▁no▁0｜>", True),
        ("[control_766]", True),
        ("Ġreserved", False),
        ("unused", False),
        ("<think>", False),
        ("<extra_id_0>", False),
        ("<|im_end|>", False),
    ],
)
def test_placeholders_are_told_by_their_names(token: str, reserved: bool) -> None:
    assert is_placeholder(token) is reserved
