"""Reading and writing model directories: plain Hugging Face layout in, plain Hugging Face layout out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from firefly.errors import ModelError
from firefly.files import directory_atomic, require_disk, write_json
from firefly.model.families import CausalModel, HubModel, build, transformers_model
from firefly.model.shards import weight_files
from firefly.model.split import part_of

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
"""Files that travel unchanged from a model directory to the next."""

_SHARD_BYTES = 5 << 30


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory; raises `ModelError` when it is missing or not JSON."""
    path = directory / "config.json"
    if not path.is_file():
        raise ModelError(f"{directory} has no config.json, so it is not a model directory; check the path.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} does not hold a JSON object; fetch it again.")
    return config


def check_model(directory: Path) -> None:
    """Find out before any long work what would stop training: config, family, tokenizer, weight files' headers.

    Raises `ModelError`.
    """
    config = read_config(directory)
    with torch.device("meta"):
        build(config)
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"{directory} has no tokenizer.json; save the model with a fast tokenizer.")
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged ({error}); fetch the model again.") from error


def load_model(
    directory: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> CausalModel:
    """Load a model directory for packed training or scoring.

    Raises `ModelError` for a missing or damaged file, an unsupported family, or weights that do not fit.
    """
    config = read_config(directory)
    files = weight_files(directory)
    with torch.device("meta"):
        model = build(config)
    return fill(model, files, config, torch.device(device), dtype)


def fill(
    model: CausalModel, files: list[Path], config: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> CausalModel:
    """Give a meta-device model its weights from safetensors files, and its buffers their values."""
    inner = transformers_model(model)
    expected = inner.state_dict()
    found = {name: stored[:].to(dtype) for name, stored in _stored(files, expected, device)}
    if config.get("tie_word_embeddings", True) and "lm_head.weight" in expected:
        found.setdefault("lm_head.weight", found.get("model.embed_tokens.weight", torch.empty(0)))
    _require_all(expected, set(found), files)
    inner.load_state_dict(found, assign=True)
    if isinstance(model, HubModel):
        model.inner.tie_weights()
    restore_buffers(model, config, device)
    for parameter in inner.parameters():
        parameter.requires_grad_(True)
    return model


@torch.no_grad()
def fill_parts(model: CausalModel, files: list[Path]) -> None:
    """Read this rank's parts of the weights from safetensors files, and no more, into a model that is laid out.

    Adapters, which no file has, are left as they are.
    """
    if isinstance(model, HubModel):
        model.inner.tie_weights()
    expected = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in transformers_model(model).named_parameters()
        if ".lora_" not in name
    }
    found = set()
    for name, stored in _stored(files, expected):
        found.add(name)
        parameter = expected[name]
        if not isinstance(parameter, DTensor):
            parameter.copy_(stored[:])
        elif (part := parameter.to_local()).numel():
            part.copy_(stored[part_of(parameter)])
    _require_all(expected, found, files)


def _stored(
    files: list[Path], expected: Mapping[str, Tensor], device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Any]]:
    """The tensors of some files that are `expected`, by the model's names; read only where they are indexed."""
    for path in files:
        try:
            with safe_open(path, framework="pt", device=str(device)) as weights:
                for raw in weights.keys():  # noqa: SIM118 - safe_open is not a dict
                    name = _full_name(raw, expected)
                    if name is None:
                        continue
                    stored = weights.get_slice(raw)
                    if tuple(stored.get_shape()) != expected[name].shape:
                        raise ModelError(
                            f"{path.parent}: {name} has the shape {tuple(stored.get_shape())}, config.json asks for "
                            f"{tuple(expected[name].shape)}; config.json and weights are not of one model."
                        )
                    yield name, stored
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged ({error}); fetch the model again.") from error


def _require_all(expected: Mapping[str, Tensor], found: set[str], files: list[Path]) -> None:
    if missing := sorted(set(expected) - found):
        raise ModelError(
            f"{files[0].parent} lacks the tensor {missing[0]} ({len(missing)} in all); fetch it again."
        )


def _full_name(name: str, expected: Mapping[str, Tensor]) -> str | None:
    """The model's name of a checkpoint tensor; hub files often leave the base model's prefix out."""
    for prefix in ("", "transformer.", "model."):
        if prefix + name in expected:
            return prefix + name
    return None


