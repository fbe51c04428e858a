"""AdamW and the learning rate's course: linear warm-up, then cosine, linear or constant.

Plain AdamW needs 16 bytes a parameter with its weight and gradient. `CompactAdamW` needs as few as 6: weights and
gradients in bf16, moments in 8 bits. What rounding would lose there, it keeps on average (stochastic rounding) or
exactly (Kahan's compensation).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from firefly.model.packed import on_device
from firefly.recipe import TrainSection


def make_optimizer(
    parameters: Iterable[nn.Parameter], train: TrainSection, compiled: bool = False
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only, as one kernel: torch's own or a `compiled` one."""
    every = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = {"params": [p for p in every if p.ndim >= 2], "weight_decay": train.weight_decay}
    vectors = {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0}
    groups = [group for group in (matrices, vectors) if group["params"]]
    betas = (train.adam_beta1, train.adam_beta2)
    if train.optimizer == "adamw" and train.weights == "float32":
        return torch.optim.AdamW(
            groups, lr=train.learning_rate, betas=betas, eps=train.adam_epsilon, fused=True
        )
    return CompactAdamW(
        groups,
        train.learning_rate,
        betas,
        train.adam_epsilon,
        eight_bit=train.optimizer == "adamw_8bit",
        kahan=train.weights == "bf16_kahan",
        compiled=compiled,
    )


def state_bytes(eight_bit: bool, kahan: bool) -> float:
    """Bytes of AdamW's states a parameter: two moments, their scales, and Kahan's compensation."""
    return (2 + 2 * 4 / BLOCK if eight_bit else 8) + (2 if kahan else 0)


class CompactAdamW(torch.optim.Optimizer):
    """AdamW over float32 or bf16 weights, with moments in float32 or in 8 bits.

    bf16 weights are rounded stochastically (Gupta et al. 2015), or to nearest with the error carried in a second bf16
    tensor (`kahan`). 8-bit moments are float8 e4m3 codes of √v and m with one float32 scale a block (Dettmers et al.
    2022); they are rounded stochastically too, as a step moves v by a thousandth and the codes lie 6 % apart. All
    random bits come from the device's default generator, whose state a checkpoint holds.

    The arithmetic is plain torch in slices of bounded size; `compiled` makes few kernels of it (for CUDA they were
    compiled, and have not run yet).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        eight_bit: bool = False,
        kahan: bool = False,
        compiled: bool = False,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.eight_bit, self.kahan, self.compiled = eight_bit, kahan, compiled
        self._slice_update: Any = torch.compile(_adamw_slice, dynamic=True) if compiled else _adamw_slice

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            numbers: dict[float, Tensor] = {}  # by step: parameters of one step share them
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, numbers)

    def _update(self, parameter: nn.Parameter, group: dict[str, Any], numbers: dict[float, Tensor]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(self._fresh(parameter))
        state["step"] = state["step"].cpu() + 1  # on the host, so that reading it waits for nothing
        step = float(state["step"])
        if step not in numbers:
            numbers[step] = _numbers(step, group, parameter.device)
        beta1, beta2 = group["betas"]
        flat, gradient = parameter.view(-1), parameter.grad.reshape(-1)  # type: ignore[union-attr]
        # What is compiled has fewer temporaries to bound, and each call costs the host more than the GPU.
        length = 4 * SLICE if self.compiled else SLICE
        for start in range(0, len(flat), length):
            part = slice(start, start + length)
            blocks = slice(start // BLOCK, (start + length) // BLOCK)
            self._slice_update(
                flat[part],
                gradient[part],
                *(state[name].view(-1)[part] for name in ("exp_avg", "exp_avg_root")),
                state["scales"][:, blocks] if self.eight_bit else None,
                state["compensation"].view(-1)[part] if "compensation" in state else None,
                numbers[step],
                beta1,
                beta2,
                group["eps"],
            )

    def _fresh(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        moment = torch.float8_e4m3fn if self.eight_bit else torch.float32
        state = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter, dtype=moment),
            "exp_avg_root": torch.zeros_like(parameter, dtype=moment),
        }
        if self.eight_bit:
            num_blocks = -(-parameter.numel() // BLOCK)
            state["scales"] = torch.zeros(2, num_blocks, device=parameter.device)
        if self.kahan and parameter.dtype == torch.bfloat16:
            state["compensation"] = torch.zeros_like(parameter)
        return state


def _numbers(step: float, group: dict[str, Any], device: torch.device) -> Tensor:
    """The rate and √v's factor, both with their bias corrected, and what decay leaves of a weight.

    As a tensor, for a compiled function would be compiled anew for each new number.
    """
    beta1, beta2 = group["betas"]
    numbers = torch.tensor(
        [
            group["lr"] / (1 - beta1**step),
            1 / math.sqrt(1 - beta2**step),
            1 - group["lr"] * group["weight_decay"],
        ]
    )
    return on_device(numbers, device)


BLOCK = 256
"""Numbers that share a scale in 8-bit moments."""

SLICE = 1 << 22
"""Numbers updated at once: bounds the float32 temporaries. A multiple of BLOCK."""

_LARGEST, _SMALLEST = 448.0, 2.0**-9  # of e4m3


def _adamw_slice(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second_root: Tensor,
    scales: Tensor | None,
    compensation: Tensor | None,
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One AdamW update, in place; all tensors are flat and equally long, `scales` is [2, blocks]."""
    grad = gradient.float()
    if scales is None:
        mean, root = first, second_root
    else:
        mean, root = _dequantised(first, scales[0]), _dequantised(second_root, scales[1])
    mean = mean.lerp(grad, 1 - beta1)
    root = (root.square() * beta2 + grad.square() * (1 - beta2)).sqrt()
    rate, root_correction, keep = numbers.unbind()
    step = rate * mean / (root * root_correction + eps)
    if scales is None:
        first.copy_(mean)
        second_root.copy_(root)
    else:
        _quantise(mean, first, scales[0])
        _quantise(root, second_root, scales[1], floor=_SMALLEST)
    new = weight.float() * keep - step
    if weight.dtype == torch.float32:
        weight.copy_(new)
    elif compensation is None:
        weight.copy_(round_stochastically(new, 16))
    else:
        new = new + compensation.float()
        rounded = _round_to_bf16(new)
        weight.copy_(rounded)
        compensation.copy_(new - rounded)


