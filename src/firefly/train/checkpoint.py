"""Checkpoints: all or nothing, hashed, and enough to go on bit for bit.

    checkpoint-N/model.safetensors      weights in float32, by transformers' names
    checkpoint-N/optimizer.safetensors  AdamW's moments and step counts, by the same names
    checkpoint-N/state.json             step, random state, the open metrics window, what data it belongs to
    checkpoint-N/manifest.json          SHA-256 of the three files above

A checkpoint is built under a temporary name, fsynced, hashed and renamed; only then is an older one removed.
"""

from __future__ import annotations

import base64
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firefly.errors import CheckpointError
from firefly.files import directory_atomic, require_disk, sha256_file, write_json

_FILES = ("model.safetensors", "optimizer.safetensors", "state.json")


@dataclass
class TrainState:
    """Everything besides tensors that the next step depends on."""

    step: int = 0
    fingerprint: str = ""
    window: dict[str, Any] = field(default_factory=dict)
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    num_threads: int = 0


def find_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run directory, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(
    run: Path, names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: TrainState, keep: int
) -> Path:
    """Write checkpoint-`state.step`, then remove all but the newest `keep`."""
    target = run / f"checkpoint-{state.step}"
    moments = _optimizer_tensors(names, optimizer)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in names.items()}
    require_disk(
        run, sum(t.numel() * t.element_size() for t in [*weights.values(), *moments.values()]) + (1 << 20)
    )
    with directory_atomic(target) as place:
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        save_file(moments, place / "optimizer.safetensors")
        random = {"cpu": _text(torch.get_rng_state())}
        if torch.cuda.is_available():
            random["cuda"] = _text(torch.cuda.get_rng_state())
        write_json(place / "state.json", asdict(state) | {"random": random})
        write_json(place / "manifest.json", {name: sha256_file(place / name) for name in _FILES})
    for old in find_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer, fingerprint: str
) -> TrainState:
    """Put weights, moments and random state back in place; returns the rest.

    Raises `CheckpointError` when a file is damaged, or when the checkpoint belongs to another recipe or data.
    """
    verify(path)
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    random = stored.pop("random")
    try:
        state = TrainState(**stored)
    except TypeError as error:
        raise CheckpointError(
            f"{path} was written by another version of Firefly; choose another output_dir."
        ) from error
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run with another recipe, base model or data, so going on would mix the two; "
            "choose another output_dir, undo the change, or delete the checkpoints of that run."
        )
    weights = load_file(path / "model.safetensors")
    if set(weights) != set(names):
        raise CheckpointError(f"{path} holds the weights of another model; choose another output_dir.")
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(weights[name])
    _restore_optimizer(load_file(path / "optimizer.safetensors"), names, optimizer)
    torch.set_rng_state(_tensor(random["cpu"]))
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(random["cuda"]))
    return state


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest; raises `CheckpointError` naming the damaged one."""
    others = [other.name for other in find_checkpoints(path.parent) if other != path]
    cure = f"delete {path} and run again to go on from {others[-1] if others else 'the start'}."
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        digests = {name: manifest[name] for name in _FILES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} has no readable manifest.json, so it cannot be trusted; {cure}"
        ) from error
    for name, digest in digests.items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise CheckpointError(
                f"{path / name} is damaged (its SHA-256 differs from the manifest's); {cure}"
            )


def _optimizer_tensors(names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, parameter in names.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _restore_optimizer(
    tensors: dict[str, Tensor], names: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    for name, values in by_parameter.items():
        parameter = names[name]
        # AdamW's fused kernel wants its step count beside the weights; the moments go there too.
        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in values.items()}


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
