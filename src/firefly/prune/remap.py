"""`remap`: what was made with the original model, carried over to the pruned one without making it again.

A tokens directory gets the new ids here, streamed and without torch; a LoRA adapter is the matter of
`remap_adapter.py`. A sample that uses a dropped token is tokenized anew, text by text between its special
tokens, where that provably gives the same text under the same loss mask. What cannot be carried over is an
error, or is left out and listed.
"""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress
from firefly.data.stats import length_chart
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import SPLITS, Tokens
from firefly.errors import InputError, OutputError
from firefly.files import directory_atomic, exclusive_beside, sha256_file, write_json
from firefly.prune.idmap import find_id_map
from firefly.prune.remap_adapter import ADAPTER_CONFIG, remap_adapter
from firefly.prune.tokenizer import added_tokens, read, read_json

_GROUP_TOKENS = 1 << 20
_REASON = "outside_vocabulary"


@dataclass(frozen=True)
class RemapResult:
    """What was carried over to a pruned model."""

    output: str
    kind: str  # "tokens" or "adapter"
    carried: int  # samples, or tensors
    changed: int  # of these: samples tokenized anew, or tensors of which rows were selected
    dropped: list[str] = field(default_factory=list)  # what the pruned vocabulary cannot hold

    @property
    def unit(self) -> str:
        """What is counted."""
        return "samples" if self.kind == "tokens" else "tensors"


