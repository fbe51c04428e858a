"""Which tokens stay: the keep-set K, closed so that pruning is exact.

A token stays together with its *canonical derivation*: the intermediates that the original BPE builds when
it runs on the token's own string alone. Merges never straddle a final token, so a token's derivation inside
any text is its derivation alone; with all of it in K, texts that use only K keep their tokens. Closing over
every merge that could make a token would be safe too, and keep up to a quarter more tokens for nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel

from firefly.errors import ModelError, RecipeError
from firefly.prune.tokenizer import Json, merge_pairs, merged, referenced_ids, vocabulary


@dataclass(frozen=True)
class KeepSet:
    """The kept tokens, and why they were kept (the five counts add up to `len(new_to_old)`)."""

    new_to_old: NDArray[np.int64]  # [K] old id of each new id; model tokens first, in old order
    num_base: int  # base symbols: bytes, byte-fallback pieces, or the alphabet
    num_required: int  # special, referenced and explicitly wanted tokens
    num_counted: int  # tokens that occur in the corpus
    num_closure: int  # intermediates that no text needs by themselves
    num_filled: int  # further tokens in id order, when the corpus used fewer than vocab_size

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
        self.merges: dict[tuple[int, int], tuple[int, int]] = {}  # (left, right) → (rank, result)
        for rank, (left, right) in enumerate(merge_pairs(model)):
            try:
                pair = self.vocab[left], self.vocab[right]
                self.merges[pair] = rank, self.vocab[merged(model, left, right)]
            except KeyError as error:
                raise ModelError(
                    f"The merge '{left} {right}' uses {error}, which is not in the vocabulary."
                ) from None

    def closure(self, token_id: int) -> list[int]:
        """Base symbols and intermediates of the token's canonical derivation, and the token itself.

        A token that its own string does not derive (reachable by `ignore_merges` lookup alone, or an added
        token inside the model's vocabulary) needs nothing else: it alone is returned.
        """
        symbols = self._symbols(self.tokens[token_id]) if token_id in self.tokens else []
        made = dict.fromkeys(symbols)
        while len(symbols) > 1:
            candidates = [
                (*self.merges[pair], place)
                for place, pair in enumerate(itertools.pairwise(symbols))
                if pair in self.merges
            ]
            if not candidates:
                break
            _, result, place = min(candidates, key=lambda found: (found[0], found[2]))
            symbols[place : place + 2] = [result]
            made[result] = None
        return list(made) if symbols == [token_id] else [token_id]

    def _symbols(self, token: str) -> list[int]:
        """The ids with which the BPE starts on `token`; empty if a character is not in the vocabulary."""
        inside = bool(self.prefix) and token.startswith(self.prefix)
        body = token.removeprefix(self.prefix) if inside else token
        ends = bool(self.suffix) and body.endswith(self.suffix)
        body = body.removesuffix(self.suffix) if ends else body
        pieces = [self.prefix + char if place or inside else char for place, char in enumerate(body)]
        if pieces and ends:
            pieces[-1] += self.suffix
        symbols = [self.vocab.get(piece, -1) for piece in pieces]
        return [] if -1 in symbols else symbols


def base_symbols(content: Json) -> set[int]:
    """Ids without which some text could not be written: 256 bytes, byte-fallback pieces, or the alphabet."""
    model = content["model"]
    vocab: dict[str, int] = model["vocab"]
    if model.get("byte_fallback"):
        # The word mark too: decoders turn it into a space before they join byte pieces.
        return {
            vocab[piece] for piece in [*(f"<0x{byte:02X}>" for byte in range(256)), "▁"] if piece in vocab
        }
    byte_level = any(_uses_byte_level(content.get(stage)) for stage in ("pre_tokenizer", "normalizer"))
    alphabet = set(ByteLevel.alphabet())
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    symbols = set()
    for token, token_id in vocab.items():
        char = token.removeprefix(prefix) if len(token) > 1 else token
        char = char.removesuffix(suffix) if len(char) > 1 else char
        if len(char) == 1 and (not byte_level or char in alphabet):
            symbols.add(token_id)
    return symbols


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
    vocab_size: int,
    wanted: Iterable[int] = (),
    pad_to_multiple: int = 1,
) -> KeepSet:
    """Choose the closed keep-set of exactly `vocab_size` tokens (rounded up to `pad_to_multiple`).

    Base symbols, special and referenced tokens and `wanted` ids always stay. Then come tokens by descending
    frequency (ties by id), each with its closure; one whose closure would overflow is passed over for the
    next that fits. After the counted tokens, id order goes on: lower ids were merged earlier.

    Args:
        content: the parsed tokenizer.json of a BPE tokenizer.
        counts: token frequencies [V] by old id.

    Raises `RecipeError` when `vocab_size` is below what must stay or above what there is.
    """
    tokens = vocabulary(content)
    size = -(-vocab_size // pad_to_multiple) * pad_to_multiple
    named = f"prune.vocab_size = {vocab_size:,}" + (f" (padded to {size:,})" if size != vocab_size else "")
    if size > len(tokens):
        raise RecipeError(
            f"{named}: the vocabulary has only {len(tokens):,} tokens; choose at most {len(tokens):,}."
        )

    closure = BpeDerivation(content["model"]).closure
    base = base_symbols(content)
    kept = dict.fromkeys(sorted(base))
    # Each required token's closure is required with it.
    for token_id in sorted(referenced_ids(content) | {int(token_id) for token_id in wanted}):
        kept.update(dict.fromkeys(closure(token_id)))
    num_required = len(kept) - len(base)
    if len(kept) > size:
        raise RecipeError(
            f"{named}: base symbols, special and wanted tokens with their derivations need {len(kept):,}; "
            f"choose at least {len(kept):,}."
        )

    frequency = np.zeros(max(tokens.values()) + 1, dtype=np.int64)
    frequency[: len(counts)] = counts[: len(frequency)]
    ids = np.array(sorted(tokens.values()), dtype=np.int64)
    num_counted = num_closure = num_filled = 0
    # One pass is enough: at every moment a passed-over token still needs more than the room that is left,
    # and while anything is missing some token's parts are all kept, so the pass ends exactly at `size`.
    for token_id in ids[np.argsort(-frequency[ids], kind="stable")].tolist():
        if len(kept) == size:
            break
        if token_id in kept:
            continue
        missing = [part for part in closure(token_id) if part not in kept]
        if len(kept) + len(missing) > size:
            continue
        kept.update(dict.fromkeys(missing))
        seen = sum(bool(frequency[part]) for part in missing)
        num_counted += seen
        if frequency[token_id]:
            num_closure += len(missing) - seen
        else:
            num_filled += len(missing) - seen
    assert len(kept) == size, (len(kept), size)

    in_model = set(content["model"]["vocab"].values())
    new_to_old = np.array(sorted(kept, key=lambda old: (old not in in_model, old)), dtype=np.int64)
    return KeepSet(new_to_old, len(base), num_required, num_counted, num_closure, num_filled)
