"""Benchmarks at tiny size: the one of the GPU runs from end to end without one, the peers of the others are right."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "bench"))  # last: a benchmark may be called as a package is
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


def test_a_way_that_fails_costs_no_other_its_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train_gpu.make_model

    def scarce(shape: Any, device: Any, dtype: torch.dtype) -> Any:
        if dtype == torch.float32:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate much")
        return real(shape, device, dtype)

    monkeypatch.setattr(train_gpu, "make_model", scarce)
    monkeypatch.setattr(train_gpu, "FAILED", [])
    ways = [("padded, eager", None), ("wrong", {"optimizer": "none"}), ("bf16", {"weights": "bf16_kahan"})]
    monkeypatch.setitem(train_gpu.WAYS, "tiny", ways)
    found = train_gpu.ladder("tiny", CPU, 1, time.monotonic(), 1e12)
    assert [row["way"] for row in found] == ["bf16"] and train_gpu.FAILED == ["tiny: wrong"]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and "OutOfMemoryError: CUDA out of memory. Tried to allocate much" in said[0]


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


def test_the_peers_of_the_evaluation_give_the_same_answers(tiny: Callable[[str], Path]) -> None:
    """One prompt after the other and in padded batches, up to each prompt's own limit."""
    spec = importlib.util.spec_from_file_location(
        "bench_evaluate", Path(train_gpu.__file__).with_name("evaluate.py")
    )
    assert spec and spec.loader
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    place, draw = tiny("bloom"), random.Random(0)
    ids = [[draw.randrange(4, 500) for _ in range(draw.randrange(1, 30))] for _ in range(20)]
    prompts = [bench.Prompt(one, draw.randrange(1, 9)) for one in ids]
    expected = bench.firefly_answers(place)(prompts)
    assert bench.hub_answers(place, 1)(prompts) == bench.hub_answers(place, 16)(prompts) == expected
    assert len({len(answer) for answer in expected}) > 3
