"""Row selection from safetensors to safetensors: the vocabulary's tensors get fewer rows, all else is copied.

Which tensors carry the vocabulary is asked from the architecture itself, built on the meta device with the
old and with the new configuration: a tensor whose shape differs is one. Data streams in blocks of a few
MiB, so memory is a block and never a model; untouched tensors keep every byte.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from firefly.console import progress
from firefly.errors import ModelError
from firefly.files import write_json
from firefly.prune.tokenizer import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BLOCK_BYTES = 8 << 20
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Tensor:
    """One tensor's entry in a safetensors header; `start` and `end` count from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one index of the first dimension)."""
        return (self.end - self.start) // self.shape[0]


@dataclass(frozen=True)
class VocabularyLayout:
    """Which tensors of an architecture have one row a token."""

    names: frozenset[str]  # in the checkpoint's spelling
    params_before: int  # tied matrices counted once
    params_after: int


def read_header(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name in file order, and the metadata, of a safetensors file; raises `ModelError`.

    The safetensors library validates the header (lengths, offsets, overlaps, shapes) before it is read here.
    """
    try:
        with safe_open(str(path), framework="np"):
            pass
        with path.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            header = json.loads(handle.read(length))
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise ModelError(f"{path} is not a sound safetensors file ({error}); fetch it again.") from error
    metadata = header.pop("__metadata__", None) or {}
    origin = 8 + length
    tensors = [
        Tensor(
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            origin + entry["data_offsets"][0],
            origin + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    ]
    return {
        tensor.name: tensor for tensor in sorted(tensors, key=lambda item: (item.start, item.end))
    }, metadata


def shards(base: Path) -> list[Path]:
    """The weight files of a model directory; raises `ModelError` if there are none that are safe to read."""
    if (base / INDEX).is_file():
        weight_map = read_json(base / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{base / INDEX} has no weight_map; fetch it again.")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            # Loaders open whatever stands here; '../x' or '/x' would reach outside the directory.
            if Path(name).name != name or "\\" in name or name in {"", ".", ".."}:
                raise ModelError(
                    f"{base / INDEX} points to '{name}', outside its directory; fetch the model again."
                )
            if not (base / name).is_file():
                raise ModelError(f"{base} lacks the weight file {name} that its index names; fetch it again.")
        found = [base / name for name in names]
        where = {name: path.name for path in found for name in read_header(path)[0]}
        if missing := sorted(name for name, file in weight_map.items() if where.get(name) != file):
            raise ModelError(
                f"{base / INDEX} says that {missing[0]} is in {weight_map[missing[0]]}; it is not there."
            )
        return found
    if (base / SINGLE).is_file():
        return [base / SINGLE]
    if list(base.glob("*.bin")) or list(base.glob("*.pt")):
        raise ModelError(
            f"{base} has weights as pickles alone, which firefly does not open; convert them to safetensors with "
            f"transformers: AutoModelForCausalLM.from_pretrained('{base}').save_pretrained('{base}')."
        )
    raise ModelError(f"{base} has no weights; it needs {SINGLE}, or shards with {INDEX}.")


def vocabulary_layout(base: Path, pruned: Path, files: list[Path]) -> VocabularyLayout:
    """Find the tensors with vocabulary rows from the configurations in `base` and `pruned`.

    Raises `ModelError` for an unknown architecture, and when anything but the input embeddings, the output
    embeddings and the output bias depends on the vocabulary: better no model than one pruned by half.
    """
    before, after = meta_model(base), meta_model(pruned)
    old_shapes = {name: tuple(tensor.shape) for name, tensor in before.state_dict().items()}
    new_shapes = {name: tuple(tensor.shape) for name, tensor in after.state_dict().items()}
    changed = {name for name in old_shapes if old_shapes[name] != new_shapes.get(name)}
    inputs, outputs = before.get_input_embeddings(), before.get_output_embeddings()
    if outputs is None:
        raise ModelError(
            f"{base}: {type(before).__name__} has no output embeddings; prune a causal language model."
        )
    known = [inputs.weight, outputs.weight, getattr(outputs, "bias", None)]
    state = before.state_dict(keep_vars=True)
    expected = {
        name for name, tensor in state.items() if any(tensor is one for one in known if one is not None)
    }
    if changed and (strange := sorted(changed ^ expected)):  # nothing changes when every row is kept
        raise ModelError(
            f"{base}: the tensor {strange[0]} of {type(before).__name__} does not follow the vocabulary as embeddings "
            "do; pruning this architecture is not supported."
        )
    rows = int(inputs.weight.shape[0])

    names: set[str] = set()
    seen: set[str] = set()
    for path in files:
        for tensor in read_header(path)[0].values():
            name = _model_name(tensor.name, old_shapes, before.base_model_prefix)
            if name in expected:
                if tensor.shape != old_shapes[name]:
                    raise ModelError(
                        f"{path}: {tensor.name} has the shape {list(tensor.shape)}, and config.json asks for "
                        f"{list(old_shapes[name])}; the two do not belong together."
                    )
                names.add(tensor.name)
                seen.add(name)
            elif name not in old_shapes and rows in tensor.shape:
                raise ModelError(
                    f"{path}: {tensor.name} has the vocabulary's size ({rows:,}) in its shape {list(tensor.shape)} and "
                    f"is unknown to {type(before).__name__}; pruning would leave it behind, so nothing was done."
                )
    # One file entry is enough for a tied matrix, under either of its names.
    if lacking := sorted(name for name in expected if all(state[name] is not state[one] for one in seen)):
        raise ModelError(f"{base} has no weights for {lacking[0]}; fetch the model again.")
    params_before, params_after = (sum(p.numel() for p in model.parameters()) for model in (before, after))
    return VocabularyLayout(frozenset(names), params_before, params_after)


def meta_model(directory: Path) -> Any:
    """The causal language model that config.json describes, without memory behind its tensors."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    read_json(directory / "config.json")
    try:
        with quiet_transformers(), torch.device("meta"):
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, AssertionError) as error:
        raise ModelError(
            f"{directory / 'config.json'} does not describe a causal language model that transformers knows: {error}"
        ) from error


