"""A LoRA adapter of the original model made one of the pruned model: the rows of dropped tokens leave it.

Most adapters hold nothing that follows the vocabulary and are copied byte for byte. Saved embeddings and
heads, low-rank factors on them, and single trained tokens get the kept rows in the new order.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import say
from firefly.errors import InputError, ModelError
from firefly.files import directory_atomic, write_json
from firefly.prune.idmap import find_id_map
from firefly.prune.layout import inspect_architecture
from firefly.prune.tokenizer import Json, read, read_json, vocabulary
from firefly.prune.weights import Tensor, blocks, byte_ranges, read_header

ADAPTER_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TRAINED = re.compile(r"(token_adapter\.)?trainable_tokens_delta")
# What peft keeps of an embedding or a head, by the end of its name → the axis with one entry a token, if any.
_TOKEN_AXIS: dict[str, int | None] = {
    "weight": 0,  # saved whole: modules_to_save, save_embedding_layers
    "bias": 0,
    "base_layer.weight": 0,
    "base_layer.bias": 0,
    "lora_embedding_A": 1,  # [rank, V]
    "lora_embedding_B": None,  # [hidden, rank]
    "lora_A.weight": None,  # [rank, hidden]
    "lora_B.weight": 0,  # [V, rank]
    "lora_B.bias": 0,
    "lora_magnitude_vector": 0,  # DoRA on a head: the norm of each row
}


@dataclass(frozen=True)
class _Part:
    """A tensor of the new file, and where its bytes come from."""

    tensor: Tensor  # its new shape
    tables: list[Tensor]  # of the old file, one after the other
    rows: NDArray[np.int64] | None  # which rows of each table; None: all


def remap_adapter(
    base: Path, what: Path, out: Path, pruned: Path, drop_outside: bool
) -> tuple[int, int, list[str]]:
    """Write the peft LoRA adapter `what` of the model `base` to `out`, for the model `pruned`.

    Returns the number of tensors, how many of them were cut, and the trained tokens that the pruned model lacks.
    Raises `ModelError` for what cannot be carried over exactly, `InputError` for such tokens without
    `drop_outside`.
    """
    config = read_json(what / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{what} is a {config.get('peft_type')} adapter; --remap carries LoRA adapters.")
    if not (what / _WEIGHTS).is_file():
        raise ModelError(f"{what} has no {_WEIGHTS}; save the adapter again with peft, as safetensors.")
    new_to_old = find_id_map(base, pruned)
    old_to_new = {int(old): new for new, old in enumerate(new_to_old)}
    model = inspect_architecture(base)
    modules = {name.rpartition(".")[0] for name in model.vocabulary}
    tensors, metadata = read_header(what / _WEIGHTS)

    lost = sorted({token for token in _trained_tokens(config) if token not in old_to_new})
    names = {token_id: token for token, token_id in vocabulary(read(base / "tokenizer.json")).items()}
    dropped = [f"token {token} {names.get(token)!r}" for token in lost]
    if dropped and not drop_outside:
        raise InputError(
            f"{what} trains {len(dropped):,} tokens that {pruned} lacks ({', '.join(dropped[:3])}); add --drop-outside "
            "to leave them out, or prune the model again with a --keep-file that names them."
        )
    if outside := set(config.get("alora_invocation_tokens") or []) - set(old_to_new):
        raise ModelError(
            f"{what} is switched on by the token {names.get(min(outside))!r}, which {pruned} lacks; prune the model "
            "again with a --keep-file that names it."
        )
    parts: list[_Part] = []
    for tensor in tensors.values():
        module, end = _module(tensor.name, modules)
        rows: NDArray[np.int64] | None = None
        axis: int | None = None
        if module and _TRAINED.fullmatch(end):
            trained = _trained_tokens(config, module)
            axis, rows = 0, np.flatnonzero([token in old_to_new for token in trained])
            _require_size(what, tensor, axis, len(trained))
            if not len(rows):
                continue
        elif module and end in _TOKEN_AXIS:
            axis = _TOKEN_AXIS[end]
            if end == "lora_magnitude_vector" and f"{_PREFIX}{module}.lora_embedding_A" in tensors:
                raise ModelError(
                    f"{what} uses DoRA on {module}, whose norms run over the whole vocabulary; with fewer tokens they "
                    "would be others, so it cannot be carried over."
                )
            if axis is not None:
                rows = new_to_old
                _require_size(what, tensor, axis, model.layout.num_rows)
        elif module or model.layout.num_rows in tensor.shape:
            raise ModelError(
                f"{what}: {tensor.name} {list(tensor.shape)} may hold something for each token, in a way that is "
                "unknown here; nothing was done."
            )
        parts.append(_part(tensor, axis, rows))
    with directory_atomic(out) as place:
        _write(what / _WEIGHTS, place / _WEIGHTS, metadata, parts)
        write_json(place / ADAPTER_CONFIG, _remapped_config(config, old_to_new, pruned))
    left = sorted(path.name for path in what.iterdir() if path.name not in {ADAPTER_CONFIG, _WEIGHTS})
    if left:
        say(f"prune: left behind, because they speak of the original model: {', '.join(left)}")
    return len(parts), sum(part.rows is not None for part in parts), dropped


def _module(name: str, modules: set[str]) -> tuple[str, str]:
    """The embedding or head that an adapter's tensor belongs to ("" if none), and the rest of its name.

    The adapter may have been trained with a class that wraps the base model otherwise, so ends are compared.
    """
    path = name.removeprefix(_PREFIX)
    for module in sorted(modules, key=len, reverse=True):
        leaf = module.rpartition(".")[2]
        found = re.fullmatch(rf"((?:.+\.)?{re.escape(leaf)})\.(.+)", path)
        if found and (f".{module}".endswith(f".{found[1]}") or f".{found[1]}".endswith(f".{module}")):
            return found[1], found[2]
    return "", path


def _trained_tokens(config: Json, module: str | None = None) -> list[int]:
    """The old ids of `trainable_token_indices`, in order: all, or those of one module."""
    trained: Any = config.get("trainable_token_indices") or []
    if isinstance(trained, dict):
        return [
            token
            for name, ids in trained.items()
            if module is None or f".{module}".endswith(f".{name}")
            for token in ids
        ]
    return list(trained)


def _require_size(what: Path, tensor: Tensor, axis: int, size: int) -> None:
    if len(tensor.shape) <= axis or tensor.shape[axis] != size:
        raise ModelError(
            f"{what}: {tensor.name} has the shape {list(tensor.shape)}, without {size:,} entries for the tokens of the "
            "base model; the adapter belongs to another model, or tokens were added to it."
        )


def _part(tensor: Tensor, axis: int | None, rows: NDArray[np.int64] | None) -> _Part:
    """The entries `rows` of one axis of a tensor, or all of it."""
    if axis is None or rows is None:
        return _Part(tensor, [tensor], None)
    num_tables = math.prod(tensor.shape[:axis])  # [rank, V] is one table of V entries for each rank
    table_bytes = tensor.num_bytes // num_tables
    tables = [
        replace(
            tensor,
            shape=(tensor.shape[axis],),
            start=tensor.start + number * table_bytes,
            end=tensor.start + (number + 1) * table_bytes,
        )
        for number in range(num_tables)
    ]
    shape = (*tensor.shape[:axis], len(rows), *tensor.shape[axis + 1 :])
    num_bytes = num_tables * len(rows) * tables[0].row_bytes
    return _Part(replace(tensor, shape=shape, end=tensor.start + num_bytes), tables, rows)


def _write(source: Path, target: Path, metadata: dict[str, str], parts: list[_Part]) -> None:
    """Stream the parts of one safetensors file into another."""
    header: Json = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for part in parts:
        end = offset + part.tensor.num_bytes
        header[part.tensor.name] = {
            "dtype": part.tensor.dtype,
            "shape": list(part.tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with source.open("rb", buffering=0) as reader, target.open("wb") as writer:
        writer.write(struct.pack("<Q", len(text)) + text)
        for part in parts:
            ranges = chain.from_iterable(byte_ranges(table, part.rows) for table in part.tables)
            for block in blocks(reader, ranges):
                writer.write(block)


def _remapped_config(config: Json, old_to_new: dict[int, int], pruned: Path) -> Json:
    """adapter_config.json for the pruned model: its name, and the new ids."""

    def kept(ids: list[int]) -> list[int]:
        return [old_to_new[token] for token in ids if token in old_to_new]

    result = {**config, "base_model_name_or_path": str(pruned)}
    trained: Any = config.get("trainable_token_indices")
    if isinstance(trained, dict):
        trained = {name: kept(ids) for name, ids in trained.items() if kept(ids)}
    elif trained is not None:
        trained = kept(trained)
    if "trainable_token_indices" in config:
        result["trainable_token_indices"] = trained or None
    if config.get("alora_invocation_tokens"):
        result["alora_invocation_tokens"] = kept(config["alora_invocation_tokens"])
    return result
