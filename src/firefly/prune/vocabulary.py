"""Which tokens stay: the keep-set K, closed so that pruning is exact.

A token stays together with its *canonical derivation*: the intermediates that the original BPE builds when
it runs on the token's own string alone. Merges never straddle a final token, so a token's derivation inside
any text is its derivation alone; with all of it in K, texts that use only K keep their tokens. Closing over
every merge that could make a token would be safe too, and keep up to a quarter more tokens for nothing.
Unigram and WordPiece choose among whole tokens, so there a token needs no other. docs/pruning.md has the proof.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from firefly.errors import RecipeError
from firefly.prune.tokenizer import (
    Json,
    added_tokens,
    is_placeholder,
    merge_pairs,
    model_type,
    model_vocabulary,
    referenced_ids,
    vocabulary,
)


@dataclass(frozen=True)
class KeepSet:
    """The kept tokens, and why they were kept (the five counts add up to `len(new_to_old)`)."""

    new_to_old: NDArray[np.int64]  # [K] old id of each new id; model tokens first, in old order
    num_base: int  # base symbols: bytes, byte-fallback pieces, or the alphabet
    num_required: int  # special, referenced and explicitly wanted tokens
    num_counted: int  # tokens that occur in the corpus
    num_closure: int  # intermediates that no text needs by themselves
    num_filled: int  # further tokens in id order, when the corpus used fewer than vocab_size
    dropped_added: tuple[str, ...]  # added tokens that go: reserved ones and those that nothing names or uses

    @property
    def statistics(self) -> dict[str, int]:
        """The counts by reason, JSON-able."""
        return {
            "base": self.num_base,
            "required": self.num_required,
            "counted": self.num_counted,
            "closure": self.num_closure,
            "filled": self.num_filled,
        }


class BpeDerivation:
    """The original BPE, run on one token's own string (the reference loop: lowest rank first, leftmost first)."""

    def __init__(self, model: Json) -> None:
        self.vocab: dict[str, int] = model["vocab"]
        self.tokens = {token_id: token for token, token_id in self.vocab.items()}
        self.prefix = model.get("continuing_subword_prefix") or ""
        self.suffix = model.get("end_of_word_suffix") or ""
        self.ranks = {pair: rank for rank, pair in enumerate(merge_pairs(model))}
        self.no_rank = len(model["merges"])

    def closure(self, token_id: int) -> list[int]:
        """Base symbols and intermediates of the token's canonical derivation, and the token itself.

        A token that its own string does not derive (reachable by `ignore_merges` lookup alone, or an added
        token inside the model's vocabulary) needs nothing else: it alone is returned.
        """
        token = self.tokens.get(token_id, "")
        symbols = self._symbols(token)
        made = dict.fromkeys(symbols)
        rank_of, none = self.ranks.get, self.no_rank
        ranks = [rank_of(pair, none) for pair in itertools.pairwise(symbols)]
        while ranks and (rank := min(ranks)) < none:
            place = ranks.index(rank)
            product = symbols[place] + symbols[place + 1][len(self.prefix) :]
            made[product] = None
            symbols[place : place + 2] = [product]
            del ranks[place]
            if place:
                ranks[place - 1] = rank_of((symbols[place - 1], product), none)
            if place < len(ranks):
                ranks[place] = rank_of((product, symbols[place + 1]), none)
        return [self.vocab[symbol] for symbol in made] if symbols == [token] else [token_id]

    def _symbols(self, token: str) -> list[str]:
        """What the BPE starts with on `token`; empty if a character is not in the vocabulary."""
        inside = bool(self.prefix) and token.startswith(self.prefix)
        body = token.removeprefix(self.prefix) if inside else token
        ends = bool(self.suffix) and body.endswith(self.suffix)
        body = body.removesuffix(self.suffix) if ends else body
        pieces = [self.prefix + char if place or inside else char for place, char in enumerate(body)]
        if pieces and ends:
            pieces[-1] += self.suffix
        return pieces if all(map(self.vocab.__contains__, pieces)) else []


