"""The keep-set: canonical closure, exact sizes, and token identity for every text inside it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from firefly.errors import RecipeError
from firefly.prune.counting import count_tokens
from firefly.prune.tokenizer import load, rebuild, referenced_ids, vocabulary
from firefly.prune.vocabulary import BpeDerivation, base_symbols, choose


def bpe(symbols: str, merges: list[tuple[str, str]], /, **model: Any) -> dict[str, Any]:
    """A tokenizer.json of a bare BPE over characters."""
    vocab = list(dict.fromkeys([*symbols, *(left + right for left, right in merges)]))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: place for place, token in enumerate(vocab)},
            "merges": [list(pair) for pair in merges],
            **model,
        },
    }


def closure_of(content: dict[str, Any], token: str) -> set[str]:
    derivation = BpeDerivation(content["model"])
    return {derivation.tokens[part] for part in derivation.closure(derivation.vocab[token])}


def test_closure_is_the_canonical_derivation_not_the_first_listed_merge() -> None:
    content = bpe("abc", [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")])
    assert closure_of(content, "abc") == {"a", "b", "c", "bc", "abc"}
    assert load(content).encode("abc").tokens == ["abc"]


def test_the_first_listed_merge_is_the_wrong_intermediate() -> None:
    """`aba` is built from `ab`; keeping `ba`, the part of its first-listed merge, breaks a text inside K."""
    content = bpe("ab", [("a", "b"), ("b", "a"), ("a", "ba"), ("ab", "a")])
    ids = content["model"]["vocab"]
    assert closure_of(content, "aba") == {"a", "b", "ab", "aba"}
    assert load(content).encode("baba").tokens == ["b", "aba"]
    for part, tokens in (("ab", ["b", "aba"]), ("ba", ["ba", "ba"])):
        kept = np.array(sorted(ids[token] for token in ("a", "b", part, "aba")))
        assert load(rebuild(content, kept)).encode("baba").tokens == tokens


def test_equal_ranks_are_merged_from_the_left() -> None:
    content = bpe("a", [("a", "a"), ("aa", "a"), ("a", "aa")])
    assert closure_of(content, "aaa") == {"a", "aa", "aaa"}


def test_merges_as_strings_and_as_pairs_are_the_same() -> None:
    pairs = bpe("abc", [("b", "c"), ("a", "bc")])
    strings = bpe("abc", [("b", "c"), ("a", "bc")], merges=["b c", "a bc"])
    assert closure_of(pairs, "abc") == closure_of(strings, "abc") == {"a", "b", "c", "bc", "abc"}
    kept = np.array([0, 1, 2, 3, 4])
    assert rebuild(strings, kept)["model"]["merges"] == ["b c", "a bc"]


def test_a_token_reached_by_lookup_alone_is_kept_without_closure() -> None:
    content = bpe("abcd", [("b", "c")], ignore_merges=True)
    content["model"]["vocab"]["abcd"] = 5
    assert closure_of(content, "abcd") == {"abcd"}
    small = rebuild(content, np.array([0, 1, 2, 3, 5]))
    assert load(small).encode("abcd").tokens == load(content).encode("abcd").tokens == ["abcd"]


def test_prefix_and_suffix_forms_start_the_derivation() -> None:
    suffixed = bpe("abc", [], end_of_word_suffix="</w>")
    suffixed["model"]["vocab"] = {"a": 0, "b": 1, "a</w>": 2, "b</w>": 3, "ab</w>": 4, "ab": 5}
    suffixed["model"]["merges"] = [["a", "b</w>"], ["a", "b"]]
    assert closure_of(suffixed, "ab</w>") == {"a", "b</w>", "ab</w>"}
    assert closure_of(suffixed, "ab") == {"a", "b", "ab"}
    assert base_symbols(suffixed) == {0, 1, 2, 3}
    prefixed = bpe("", [], continuing_subword_prefix="##")
    prefixed["model"]["vocab"] = {"a": 0, "##a": 1, "##b": 2, "a##b": 3, "##ab": 4, "ab": 5}
    prefixed["model"]["merges"] = [["a", "##b"], ["##a", "##b"]]
    assert closure_of(prefixed, "##ab") == {"##a", "##b", "##ab"}
    assert closure_of(prefixed, "ab") == {"a", "##b", "ab"}


def test_byte_fallback_pieces_are_the_base(content: dict[str, Any]) -> None:
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    model = bpe(
        "",
        [],
        byte_fallback=True,
        vocab={token: place for place, token in enumerate([*pieces, "▁", "中", "文"])},
    )
    assert base_symbols(model) == set(range(257))
    assert len(base_symbols(content)) == 256


tables = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=5, max_size=40)


@settings(max_examples=300, deadline=None)
@given(tables, st.randoms(use_true_random=False), st.sets(st.integers(0, 10**6), max_size=6))
def test_any_text_inside_the_keep_set_keeps_its_tokens(
    table: list[tuple[int, int]], rng: random.Random, wanted: set[int]
) -> None:
    """Random BPE tables in which most tokens have several merges of any rank; random keep-sets and texts."""
    tokens, merges = list("abc"), []
    for left, right in table:
        # Short tokens are likely, so that different pairs make the same token.
        pair = tokens[left % min(len(tokens), 9)], tokens[right % min(len(tokens), 9)]
        if pair not in merges:
            merges.append(pair)
            tokens = sorted({*tokens, "".join(pair)}, key=lambda token: (len(token), token))
    rng.shuffle(merges)
    content = bpe("abc", merges)
    original = load(content)
    derivation = BpeDerivation(content["model"])
    for token, token_id in content["model"]["vocab"].items():
        reached = [found.id for found in original.model.tokenize(token)] == [token_id]
        assert reached or derivation.closure(token_id) == [token_id]

    kept = set(base_symbols(content))
    for choice in wanted:
        kept.update(derivation.closure(choice % len(tokens)))
    new_to_old = np.array(sorted(kept))
    pruned = load(rebuild(content, new_to_old))
    pieces = [*"abc", *(derivation.tokens[old] for old in sorted(kept))]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 4))) for _ in range(60)]
    for text in [*texts, *(derivation.tokens[old] for old in kept)]:
        before, after = original.encode(text), pruned.encode(text)
        if set(before.ids) <= kept:
            assert before.tokens == after.tokens, (merges, text)
        assert pruned.decode(after.ids) == text


phrases = st.lists(
    st.sampled_from(
        [
            "春眠",
            "不觉晓",
            "花落知多少",
            " the",
            " firefly",
            "training",
            "模型",
            "，",
            "。",
            " 流萤",
            "\n",
            "é",
        ]
    ),
    max_size=12,
)


@settings(max_examples=100, deadline=None)
@given(phrases)
def test_random_texts_keep_their_tokens_or_their_bytes(content: dict[str, Any], parts: list[str]) -> None:
    original, pruned, kept = _pruned(content)
    before, after = original.encode("".join(parts)), pruned.encode("".join(parts))
    if set(before.ids) <= kept:
        assert before.tokens == after.tokens
    assert pruned.decode(after.ids, skip_special_tokens=False) == original.decode(
        before.ids, skip_special_tokens=False
    )


_CACHE: list[tuple[Tokenizer, Tokenizer, set[int]]] = []


def _pruned(content: dict[str, Any]) -> tuple[Tokenizer, Tokenizer, set[int]]:
    if not _CACHE:
        original = load(content)
        counts = count_tokens(original, ["春眠不觉晓，花落知多少。the firefly training 模型"] * 3)
        keep = choose(content, counts, 330)
        _CACHE.append((original, load(rebuild(content, keep.new_to_old)), set(keep.new_to_old.tolist())))
    return _CACHE[0]


def test_vocab_size_is_reached_exactly_and_the_set_is_closed(
    content: dict[str, Any], texts: list[str]
) -> None:
    counts = count_tokens(load(content), texts[:40])
    derivation = BpeDerivation(content["model"])
    least, most = 260, len(vocabulary(content))
    for size in range(least, most + 1, 7):
        keep = choose(content, counts, size)
        kept = set(keep.new_to_old.tolist())
        assert len(keep.new_to_old) == len(kept) == size == sum(keep.statistics.values())
        assert base_symbols(content) | referenced_ids(content) <= kept
        for token_id in kept:
            assert kept.issuperset(derivation.closure(token_id))
    assert choose(content, counts, most).new_to_old.tolist() == list(range(most))


def test_frequent_tokens_come_first_and_ties_go_by_id(content: dict[str, Any]) -> None:
    counts = np.zeros(len(vocabulary(content)), dtype=np.int64)
    derivation = BpeDerivation(content["model"])
    rare, frequent = 400, 500
    counts[rare], counts[frequent] = 1, 9
    room = [part for part in derivation.closure(frequent) if part not in base_symbols(content)]
    keep = choose(content, counts, 260 + len(room))
    assert set(room) <= set(keep.new_to_old.tolist())
    assert keep.num_counted == 1 and keep.num_closure == len(room) - 1 and keep.num_filled == 0
    filled = choose(content, np.zeros_like(counts), 261)
    assert filled.new_to_old[256] == 256 and filled.num_filled == 1


def test_order_is_kept_and_outside_tokens_come_last(content: dict[str, Any], texts: list[str]) -> None:
    keep = choose(content, count_tokens(load(content), texts), 400)
    num_model = len(content["model"]["vocab"])
    assert (np.diff(keep.new_to_old) > 0).all()
    assert [old for old in keep.new_to_old if old >= num_model] == sorted(referenced_ids(content))


def test_pad_to_multiple_rounds_up(content: dict[str, Any]) -> None:
    assert len(choose(content, np.zeros(3, dtype=np.int64), 300, pad_to_multiple=64).new_to_old) == 320


@pytest.mark.parametrize(
    ("size", "multiple", "number"), [(100, 1, "260"), (10_000, 1, "606"), (600, 64, "606")]
)
def test_impossible_sizes_name_the_number_needed(
    content: dict[str, Any], size: int, multiple: int, number: str
) -> None:
    with pytest.raises(RecipeError, match=rf"vocab_size = {size:,}.*\b{number}\b"):
        choose(content, np.zeros(1, dtype=np.int64), size, pad_to_multiple=multiple)


def test_wanted_tokens_stay_whatever_the_counts(content: dict[str, Any]) -> None:
    token_id = max(content["model"]["vocab"].items(), key=lambda item: len(item[0]))[1]
    needed = 260 + len(set(BpeDerivation(content["model"]).closure(token_id)) - base_symbols(content))
    assert token_id in choose(content, np.zeros(1, dtype=np.int64), needed, wanted=[token_id]).new_to_old
    with pytest.raises(RecipeError, match=str(needed)):
        choose(content, np.zeros(1, dtype=np.int64), needed - 1, wanted=[token_id])
