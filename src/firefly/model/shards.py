"""The weight files of a model directory: safetensors alone, and none outside it. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firefly.errors import ModelError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory.

    Raises `ModelError` when there are none, when the index is damaged, names a file that is not there or one
    outside the directory; for a .bin checkpoint it says how to convert it.
    """
    index = directory / INDEX
    if index.is_file():
        names = sorted(set(read_weight_map(index).values()))
        for name in names:
            # Loaders open whatever stands here; '../x' or '/x' would reach outside the directory.
            if Path(name).name != name or "\\" in name or name in {"", ".", ".."}:
                raise ModelError(f"{index} points to '{name}', outside its directory; fetch the model again.")
            if not (directory / name).is_file():
                raise ModelError(
                    f"{directory} lacks the weight file {name} that its index names; fetch it again."
                )
        return [directory / name for name in names]
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise ModelError(
            f"{directory} has weights as pickles alone, which Firefly does not open; convert them to safetensors with "
            f"AutoModelForCausalLM.from_pretrained('{directory}').save_pretrained('{directory}')."
        )
    raise ModelError(f"{directory} has no weights ({SINGLE}); check the path, or fetch the model again.")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name → file name, as an index says; raises `ModelError` for a damaged one."""
    try:
        content = json.loads(index.read_bytes(), object_pairs_hook=unique_members)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not a sound index ({error}); fetch it again.") from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map; fetch it again.")
    return {name: str(file) for name, file in weight_map.items()}


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object's members, for `json.loads`; readers differ in which of two equal names they believe."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' stands there twice")
    return result