def closure(content: Json) -> Callable[[int], list[int]]:
    """The function from a token's id to the ids that it needs, itself included, by model type."""
    if model_type(content) == "BPE":
        return BpeDerivation(content["model"]).closure
    return lambda token_id: [token_id]


def base_symbols(content: Json) -> set[int]:
    """Ids without which some text could not be written: 256 bytes, byte-fallback pieces, or the alphabet."""
    return _BASE[model_type(content)](content)


def _base_bpe(content: Json) -> set[int]:
    """The bytes, the byte-fallback pieces, or every single character in its forms."""
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    if model.get("byte_fallback"):
        return _byte_pieces(vocab)
    byte_level = any(_uses_byte_level(content.get(stage)) for stage in ("pre_tokenizer", "normalizer"))
    alphabet = set(ByteLevel.alphabet())
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    symbols = set()
    for token, token_id in vocab.items():
        if len(token) > 1 + len(prefix) + len(suffix):
            continue
        char = token.removeprefix(prefix) if len(token) > 1 else token
        char = char.removesuffix(suffix) if len(char) > 1 else char
        if len(char) == 1 and (not byte_level or char in alphabet):
            symbols.add(token_id)
    return symbols


def _base_unigram(content: Json) -> set[int]:
    """The byte-fallback pieces or the alphabet, and the lowest score: unknown characters cost 10 more than that."""
    model = content["model"]
    vocab = model_vocabulary(model)
    lowest = min(range(len(model["vocab"])), key=lambda place: model["vocab"][place][1])
    if model.get("byte_fallback"):
        return {lowest} | _byte_pieces(vocab)
    return {lowest} | _alphabet(content, lambda token: list(token))


def _base_wordpiece(content: Json) -> set[int]:
    """The alphabet, at the beginning of words and inside them."""
    prefix = content["model"].get("continuing_subword_prefix") or ""

    def spelled(token: str) -> list[str]:
        inside = bool(prefix) and token.startswith(prefix) and len(token) > len(prefix)
        body = token.removeprefix(prefix) if inside else token
        return [prefix + char if inside or place else char for place, char in enumerate(body)]

    return _alphabet(content, spelled)


_BASE: dict[str, Callable[[Json], set[int]]] = {
    "BPE": _base_bpe,
    "Unigram": _base_unigram,
    "WordPiece": _base_wordpiece,
}


