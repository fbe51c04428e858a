"""Compiled layers give the same losses, and a machine that cannot compile still trains."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from firefly.data.loader import pack
from firefly.model import compiled
from firefly.model.compiled import compile_layers
from firefly.model.families import CausalModel
from firefly.model.load import load_model
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss

CPU = torch.device("cpu")


def losses(model: CausalModel, steps: int = 4) -> list[float]:
    """The losses of a few training steps on batches of different sizes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    random, found = np.random.default_rng(0), []
    model.train()
    for step in range(steps):
        samples = [(random.integers(4, 500, n), np.ones(n, bool)) for n in (5 + step, 30, 11 * (step + 1))]
        total, each = batch_loss(model, PackedInput.of(pack(samples), CPU))
        torch.autograd.backward(total / len(each))
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(total.detach()) / len(each))
    return found


@pytest.mark.nightly  # compiles C++ for a minute
@pytest.mark.parametrize("family", ["bloom", "qwen3"])
@pytest.mark.parametrize("every", [0, 2])
def test_compiled_layers_learn_the_same(tiny: Callable[[str], Path], family: str, every: int) -> None:
    plain, fused = load_model(tiny(family)), load_model(tiny(family))
    plain.checkpoint_every = fused.checkpoint_every = every
    assert compile_layers(fused, CPU)
    assert losses(fused) == pytest.approx(losses(plain), abs=1e-4)


@pytest.mark.parametrize(
    ("family", "every"),
    [
        ("qwen3", 1),
        *(
            pytest.param(*one, marks=pytest.mark.nightly)
            for one in (("qwen3", 0), ("bloom", 0), ("bloom", 1))
        ),
    ],
)
def test_layers_are_compiled_once_recomputed_or_not(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, every: int
) -> None:
    """Whatever the batch, and all layers share what was compiled for one."""
    counter = CompileCounterWithBackend("eager")
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *what, **how: real(*what, **how, backend=counter))
    torch.compiler.reset()
    compiled._compiled.cache_clear()
    plain, fused = load_model(tiny(family)), load_model(tiny(family))
    plain.checkpoint_every = fused.checkpoint_every = every
    assert compile_layers(fused, CPU)
    first = losses(fused, 1)
    parts = counter.frame_count
    assert 1 < parts < 9  # before attention and after it, and what the compiler makes of a first layer
    assert [*first, *losses(fused)] == pytest.approx([*losses(plain, 1), *losses(plain)], abs=1e-5)
    assert counter.frame_count == parts
    compiled._compiled.cache_clear()


def test_without_a_compiler_training_goes_on(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_values: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C++ compiler\nand a long trace")

    said: list[str] = []
    monkeypatch.setattr(compiled, "_probe", broken)
    monkeypatch.setattr(compiled, "warn", said.append)
    model = load_model(tiny("bloom"))
    assert not compile_layers(model, CPU)
    assert len(said) == 1 and "\n" not in said[0] and "train.compile" in said[0]
    assert np.isfinite(losses(model, 1)).all()
