"""The compact optimizer: plain AdamW where nothing is rounded, near it where something is, and repeatable."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from firefly.train import optim
from firefly.train.optim import CompactAdamW, round_stochastically


def group(*parameters: nn.Parameter, decay: float = 0.1) -> list[dict[str, Any]]:
    return [{"params": list(parameters), "weight_decay": decay}]


def gradients(steps: int, size: int) -> list[torch.Tensor]:
    torch.manual_seed(1)
    direction = torch.randn(size)
    return [direction * 0.3 + torch.randn(size) for _ in range(steps)]


def trained(optimizer: torch.optim.Optimizer, weight: nn.Parameter, steps: int = 60) -> torch.Tensor:
    for gradient in gradients(steps, weight.numel()):
        weight.grad = gradient.to(weight.dtype)
        optimizer.step()
    return weight.detach().float()


def weight(size: int = 700, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(size).to(dtype))


def reference(lr: float, steps: int = 60) -> torch.Tensor:
    exact = weight(dtype=torch.bfloat16)
    start = nn.Parameter(exact.detach().float())
    return trained(torch.optim.AdamW(group(start), lr=lr), start, steps)


def test_without_rounding_it_is_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "SLICE", 256)  # three slices, the last one shorter
    ours, theirs = weight(), weight()
    got = trained(CompactAdamW(group(ours), 1e-2), ours)
    torch.testing.assert_close(
        got, trained(torch.optim.AdamW(group(theirs), lr=1e-2), theirs), atol=1e-6, rtol=1e-5
    )


def test_eight_bit_moments_stay_near_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim, "SLICE", 512)
    ours, theirs = weight(), weight()
    optimizer = CompactAdamW(group(ours), 1e-2, eight_bit=True)
    moved = trained(optimizer, ours) - weight().detach()
    expected = trained(torch.optim.AdamW(group(theirs), lr=1e-2), theirs) - weight().detach()
    assert float((moved - expected).norm() / expected.norm()) < 0.1
    state = optimizer.state[ours]
    assert sum(t.numel() * t.element_size() for t in state.values()) < 2.1 * ours.numel()


def test_eight_bit_second_moments_forget() -> None:
    """A step changes v by a thousandth, the codes lie 6 % apart: rounding to nearest would never move them."""
    ours = weight(256)
    optimizer = CompactAdamW(group(ours), 0.0, eight_bit=True)
    ours.grad = torch.full((256,), 10.0)
    optimizer.step()
    before = optimizer.state[ours]["scales"][1].item() * 448.0
    ours.grad = torch.full((256,), 1e-3)
    for _ in range(400):
        optimizer.step()
    state = optimizer.state[ours]
    after = (state["exp_avg_root"].float() * state["scales"][1]).square().mean().sqrt().item()
    assert after == pytest.approx(before * 0.999**200, rel=0.1)


def test_stochastic_rounding_moves_where_rounding_to_nearest_stands_still() -> None:
    lr = 1e-5  # an update is a hundredth of the distance between bf16 numbers
    start = weight(dtype=torch.bfloat16).detach().float()
    ours, naive = weight(dtype=torch.bfloat16), weight(dtype=torch.bfloat16)
    direction = reference(lr) - start
    torch.manual_seed(0)
    moved = trained(CompactAdamW(group(ours), lr), ours) - start
    stuck = trained(torch.optim.AdamW(group(naive), lr=lr), naive) - start
    wanted = float((direction * direction.sign()).mean())
    assert float((moved * direction.sign()).mean()) == pytest.approx(wanted, rel=0.3)
    assert float((stuck * direction.sign()).mean()) < 0.3 * wanted


def test_kahan_carries_what_rounding_drops() -> None:
    ours = weight(dtype=torch.bfloat16)
    optimizer = CompactAdamW(group(ours), 1e-4, kahan=True)
    got = trained(optimizer, ours)
    whole = got + optimizer.state[ours]["compensation"].float()
    expected = reference(1e-4)
    torch.testing.assert_close(whole, expected, atol=5e-4, rtol=0)
    assert (got - expected).abs().max() > 2e-3  # the weights alone cannot say it


@pytest.mark.parametrize("eight_bit", [False, True])
def test_the_seed_decides_every_bit(eight_bit: bool) -> None:
    def run(seed: int) -> torch.Tensor:
        ours = weight(dtype=torch.bfloat16)
        optimizer = CompactAdamW(group(ours), 1e-3, eight_bit=eight_bit)
        torch.manual_seed(seed)
        made = gradients(10, 700)
        torch.manual_seed(seed)
        for gradient in made:
            ours.grad = gradient.bfloat16()
            optimizer.step()
        return ours.detach()

    assert torch.equal(run(3), run(3))
    assert not torch.equal(run(3), run(4))


@pytest.mark.nightly  # compiles C++ for a minute
@pytest.mark.parametrize(
    "options", [{}, {"eight_bit": True}, {"kahan": True}], ids=["plain", "8 bit", "kahan"]
)
def test_compiled_it_is_the_same_optimizer(monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]) -> None:
    """Parameters of several lengths, also beyond one slice, are compiled for a handful of times."""
    monkeypatch.setattr(optim, "SLICE", 256)
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    dtype = torch.bfloat16 if options.get("kahan") else torch.float32
    found = []
    for compiled in (False, True):
        ours = [weight(size, dtype) for size in (2600, 700, 256, 40, 1300, 3000)]
        optimizer = CompactAdamW(group(*ours), 1e-2, compiled=compiled, **options)
        moved = [trained(optimizer, one, 12) - weight(one.numel(), dtype).detach().float() for one in ours]
        found.append(torch.cat(moved))
    near = 0.15 if options.get("eight_bit") else 1e-2 if options else 1e-5  # rounding draws other random bits
    assert float((found[0] - found[1]).norm() / found[0].norm()) < near
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] < 8  # else it would give up compiling


@settings(deadline=None, max_examples=25)
@given(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), st.sampled_from([16, 20]))
def test_stochastic_rounding_picks_a_neighbour_and_keeps_the_mean(value: float, dropped: int) -> None:
    torch.manual_seed(0)
    values = torch.full((4096,), value)
    rounded = round_stochastically(values, dropped)
    assert not (rounded.view(torch.int32) & ((1 << dropped) - 1)).any()
    step = abs(value) * 2.0 ** (dropped - 23) + 1e-38
    assert (rounded - values).abs().max() <= step
    assert abs(float((rounded.double() - value).mean())) <= 0.04 * step


@settings(deadline=None, max_examples=200)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_by_bits_is_the_cast(values: list[float]) -> None:
    exact = torch.tensor([*values, float("inf"), -0.0, 1.00390625, 1.01171875])  # the last two are ties
    assert torch.equal(optim._round_to_bf16(exact).nan_to_num(7.0), exact.bfloat16().float().nan_to_num(7.0))


def test_stochastic_rounding_leaves_what_is_not_finite() -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(round_stochastically(values, 16).isnan(), values.isnan())
    assert torch.equal(round_stochastically(values, 16)[:2], values[:2])