def restore_buffers(model: CausalModel, config: dict[str, Any], device: torch.device) -> None:
    """Buffers that are no weights (slopes, rotary frequencies) were made on the meta device: make them again."""
    if not any(buffer.is_meta for buffer in model.buffers()):
        return
    kinds = (
        sorted(set(getattr(model.inner.config, "layer_types", None) or []))
        if isinstance(model, HubModel)
        else []
    )
    depth = max(1, len(kinds))  # Gemma 3 has frequencies for each kind of layer
    small = dict(config) | {"vocab_size": 1, "pad_token_id": None, "n_layer": 1, "num_hidden_layers": depth}
    if small.pop("layer_types", None) or kinds:
        small["layer_types"] = kinds
    fresh = dict(build(small).named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            owner_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner_name), leaf, fresh[name].to(device))


def num_parameters(model: CausalModel) -> int:
    """Parameters of a model, a tied matrix counted once."""
    return sum({id(p): num_weights(p) for p in model.parameters()}.values())


def num_weights(parameter: Tensor) -> int:
    """Weights that a parameter holds: of 4 bits there are two in a byte."""
    return parameter.numel() * (1 if parameter.is_floating_point() else 2)


def state_to_save(model: CausalModel) -> dict[str, Tensor]:
    """Tensors by transformers' names; a tied head is left out."""
    seen: set[int] = set()
    state = {}
    for name, parameter in transformers_model(model).named_parameters():
        if id(parameter) not in seen:
            seen.add(id(parameter))
            state[name] = parameter.detach()
    return state


def save_model(
    state: Mapping[str, Tensor],
    base: Path,
    out: Path,
    chat_template: str | None,
    dtype: torch.dtype,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a model directory that plain transformers opens, atomically; an answer ends at any of `stop_ids`.

    `state` are the weights by transformers' names (`state_to_save`), converted one file at a time. config.json and
    tokenizer come from `base`; the chat template is the one the model was trained with, or for None what the base says.
    """
    require_disk(out, sum(tensor.numel() for tensor in state.values()) * dtype.itemsize * 21 // 20)
    with directory_atomic(out) as place:
        shards: list[dict[str, Tensor]] = [{}]
        size = 0
        for name, tensor in state.items():
            num_bytes = tensor.numel() * dtype.itemsize
            if size and size + num_bytes > _SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = tensor
            size += num_bytes
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
            weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(tensor.numel() for tensor in state.values()) * dtype.itemsize
            write_json(
                place / "model.safetensors.index.json",
                {"metadata": {"total_size": total}, "weight_map": weight_map},
            )
        for file, shard in zip(names, shards, strict=True):
            # No name for what is converted, which would keep it while the next file's is made.
            save_file(
                {key: tensor.to("cpu", dtype).contiguous() for key, tensor in shard.items()},
                place / file,
                metadata={"format": "pt"},
            )
            (place / file).chmod(0o644)  # safetensors makes it readable for the owner alone
        config = read_config(base)
        config.pop("dtype", None)
        write_json(place / "config.json", config | {"torch_dtype": str(dtype).removeprefix("torch.")})
        for name in COMPANIONS:
            if (base / name).is_file():
                shutil.copyfile(base / name, place / name)
        if chat_template is not None:
            (place / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
            _drop_template(place / "tokenizer_config.json")
        _add_stop_ids(place / "generation_config.json", stop_ids)


def _drop_template(path: Path) -> None:
    """The base's chat template must not stand beside the one that the model was trained with."""
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
        if settings.pop("chat_template", None) is not None:
            write_json(path, settings)


def _add_stop_ids(path: Path, stop_ids: Sequence[int]) -> None:
    """Put `stop_ids` before the end-of-text tokens that a generation_config.json names already."""
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = settings.get("eos_token_id")
    before = named if isinstance(named, list) else [named]
    wanted = [number for number in dict.fromkeys([*stop_ids, *before]) if number is not None]
    if stop_ids and wanted != before:
        write_json(path, settings | {"eos_token_id": wanted if len(wanted) > 1 else wanted[0]})


def stored_dtype(directory: Path) -> torch.dtype:
    """The dtype of a model directory's first weight."""
    with safe_open(weight_files(directory)[0], framework="pt") as weights:
        first = next(iter(weights.keys()))
        return weights.get_tensor(first).dtype  # type: ignore[no-any-return]