def round_stochastically(values: Tensor, dropped_bits: int) -> Tensor:
    """Round float32 values so that their lowest mantissa bits are zero, up or down with odds that keep the mean.

    16 dropped bits leave bf16's precision, 20 leave e4m3's. Infinities and NaN stay what they are.
    """
    span = 1 << dropped_bits
    noise = torch.randint(span, values.shape, dtype=torch.int32, device=values.device)
    rounded = ((values.contiguous().view(torch.int32) + noise) & -span).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def _round_to_bf16(values: Tensor) -> Tensor:
    """Round float32 values to nearest, ties to even, as a cast to bf16 and back would.

    A compiler leaves such a pair of casts out, and Kahan's compensation would then be nothing.
    """
    bits = values.contiguous().view(torch.int32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def _blocks(values: Tensor) -> Tensor:
    """[n] as [blocks, BLOCK], the last one filled up with zeros."""
    return nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def _dequantised(codes: Tensor, scale: Tensor) -> Tensor:
    return (_blocks(codes.float()) * scale[:, None]).view(-1)[: len(codes)]


def _quantise(values: Tensor, codes: Tensor, scale: Tensor, floor: float = 0.0) -> None:
    """Write float8 codes and the scale of each block; a `floor` keeps √v, a divisor, from becoming zero."""
    blocks = _blocks(values)
    scale.copy_(blocks.abs().amax(1) / _LARGEST)
    scaled = blocks / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    size = round_stochastically(scaled.abs(), 20).clamp(floor, _LARGEST)
    codes.copy_(size.copysign(scaled).view(-1)[: len(codes)])


def learning_rate_at(step: int, total_steps: int, train: TrainSection) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    It rises as step/warmup_steps, so that the first update has the rate 0, as transformers' schedules do.
    """
    if step < train.warmup_steps:
        return train.learning_rate * step / train.warmup_steps
    if train.lr_scheduler_type == "constant":
        return train.learning_rate
    span = max(1, total_steps - train.warmup_steps)
    done = min(1.0, (step - train.warmup_steps) / span)
    shape = {
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "linear": 1.0 - done,
    }[train.lr_scheduler_type]
    return train.learning_rate * (train.min_lr_ratio + (1.0 - train.min_lr_ratio) * shape)
