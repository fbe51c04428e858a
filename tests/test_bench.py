"""The GPU benchmark runs from end to end at tiny size, without a GPU."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import train_gpu

CPU = torch.device("cpu")


def test_the_ladder_runs_and_gives_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    without_compiler = [(name, options | {"compile": False}) for name, options in train_gpu.LADDER]
    monkeypatch.setattr(train_gpu, "LADDER", without_compiler[2:5])
    found = train_gpu.ladder("tiny", CPU, 1, time.monotonic(), 1e12)
    assert [row["way"] for row in found] == ["padded, eager", *(name for name, _ in without_compiler[2:5])]
    assert set(train_gpu.ratios(found)) == {
        f"tiny_{name}" for name in ("vs_padded", "mfu", "leanest_gb", "leanest_vs_fastest")
    }


def test_correctness_comes_first() -> None:
    """bf16 is judged by the padded bf16 way's own error against float32."""
    errors = train_gpu.check(CPU)
    assert errors["float32_gradient_error"] < 1e-5
    assert errors["bf16_gradient_error"] <= 1.1 * errors["padded_bf16_gradient_error"]
