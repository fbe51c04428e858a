"""The loop's options for speed and memory: they learn what plain training learns, and resume bit for bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly import api
from firefly.errors import RecipeError
from firefly.recipe import Recipe
from tiny import recipe_table, write_pairs


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    return [row["loss"] for row in lines if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "bf16_stochastic", "optimizer": "adamw_8bit", "gradient_checkpointing": 2},
        {"weights": "bf16_kahan"},
    ],
    ids=["stochastic", "kahan"],
)
def test_compact_training_stays_near_float32_and_resumes_exactly(
    tiny: Callable[[str], Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl")

    def recipe(name: str, **train: Any) -> Recipe:
        return Recipe.from_table(
            recipe_table(tmp_path / name, tiny("bloom"), source, learning_rate=3e-3, **train)
        )

    plain, compact = recipe("plain"), recipe("compact", **options)
    api.train(plain)
    api.train(compact)
    before = losses(compact.out)
    assert before == pytest.approx(losses(plain.out), rel=0.03)
    shutil.rmtree(compact.out / "run" / "checkpoint-8")
    shutil.rmtree(compact.out / "model", ignore_errors=True)
    api.train(compact)
    assert losses(compact.out) == before


@pytest.mark.nightly  # compiles C++ for minutes
@pytest.mark.parametrize(
    ("options", "near"),
    [
        ({}, 1e-4),
        ({"gradient_checkpointing": 2, "method": "lora"}, 1e-4),
        ({"optimizer": "adamw_8bit"}, 1e-2),
    ],
    ids=["full", "lora", "8 bit"],
)
def test_compiled_or_not_the_losses_are_the_same(
    tiny: Callable[[str], Path], tmp_path: Path, options: dict[str, Any], near: float
) -> None:
    """8-bit moments are rounded with other random bits once they are compiled."""
    source = write_pairs(tmp_path / "pairs.jsonl")
    found = []
    for compiled in (False, True):
        table = recipe_table(tmp_path / str(compiled), tiny("bloom"), source, compile=compiled, **options)
        made = Recipe.from_table(table)
        api.train(made)
        found.append(losses(made.out))
    assert found[1] == pytest.approx(found[0], abs=near) and found[0][-1] < found[0][0]


def test_bf16_weights_refuse_float32_arithmetic(tmp_path: Path) -> None:
    table = recipe_table(tmp_path, tmp_path, tmp_path, weights="bf16_kahan", precision="float32")
    with pytest.raises(RecipeError, match=r"train\.weights.*'float32' where precision"):
        Recipe.from_table(table)