def _byte_pieces(vocab: dict[str, int]) -> set[int]:
    """`<0x00>` … `<0xFF>`, and the word mark: decoders turn it into a space before they join byte pieces."""
    return {vocab[piece] for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁"] if piece in vocab}


def _alphabet(content: Json, spelled: Callable[[str], list[str]]) -> set[int]:
    """Single characters, and the tokens that single characters could not stand in for."""
    vocab = model_vocabulary(content["model"])
    apart = {token["content"] for token in added_tokens(content)}
    return {
        token_id
        for token, token_id in vocab.items()
        if token not in apart
        and not is_placeholder(token)
        and ((pieces := spelled(token)) == [token] or not all(piece in vocab for piece in pieces))
    }


def _uses_byte_level(stage: Any) -> bool:
    """Whether a pipeline stage, or one inside it, is ByteLevel."""
    if isinstance(stage, list):
        return any(_uses_byte_level(item) for item in stage)
    if isinstance(stage, dict):
        return stage.get("type") == "ByteLevel" or any(_uses_byte_level(item) for item in stage.values())
    return False


def choose(
    content: Json,
    counts: NDArray[np.int64],
    vocab_size: int | None = None,
    wanted: Iterable[int] = (),
    pad_to_multiple: int = 1,
    coverage: float | None = None,
) -> KeepSet:
    """Choose the closed keep-set: of exactly `vocab_size` tokens, or the smallest that reaches `coverage`.

    Base symbols, special and referenced tokens and `wanted` ids always stay, with their closures; without
    `vocab_size` and `coverage` that is all. Then come tokens by descending frequency (ties by id), each with
    its closure; one whose closure would overflow is passed over for the next that fits. After the counted
    tokens, id order goes on (lower ids were merged earlier), reserved and unused added tokens last.

    Args:
        content: the parsed tokenizer.json.
        counts: token frequencies [V] by old id.
        pad_to_multiple: the size is rounded up to a multiple of this.
        coverage: share of the counted tokens that must lie in the keep-set, up to 1.

    Raises `RecipeError` when `vocab_size` is below what must stay or above what there is.
    """
    tokens = vocabulary(content)
    frequency = np.zeros(max(tokens.values()) + 1, dtype=np.int64)
    frequency[: len(counts)] = counts[: len(frequency)]

    needs = closure(content)
    base = base_symbols(content)
    kept = dict.fromkeys(sorted(base))
    # Each required token's closure is required with it. High ids are made of low ones: in this order most of the
    # others are found kept, as an intermediate, whose own closure is then kept as well.
    for token_id in sorted(referenced_ids(content) | {int(token_id) for token_id in wanted}, reverse=True):
        if token_id in base or token_id not in kept:
            kept.update(dict.fromkeys(needs(token_id)))
    num_required = len(kept) - len(base)

    still_needed = 0
    if coverage is not None:
        still_needed = math.ceil(coverage * int(frequency.sum())) - int(frequency[list(kept)].sum())
    ranked = _ranked(content, frequency) if still_needed > 0 or vocab_size or pad_to_multiple > 1 else []
    rank = 0
    while still_needed > 0:  # without a size, frequency alone decides
        token_id = ranked[rank]
        parts = needs(token_id) if token_id in base or token_id not in kept else []
        missing = [part for part in parts if part not in kept]
        kept.update(dict.fromkeys(missing))
        still_needed -= int(frequency[missing].sum())
        rank += 1

    asked = len(kept) if vocab_size is None else vocab_size
    size = -(-asked // pad_to_multiple) * pad_to_multiple
    named = f"prune.vocab_size = {asked:,}" + (f" (padded to {size:,})" if size != asked else "")
    if size > len(tokens):
        raise RecipeError(
            f"{named}: the vocabulary has only {len(tokens):,} tokens; choose at most {len(tokens):,}."
        )
    if len(kept) > size:
        raise RecipeError(
            f"{named}: base symbols, special and wanted tokens with their derivations need {len(kept):,}; "
            f"choose at least {len(kept):,}."
        )
    # One pass is enough: at every moment a passed-over token still needs more than the room that is left,
    # and while anything is missing some token's parts are all kept, so the pass ends exactly at `size`.
    filled: set[int] = set()
    for token_id in ranked:
        if len(kept) == size:
            break
        missing = [part for part in needs(token_id) if part not in kept] if token_id not in kept else []
        if len(kept) + len(missing) <= size:
            kept.update(dict.fromkeys(missing))
            if not frequency[token_id]:
                filled.update(missing)
    assert len(kept) == size, (len(kept), size)

    chosen = list(kept)[len(base) + num_required :]
    num_counted = int(np.count_nonzero(frequency[chosen]))
    num_filled = sum(not frequency[old] for old in filled)
    model_ids = set(model_vocabulary(content["model"]).values())
    new_to_old = np.array(sorted(kept, key=lambda old: (old not in model_ids, old)), dtype=np.int64)
    return KeepSet(
        new_to_old,
        num_base=len(base),
        num_required=num_required,
        num_counted=num_counted,
        num_closure=len(chosen) - num_counted - num_filled,
        num_filled=num_filled,
        dropped_added=tuple(t["content"] for t in added_tokens(content) if t["id"] not in kept),
    )


def _ranked(content: Json, frequency: NDArray[np.int64]) -> list[int]:
    """All ids by descending frequency; among equals by id, reserved and added tokens last."""
    tokens = vocabulary(content)
    last = {token["id"] for token in added_tokens(content)}
    last |= {token_id for token, token_id in tokens.items() if is_placeholder(token)}
    ids = np.array(sorted(tokens.values()), dtype=np.int64)
    ids = ids[np.argsort(np.isin(ids, list(last)), kind="stable")]
    ranked: list[int] = ids[np.argsort(-frequency[ids], kind="stable")].tolist()
    return ranked
