"""Imports point down: cli > api > app > evaluate, train, prune > model, data > recipe, files, … > errors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "firefly"
LAYERS = [
    {"errors"},
    {"recipe", "files", "text", "console", "plots"},
    {"model", "data"},
    {"evaluate", "train", "prune"},
    {"app"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """First-level names under `firefly` that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "firefly":
            parts = node.module.split(".")[1:]
            names |= {parts[0]} if parts else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("firefly.")}
    return {name for name in names if name in LEVEL}


FILES = sorted(SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_imports_point_down(path: Path) -> None:
    place = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if place in ("__init__", "demo"):
        return
    for name in imported(path):
        assert name == place or LEVEL[name] < LEVEL[place], f"{place} must not import {name}"


def test_every_top_level_name_has_a_layer() -> None:
    places = {path.relative_to(SOURCE).parts[0].removesuffix(".py") for path in FILES} - {"__init__", "demo"}
    assert places <= set(LEVEL)


@pytest.mark.parametrize(
    "module",
    [
        "recipe",
        "data.dataset",
        "data.tokens",
        "data.loader",
        "evaluate.metrics",
        "app.verse",
        "app.runs",
        "cli",
    ],
)
def test_light_modules_load_no_torch(module: str) -> None:
    code = f"import sys, firefly.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