def remap(base: Path, what: Path, out: Path, pruned: Path, *, drop_outside: bool = False) -> RemapResult:
    """Carry the tokens directory or LoRA adapter `what`, made with `base`, over to the model `pruned`.

    Args:
        out: the directory to write; it must be empty or not there.
        drop_outside: leave out what the pruned vocabulary cannot hold (samples; trained tokens) and list it.

    Raises `ModelError` when the three do not belong together, `InputError` when something would be left out.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"The output {out} is not empty; choose another place or empty it.")
    with exclusive_beside(out, "firefly prune --remap"):
        if (what / "index.json").is_file():
            return _remap_tokens(base, what, out, pruned, drop_outside)
        if (what / ADAPTER_CONFIG).is_file():
            carried, changed, dropped = remap_adapter(base, what, out, pruned, drop_outside)
            return RemapResult(str(out), "adapter", carried, changed, dropped)
    raise InputError(
        f"{what} is neither a tokens directory (no index.json) nor a LoRA adapter (no {ADAPTER_CONFIG}); "
        "check the path."
    )


def _remap_tokens(base: Path, what: Path, out: Path, pruned: Path, drop_outside: bool) -> RemapResult:
    translate = _Translation(base, pruned)
    index = read_json(what / "index.json")
    dtype = np.dtype(np.uint16 if translate.pruned.highest_id < 1 << 16 else np.uint32)
    cuts: Counter[str] = Counter()
    dropped: list[str] = []
    lengths: list[NDArray[np.int64]] = []
    num_changed = 0
    with directory_atomic(out) as place:
        for path in what.iterdir():  # rejects and their like, in words
            if path.is_file() and path.name not in {"index.json", "lengths.png"}:
                shutil.copyfile(path, place / path.name)
        for split in SPLITS:
            tokens = Tokens.open(what, split, translate.original.sha256)
            keep, changed, targets = _carry_split(tokens, place / split, dtype, translate)
            num_changed += changed
            lengths.append(np.diff(np.load(place / split / "borders.npy")))
            for number in np.flatnonzero(~keep).tolist():
                kind = tokens.kind_names[tokens.kinds[number]]
                cuts[kind] += 1
                dropped.append(f"{split} {kind}, line {tokens.origins[number] + 1}")
            for path in (what / split).glob("*.npy"):
                if path.name != "borders.npy":
                    np.save(place / split / path.name, np.load(path)[keep])
            index["samples"][split] = int(keep.sum())
            index["tokens"][split] = int(lengths[-1].sum())
            index["target_tokens"][split] = targets
        if dropped and not drop_outside:
            raise InputError(
                f"{len(dropped):,} samples of {what} use tokens that {pruned} lacks and cannot be tokenized anew "
                f"exactly ({'; '.join(dropped[:3])}{'; …' if len(dropped) > 3 else ''}); add --drop-outside to leave "
                "them out, or run `firefly data` again with the pruned model."
            )
        if not index["samples"]["train"]:
            raise InputError(f"{what} leaves no training sample for {pruned}; run `firefly data` again.")
        for kind, count in cuts.items():
            index["cuts"].setdefault(kind, {})[_REASON] = count
        all_lengths = np.concatenate(lengths)
        length_chart(place / "lengths.png", all_lengths, "token")
        index |= {
            "longest_tokens": int(all_lengths.max()),
            "dtype": dtype.name,
            "tokenizer_sha256": translate.pruned.sha256,
            "remapped_from": translate.original.sha256,
            "sha256": {
                path.relative_to(place).as_posix(): sha256_file(path)
                for path in sorted(place.rglob("*"))
                if path.suffix in {".bin", ".npy"}
            },
        }
        write_json(place / "index.json", index)
    return RemapResult(str(out), "tokens", sum(index["samples"].values()), num_changed, dropped)


def _carry_split(
    tokens: Tokens, place: Path, dtype: np.dtype[Any], translate: _Translation
) -> tuple[NDArray[np.bool_], int, int]:
    """Write ids, mask and borders of one split.

    Returns which samples were carried over [N], how many of them were tokenized anew, and the number of
    learned tokens.
    """
    borders = tokens.borders
    lengths, keep = np.diff(borders), np.ones(len(tokens), bool)
    together = 2 if tokens.pairs else 1  # the two answers to one question stay or go together
    changed = targets = 0
    place.mkdir()
    with (
        (place / "tokens.bin").open("wb") as ids_file,
        (place / "mask.bin").open("wb") as mask_file,
        progress(f"remap {place.name}", len(tokens), "samples") as bar,
    ):

        def write(ids: NDArray[Any], mask: NDArray[Any]) -> None:
            nonlocal targets
            ids_file.write(ids.astype(dtype).tobytes())
            mask_file.write(mask.astype(np.uint8).tobytes())
            targets += int(mask.sum())

        for first, last in _groups(borders, together):
            start, end = int(borders[first]), int(borders[last])
            ids, mask = translate.ids(tokens.ids[start:end]), tokens.mask[start:end]
            # The last border at or before a token is where its sample begins, empty samples passed over.
            outside = np.searchsorted(borders, start + np.flatnonzero(ids < 0), side="right") - 1
            done = start
            for unit in np.unique(outside // together).tolist():
                numbers = slice(unit * together, (unit + 1) * together)
                begin, behind = int(borders[numbers.start]), int(borders[numbers.stop])
                write(ids[done - start : begin - start], mask[done - start : begin - start])
                anew = [
                    translate.anew(tokens.ids[one:end], tokens.mask[one:end])
                    for one, end in itertools.pairwise(borders[numbers.start : numbers.stop + 1].tolist())
                ]
                fitting = [again for again in anew if again and len(again[0]) <= tokens.max_seq_length]
                if len(fitting) < together:
                    keep[numbers] = False
                else:
                    for again in fitting:
                        write(*again)
                    lengths[numbers] = [len(again[0]) for again in fitting]
                    changed += len(np.intersect1d(outside, np.arange(numbers.start, numbers.stop)))
                done = behind
            write(ids[done - start :], mask[done - start :])
            bar.advance(last - first)
    np.save(place / "borders.npy", np.concatenate([[0], np.cumsum(lengths[keep])]).astype(np.int64))
    return keep, changed, targets


def _groups(borders: NDArray[np.int64], multiple: int) -> Iterator[tuple[int, int]]:
    """Ranges of samples that hold about `_GROUP_TOKENS` together, each a multiple of `multiple` samples."""
    first, num_samples = 0, len(borders) - 1
    while first < num_samples:
        last = int(np.searchsorted(borders, borders[first] + _GROUP_TOKENS, side="right")) - 1
        last = min(max(last - last % multiple, first + multiple), num_samples)
        yield first, last
        first = last


class _Translation:
    """Token ids of the original as those of the pruned model."""

    def __init__(self, base: Path, pruned: Path) -> None:
        self.original, self.pruned = ModelTokenizer.load(base), ModelTokenizer.load(pruned)
        new_to_old = find_id_map(base, pruned)
        self._beyond = int(new_to_old.max()) + 1  # stands for every higher id
        self._old_to_new = np.full(self._beyond + 1, -1, dtype=np.int64)
        self._old_to_new[new_to_old] = np.arange(len(new_to_old))
        self._special = [
            token["id"] for token in added_tokens(read(base / "tokenizer.json")) if token["special"]
        ]

    def ids(self, old: NDArray[Any]) -> NDArray[np.int64]:
        """The new id of each old one; −1: there is none."""
        new: NDArray[np.int64] = self._old_to_new[np.minimum(old, self._beyond)]
        return new

    def anew(self, ids: NDArray[Any], mask: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]] | None:
        """A sample [L] whose texts with dropped tokens are tokenized by the pruned model; None if that is not exact.

        Special tokens and the loss mask's borders stay where they are; between them stand texts, each
        encoded by itself. A stretch that the original would not cut as it is cut here is not a whole text.
        """
        special = np.isin(ids, self._special)
        border = special[1:] | special[:-1] | (mask[1:] != mask[:-1])
        places = [0, *(np.flatnonzero(border) + 1).tolist(), len(ids)]
        new_ids: list[NDArray[np.int64]] = []
        new_mask: list[NDArray[Any]] = []
        for start, end in itertools.pairwise(places):
            part = self.ids(ids[start:end])
            if (part < 0).any():
                old = ids[start:end].tolist()
                text = self.original.rust.decode(old, skip_special_tokens=False)
                if special[start] or self.original.encode(text) != old:
                    return None
                new = self.pruned.encode(text)
                if self.pruned.rust.decode(new, skip_special_tokens=False) != text:
                    return None
                part = np.array(new, dtype=np.int64)
            new_ids.append(part)
            new_mask.append(np.full(len(part), mask[start]))
        return np.concatenate(new_ids), np.concatenate(new_mask)
