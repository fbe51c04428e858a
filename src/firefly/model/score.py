"""Scoring: the loss of every learned token, without gradients, and what it comes to for each kind of sample."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from firefly.model.families import CausalModel
from firefly.model.loss import linear_cross_entropy
from firefly.model.packed import PackedInput, SupportsPacking


class SupportsScoring(SupportsPacking, Protocol):
    """A packed batch that knows its samples, as `firefly.data.loader.Batch` does."""

    @property
    def target_samples(self) -> Any: ...
    @property
    def sample_ids(self) -> list[int]: ...


def autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[object]:
    """bf16 matrix products over float32 weights when asked, else nothing."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def learned_states(model: CausalModel, batch: PackedInput, bf16: bool = False) -> Tensor:
    """Final hidden states where a learned token is predicted, M C."""
    mixed = bf16 and any(weight.dtype != torch.bfloat16 for weight in model.parameters())  # else no casts
    with autocast(batch.input_ids.device, mixed):
        states = model.hidden(batch)[batch.target_positions]
    return states.to(torch.bfloat16) if bf16 else states


def batch_loss(model: CausalModel, batch: PackedInput, bf16: bool = False) -> tuple[Tensor, Tensor]:
    """Loss of one packed batch over its learned tokens: the sum (differentiable) and each one (M), in nats."""
    return linear_cross_entropy(learned_states(model, batch, bf16), model.head, batch.target_ids)


@torch.no_grad()
def token_losses(model: CausalModel, batch: PackedInput, bf16: bool = False) -> Tensor:
    """The loss of each learned token, M float32, in nats."""
    model.eval()
    return batch_loss(model, batch, bf16)[1]


def loss_by_sample(
    model: CausalModel,
    batches: Iterable[SupportsScoring],
    num_samples: int,
    device: torch.device,
    bf16: bool = False,
) -> Tensor:
    """Nats and learned tokens of each of N samples, by the batches' `sample_ids`: [2, N] float64, −1 for the others."""
    found = torch.full((2, num_samples), -1.0, dtype=torch.float64)
    was_training = model.training
    for batch in batches:
        losses = token_losses(model, PackedInput.of(batch, device), bf16).double().cpu()
        samples, here = torch.from_numpy(batch.target_samples), len(batch.sample_ids)
        found[0, batch.sample_ids] = torch.bincount(samples, losses, here)
        found[1, batch.sample_ids] = torch.bincount(samples, minlength=here).double()
    model.train(was_training)
    return found


def loss_by_kind(
    model: CausalModel,
    batches: Iterable[SupportsScoring],
    kinds: Sequence[str],
    target_bytes: Sequence[int],
    device: torch.device,
    bf16: bool = False,
) -> dict[str, dict[str, float]]:
    """Loss by kind and in `all`: `loss` in nats a token, and `bits_per_byte` of the learned text.

    `kinds` and `target_bytes` (UTF-8) are indexed by the batches' `sample_ids`. Bits per byte do not depend on
    the vocabulary, so they compare models with different tokenizers.
    """
    return sum_by_kind(loss_by_sample(model, batches, len(kinds), device, bf16), kinds, target_bytes)


def sum_by_kind(
    found: Tensor, kinds: Sequence[str], target_bytes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """What `loss_by_kind` tells, from what `loss_by_sample` found."""
    sums: dict[str, list[float]] = {}  # kind → nats, tokens, bytes
    for kind, nats, count, size in zip(kinds, *found.tolist(), target_bytes, strict=True):
        for name in (kind, "all") if count >= 0 else ():
            entry = sums.setdefault(name, [0.0, 0.0, 0.0])
            for column, amount in enumerate((nats, count, size)):
                entry[column] += amount
    return {
        name: {"loss": nats / max(count, 1), "bits_per_byte": nats / math.log(2) / max(size, 1)}
        for name, (nats, count, size) in sorted(sums.items())
    }