def _model_name(name: str, names: dict[str, Any], prefix: str) -> str:
    """A checkpoint's tensor name as the model spells it; checkpoints may lack or have the base-model prefix."""
    for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
        if candidate in names:
            return candidate
    return name


def select_rows(
    files: list[Path], out: Path, vocabulary: frozenset[str], new_to_old: NDArray[np.int64]
) -> None:
    """Write each weight file again under its name in `out`: rows `new_to_old` of the tensors in `vocabulary`.

    Shards stay shards (with a new index), dtype, tensor order and metadata stay, other tensors are copied
    byte for byte. Memory: `BLOCK_BYTES` and one file header.
    """
    weight_map: dict[str, str] = {}
    total_bytes = total_params = 0
    with progress("write weights", sum(path.stat().st_size for path in files) / 2**20, "MiB") as bar:
        for path in files:
            tensors, metadata = read_header(path)
            header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
            offset = 0
            for tensor in tensors.values():
                new = tensor
                if tensor.name in vocabulary:
                    new = replace(tensor, shape=(len(new_to_old), *tensor.shape[1:]))
                num_bytes = (
                    tensor.row_bytes * len(new_to_old) if new is not tensor else tensor.end - tensor.start
                )
                header[tensor.name] = {
                    "dtype": tensor.dtype,
                    "shape": list(new.shape),
                    "data_offsets": [offset, offset + num_bytes],
                }
                offset += num_bytes
                weight_map[tensor.name] = path.name
                total_params += int(np.prod(new.shape, dtype=np.int64))
            total_bytes += offset
            text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
            text += b" " * (-len(text) % _HEADER_ALIGNMENT)
            with path.open("rb", buffering=0) as reader, (out / path.name).open("wb") as writer:
                writer.write(struct.pack("<Q", len(text)) + text)
                for tensor in tensors.values():
                    ranges = [(tensor.start, tensor.end)]
                    if tensor.name in vocabulary:
                        ranges = list(_row_ranges(tensor, new_to_old))
                    for start, end in ranges:
                        for block in read_range(reader, start, end):
                            writer.write(block)
                    bar.advance((tensor.end - tensor.start) / 2**20)
    if len(files) > 1 or files[0].name != SINGLE:
        old = read_json(files[0].parent / INDEX)
        totals = {"total_size": total_bytes, "total_parameters": total_params}
        kept = {key: totals.get(key, value) for key, value in (old.get("metadata") or {}).items()}
        write_json(out / INDEX, {"metadata": kept, "weight_map": dict(sorted(weight_map.items()))})


def _row_ranges(tensor: Tensor, rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Byte ranges of the rows, neighbouring rows joined."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        if len(run):
            yield (
                tensor.start + int(run[0]) * tensor.row_bytes,
                tensor.start + (int(run[-1]) + 1) * tensor.row_bytes,
            )


def read_range(reader: BinaryIO | Any, start: int, end: int) -> Iterator[bytes]:
    """The bytes [start, end) of an open file, in blocks."""
    reader.seek(start)
    while start < end:
        block = reader.read(min(BLOCK_BYTES, end - start))
        if not block:
            raise ModelError(f"{reader.name} ends before its header says; fetch it again.")
        start += len(block)
        yield block


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and remarks off the screen while the block runs."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    restore: Callable[[], None] = logging.enable_progress_bar if bars else logging.disable_progress_bar
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        restore()
