"""Candidates: every record of every source on its way into the dataset, kept on disk between the passes.

    bodies.jsonl   one line a candidate: {"fields": …} to render, {"messages": …}, or {"text": …} when it cannot be used
    columns.bin    one `COLUMN` a candidate: what decides about it, without its text
    signatures.bin MinHash signatures of those that cleaning kept, when near repetitions are looked for

Only one block of bodies is in memory at a time, and of the columns those that a decision looks at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.errors import InputError

_ROWS_AT_ONCE = 1 << 16
_MOST_NAMES = 1 << 12  # decisions are made kind by kind
KEPT = 0  # the reason's number of a candidate that nothing speaks against
COLUMN = np.dtype(
    [
        ("key", "V16"),  # hash of the normalised content: what counts as the same text
        ("group", "u8"),  # decides the side of the split, from 0 to 2**64
        ("chance", "u8"),  # decides caps and thinning, from 0 to 2**64
        ("line", "u8"),
        ("characters", "u4"),
        ("quality", "u4"),  # of repetitions, the highest stays
        ("file", "u4"),
        ("source", "u2"),
        ("kind", "u2"),
        ("reason", "u2"),
    ]
)


class Names:
    """Names by number, in the order of their first appearance."""

    def __init__(self, *names: str) -> None:
        self.all = list(names)
        self._numbers = {name: number for number, name in enumerate(names)}

    def number(self, name: str) -> int:
        """The number of a name, a new one if it is new; raises `InputError` when there are too many to be names."""
        if name not in self._numbers:
            if len(self.all) == _MOST_NAMES:
                raise InputError(
                    f"More than {_MOST_NAMES:,} different kinds, '{name[:40]}' being one: a record's kind is the name "
                    "of its task. Name an importer that does not read the field 'kind', or mend the records."
                )
            self._numbers[name] = len(self.all)
            self.all.append(name)
        return self._numbers[name]


@dataclass(frozen=True, slots=True)
class Block:
    """Candidates that were imported together: numbers `first` … `first + count - 1`."""

    first: int
    count: int
    offset: int  # of their lines in bodies.jsonl
    num_bytes: int


@dataclass
class Spool:
    """The candidates of one build in a folder of its own; write first, then read."""

    folder: Path
    signature_size: int  # uint32 numbers
    blocks: list[Block] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self._files = {
            name: (self.folder / name).open("wb")
            for name in ("bodies.jsonl", "columns.bin", "signatures.bin")
        }
        self._num_bytes = 0
        self.num_candidates = 0

    def add(self, bodies: bytes, columns: NDArray[Any], signatures: NDArray[np.uint32] | None) -> None:
        """Append a block: its lines, columns [N] of `COLUMN`, and signatures [M, signature_size] of those kept."""
        if not len(columns):
            return
        self.blocks.append(Block(self.num_candidates, len(columns), self._num_bytes, len(bodies)))
        self._files["bodies.jsonl"].write(bodies)
        self._files["columns.bin"].write(columns.tobytes())
        if signatures is not None:
            self._files["signatures.bin"].write(signatures.tobytes())
        self.num_candidates += len(columns)
        self._num_bytes += len(bodies)

    def close(self) -> None:
        """No more is written."""
        for handle in self._files.values():
            handle.close()

    def column(self, name: str) -> NDArray[Any]:
        """One column [N] of all candidates."""
        parts = [np.zeros(0, COLUMN)[name]]
        with (self.folder / "columns.bin").open("rb") as handle:
            while len(rows := np.fromfile(handle, COLUMN, _ROWS_AT_ONCE)):
                parts.append(rows[name].copy())
        return np.concatenate(parts)

    def rows(self, block: Block) -> NDArray[Any]:
        """All columns of one block."""
        return np.fromfile(
            self.folder / "columns.bin", COLUMN, block.count, offset=block.first * COLUMN.itemsize
        )

    def signatures(self) -> NDArray[np.uint32]:
        """The signatures [M, signature_size] of the M candidates that were kept by cleaning, memory-mapped."""
        return _mapped(self.folder / "signatures.bin", np.dtype(np.uint32), self.signature_size)

    def bands(self, keys: Callable[[NDArray[np.uint32]], NDArray[np.uint64]]) -> NDArray[np.uint64]:
        """The band keys [M, B] of the signatures, memory-mapped so that one band lies together."""
        signatures = self.signatures()
        num_bands = keys(np.zeros((1, self.signature_size), np.uint32)).shape[1]
        path = self.folder / "bands.bin"
        if not len(signatures):
            return np.zeros((0, num_bands), np.uint64)
        bands = np.memmap(path, np.uint64, mode="w+", shape=(num_bands, len(signatures)))
        for start in range(0, len(signatures), _ROWS_AT_ONCE):
            span = slice(start, start + _ROWS_AT_ONCE)
            bands[:, span] = keys(signatures[span]).T
        return bands.T

    def bodies(self, block: Block) -> list[bytes]:
        """The lines of one block."""
        with (self.folder / "bodies.jsonl").open("rb") as handle:
            handle.seek(block.offset)
            return handle.read(block.num_bytes).splitlines()


def _mapped(path: Path, dtype: np.dtype[Any], width: int) -> NDArray[Any]:
    """A file of rows of `width` numbers; an empty file cannot be mapped."""
    rows = path.stat().st_size // (width * dtype.itemsize)
    if not rows:
        return np.zeros((0, width), dtype)
    return np.memmap(path, dtype, mode="r", shape=(rows, width))
