"""The GPU benchmark runs from end to end at tiny size, without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import train_gpu

CPU = torch.device("cpu")


def test_the_ladder_runs_and_gives_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler = [
        (name, options and options | {"compile": False}) for name, options in train_gpu.WAYS["tiny"]
    ]
    monkeypatch.setitem(train_gpu.WAYS, "tiny", [without_compiler[place] for place in (0, 3, 5, 7)])
    found = train_gpu.ladder("tiny", CPU, 1, time.monotonic(), 1e12)
    assert [row["way"] for row in found] == [name for name, _ in train_gpu.WAYS["tiny"]]
    assert set(train_gpu.ratios(found)) == {
        f"tiny_{name}" for name in ("vs_padded", "mfu", "leanest_gb", "lean_vs_fastest")
    }


def test_the_lean_way_is_the_fastest_that_fits() -> None:
    def row(way: str, tokens_per_s: float, peak_gb: float) -> dict[str, Any]:
        return {
            "model": "bloom-1b4-zh",
            "way": way,
            "tokens_per_s": tokens_per_s,
            "mfu": 0.5,
            "peak_gb": peak_gb,
        }

    rows = [row("padded, eager", 10.0, 60.0), row("a", 80.0, 30.0), row("b", 60.0, 11.0), row("c", 40.0, 9.0)]
    assert train_gpu.ratios(rows) == {
        "bloom_1b4_zh_vs_padded": 8.0,
        "bloom_1b4_zh_mfu": 0.5,
        "bloom_1b4_zh_leanest_gb": 9.0,
        "bloom_1b4_zh_lean_vs_fastest": 0.75,
    }


def test_correctness_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 is judged by the padded bf16 way's own error against float32: all layers, in the mean of four batches."""
    monkeypatch.setattr(
        train_gpu, "CHECKED", {"vocab_size": 600, "hidden_size": 64, "n_layer": 3, "n_head": 4}
    )
    errors = train_gpu.check(CPU)
    assert errors["float32_gradient_error"] < 1e-5
    assert errors["bf16_gradient_error"] <= errors["padded_bf16_gradient_error"]
