"""The model's part of the proof: plain transformers opens it, every byte and every id follows.

`proof.py` runs these checks after the tokenizer's, and `logits.py` after these; the first disagreement
raises `ProofError`. Files are read again from their final bytes, with arithmetic of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import progress
from firefly.errors import ModelError, ProofError
from firefly.prune.companions import CONFIGS, is_id_field, remapped_values
from firefly.prune.opening import Opener
from firefly.prune.tokenizer import guarded, read, vocabulary
from firefly.prune.weights import BLOCK_BYTES, Tensor, blocks, read_header, shards


def failed(what: str) -> ProofError:
    """The error of a failed check."""
    error = ProofError(
        f"The proof failed, and no model was written: {what}. Please report it with this base model."
    )
    error.what = what
    return error


def prove_opening(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], texts: list[str], opener: Opener | None = None
) -> dict[str, Any]:
    """`AutoTokenizer` opens the pruned directory and reads `texts` as its tokenizer.json does.

    Some of transformers' tokenizer classes rebuild stages from code instead of tokenizer.json, hence this.
    Where one does, it must agree with what it makes of the original directory, on texts inside K.
    """
    if opener is None:
        with Opener() as opener:
            return prove_opening(base, pruned, new_to_old, texts, opener)

    def encode(directory: Path) -> tuple[int, list[list[int]]]:
        try:
            return opener.encode(directory, texts)
        except RuntimeError as error:
            raise failed(f"AutoTokenizer does not open {directory}: {error}") from error

    length, found = encode(pruned)
    with guarded("encoding the sample again"):
        plain = Tokenizer.from_file(str(pruned / "tokenizer.json"))
        plain.no_truncation()
        plain.no_padding()
        same = found == [encoding.ids for encoding in plain.encode_batch(texts)]
    if length != len(new_to_old) or not same:
        old_length, expected = encode(base)
        added_by_class = old_length - len(vocabulary(read(base / "tokenizer.json")))
        if length != len(new_to_old) + added_by_class:
            raise failed(f"AutoTokenizer finds {length} tokens, not {len(new_to_old) + added_by_class}")
        old_to_new = {int(old): new for new, old in enumerate(new_to_old)}
        for text, old_ids, new_ids in zip(texts, expected, found, strict=True):
            ids = [old_to_new.get(old, -1) for old in old_ids]
            if -1 not in ids and ids != new_ids:
                raise failed(f"AutoTokenizer reads the text {text[:200]!r} differently")
    return {"auto_tokenizer_documents": len(texts)}


def prove_configs(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> dict[str, Any]:
    """Each id in the configs names the original's token, the size is the new one, all else is as it was."""
    num_ids = 0
    for name in CONFIGS:
        if (base / name).is_file() != (pruned / name).is_file():
            raise failed(f"{name} is in one directory only")
        if (base / name).is_file():
            old, new = (json.loads((place / name).read_bytes()) for place in (base, pruned))
            num_ids += prove_config(name, old, new, new_to_old, sized=name == "config.json")
    return {"config_ids": num_ids}


def prove_config(where: str, old: Any, new: Any, new_to_old: NDArray[np.int64], sized: bool) -> int:
    """Compare two JSON objects; `sized`: this one tells the vocabulary's size. Returns how many fields hold ids."""
    num_ids, known = 0, set(new_to_old.tolist())
    if sized and isinstance(size := new.get("vocab_size"), int):
        if size != len(new_to_old):
            raise failed(f"{where}: vocab_size is {size}, not {len(new_to_old)}")
        old, new = ({key: value for key, value in one.items() if key != "vocab_size"} for one in (old, new))
    if old.keys() != new.keys():
        raise failed(f"{where} has other fields: {', '.join(sorted(old.keys() ^ new.keys()))}")
    for key, value in old.items():
        field = f"{where}: {key}"
        if is_id_field(key):
            expected = remapped_values(key, value, lambda old_id: old_id if old_id in known else None)
            restored = remapped_values(
                key, new[key], lambda new_id: int(new_to_old[new_id]) if new_id < len(new_to_old) else -1
            )
            if restored != expected:
                raise failed(f"{field} is {new[key]}, which names other tokens than {value} did")
            num_ids += 1
        elif isinstance(value, dict) and isinstance(new[key], dict):
            num_ids += prove_config(field, value, new[key], new_to_old, sized and key == "text_config")
        elif value != new[key]:
            raise failed(f"{field} is {new[key]!r}, not {value!r}")
    return num_ids


