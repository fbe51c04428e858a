"""Checkpoints: all or nothing, hashed, and enough to go on bit for bit.

    checkpoint-N/model.safetensors      weights in float32, by transformers' names
    checkpoint-N/optimizer.safetensors  AdamW's moments and step counts, by the same names
    checkpoint-N/state.json             step, random state, the open metrics window, what data it belongs to
    checkpoint-N/manifest.json          SHA-256 of the three files above, and of itself

A checkpoint is built under a temporary name, fsynced, hashed and renamed; only then is an older one removed. One
that was damaged since is found by its hashes and set aside, and the run goes on from the one before.
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
from torch import Tensor

from firefly.console import warn
from firefly.errors import CheckpointError
from firefly.files import (
    directory_atomic,
    require_disk,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
    writing_to,
)
from firefly.train.parallel import Parts

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


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint that is what was written, or None where there is no checkpoint.

    Damaged ones that are newer get `.damaged` behind their name, with a word. Raises `CheckpointError` when none
    is sound, and then touches nothing: starting anew must be the user's choice.
    """
    found = find_checkpoints(run)
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"{bad.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            with writing_to(aside):
                bad.rename(aside)
            warn(f"{reason} It is set aside as {aside.name}; going on from {path.name}.")
        return path
    if damaged:
        raise CheckpointError(
            f"{damaged[0][1]} No older checkpoint is sound; delete {run} to begin again from the start."
        )
    return None


def save_checkpoint(
    run: Path, parts: Parts, optimizer: torch.optim.Optimizer, state: TrainState, keep: int
) -> Path:
    """Write checkpoint-`state.step`, then remove all but the newest `keep`."""
    target = run / f"checkpoint-{state.step}"
    moments = _optimizer_tensors(parts, optimizer)
    weights = {
        name: parts.gather(name, part.detach()).cpu().contiguous() for name, part in parts.local.items()
    }
    if not parts.ranks.main:
        return target
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
        write_atomic(place / "manifest.json", _manifest({name: sha256_file(place / name) for name in _FILES}))
    for old in find_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(
    path: Path, parts: Parts, optimizer: torch.optim.Optimizer, fingerprint: str
) -> TrainState:
    """Put weights, moments and random state back in place; returns the rest.

    Raises `CheckpointError` when the checkpoint belongs to another recipe or data. It must be sound (`verify`).
    """
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
    if set(weights) != set(parts.local):
        raise CheckpointError(f"{path} holds the weights of another model; choose another output_dir.")
    for name, values in weights.items():
        parts.put(name, parts.cut(name, values))
    _restore_optimizer(load_file(path / "optimizer.safetensors"), parts, optimizer)
    torch.set_rng_state(_tensor(random["cpu"]))
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(random["cuda"]))
    return state


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest; raises `CheckpointError` naming the damaged one."""
    try:
        text = (path / "manifest.json").read_bytes()
        manifest = json.loads(text)
        digests = {name: manifest[name] for name in _FILES}
        whole = text == _manifest(digests).encode()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is missing or damaged.") from error
    if not whole:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged.")
    for name, digest in digests.items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged (its SHA-256 differs from the manifest's).")


def _manifest(digests: dict[str, str]) -> str:
    """The manifest's text; it has a checksum of its own, so that damage to it is not taken for another file's."""
    return json.dumps(digests | {"manifest": sha256_json(digests)}, indent=2) + "\n"


def _optimizer_tensors(parts: Parts, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": parts.gather(name, value.detach()).cpu().contiguous()
        for name, part in parts.local.items()
        for key, value in optimizer.state.get(part, {}).items()
    }


def _restore_optimizer(tensors: dict[str, Tensor], parts: Parts, optimizer: torch.optim.Optimizer) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    for name, values in by_parameter.items():
        part = parts.local[name]
        # AdamW's fused kernel wants its step count beside the weights; the moments go there too.
        optimizer.state[part] = {key: parts.cut(name, value).to(part.device) for key, value in values.items()}


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