def prove_weights(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], names: frozenset[str]
) -> dict[str, Any]:
    """Kept rows of the tensors `names`, and all other tensors, equal the original's byte for byte."""
    old_files = shards(base)
    try:
        new_files = shards(pruned)
        new_headers = {path.name: read_header(path)[0] for path in new_files}
    except ModelError as error:
        raise failed(str(error)) from error
    if [path.name for path in old_files] != [path.name for path in new_files]:
        raise failed("the weight files are not those of the original")
    num_same = num_selected = 0
    with progress("prove weights", sum(path.stat().st_size for path in new_files) / 2**20, "MiB") as bar:
        for old_file, new_file in zip(old_files, new_files, strict=True):
            old_tensors, new_tensors = read_header(old_file)[0], new_headers[new_file.name]
            if odd := sorted(old_tensors.keys() ^ new_tensors.keys()):
                raise failed(f"{new_file.name} does not hold the original's tensors ({odd[0]})")
            with old_file.open("rb", buffering=0) as old, new_file.open("rb", buffering=0) as new:
                for name, tensor in new_tensors.items():
                    before = old_tensors[name]
                    selected = name in names
                    expected = before.with_rows(len(new_to_old)) if selected else before
                    if (tensor.dtype, tensor.shape) != (before.dtype, expected.shape):
                        raise failed(
                            f"{name} changes from {before.dtype} {before.shape} to {tensor.dtype} {tensor.shape}"
                        )
                    if selected:
                        compare_rows(old, new, before, tensor, new_to_old)
                    else:
                        compare_all(old, new, before, tensor)
                    num_same += not selected
                    num_selected += selected
                    bar.advance(tensor.num_bytes / 2**20)
    return {"tensors_identical": num_same, "tensors_row_selected": num_selected}


def compare_all(old: Any, new: Any, before: Tensor, after: Tensor) -> None:
    """Raise unless `after` holds the bytes of `before`."""
    pairs = zip(
        blocks(old, iter([(before.start, before.end)])),
        blocks(new, iter([(after.start, after.end)])),
        strict=True,
    )
    if not all(_same(left, right) for left, right in pairs):
        raise failed(f"the tensor {before.name} is not the original's")


def compare_rows(old: Any, new: Any, before: Tensor, after: Tensor, rows: NDArray[np.int64]) -> None:
    """Raise unless row i of `after` holds the bytes of row `rows[i]` of `before`."""
    width = before.row_bytes
    num_at_once = max(1, BLOCK_BYTES // width)
    left = memoryview(bytearray(num_at_once * width))
    right = memoryview(bytearray(num_at_once * width))
    for first in range(0, len(rows), num_at_once):
        part = rows[first : first + num_at_once].tolist()
        new.seek(after.start + first * width)
        new.readinto(right[: len(part) * width])
        for place, row in enumerate(part):
            old.seek(before.start + row * width)
            old.readinto(left[place * width : (place + 1) * width])
        size = len(part) * width
        if not _same(left[:size], right[:size]):
            wrong = int(np.flatnonzero(_array(left[:size]) != _array(right[:size]))[0]) // width
            raise failed(f"row {first + wrong} of {before.name} is not the original's row {part[wrong]}")


def _same(left: memoryview, right: memoryview) -> bool:
    """Whether two blocks hold the same bytes, compared eight at a time."""
    whole = len(left) // 8 * 8
    ends = bytes(left[whole:]), bytes(right[whole:])
    return ends[0] == ends[1] and np.array_equal(left[:whole].cast("Q"), right[:whole].cast("Q"))


def _array(block: memoryview) -> NDArray[np.uint8]:
    return np.frombuffer(block, dtype=np.uint8)
