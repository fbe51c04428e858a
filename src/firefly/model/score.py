"""Scoring: the loss of every learned token, without gradients, and what it comes to for each kind of sample."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

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


def sample_losses(
    model: CausalModel, batch: SupportsScoring, device: torch.device, bf16: bool = False
) -> Tensor:
    """Nats and learned tokens of each of a batch's N samples: [2, N] float64, on the host."""
    num_samples = len(batch.sample_ids)
    losses = token_losses(model, PackedInput.of(batch, device), bf16).double().cpu()
    samples = torch.from_numpy(batch.target_samples)
    nats = torch.bincount(samples, losses, num_samples)
    return torch.stack([nats, torch.bincount(samples, minlength=num_samples).double()])


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
        found[:, batch.sample_ids] = sample_losses(model, batch, device, bf16)
    model.train(was_training)
    return found


def sum_by_kind(
    found: Tensor, kinds: Sequence[str], target_bytes: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Loss by kind and in `all`, from what `loss_by_sample` found, by each sample's kind and its learned UTF-8 bytes.

    Bits per byte do not depend on the vocabulary, so they compare models with different tokenizers.
    """
    sums: dict[str, list[float]] = {}  # kind → nats, tokens, bytes
    for kind, nats, count, size in zip(kinds, *found.tolist(), target_bytes, strict=True):
        for name in (kind, "all") if count >= 0 else ():
            entry = sums.setdefault(name, [0.0, 0.0, 0.0])
            for column, amount in enumerate((nats, count, size)):
                entry[column] += amount
    return {name: mean_loss(*amounts) for name, amounts in sorted(sums.items())}


def mean_loss(nats: float, num_tokens: float, num_bytes: float) -> dict[str, float]:
    """`loss` in nats a token, and `bits_per_byte`."""
    return {"loss": nats / max(num_tokens, 1), "bits_per_byte": nats / math.log(2) / max(num_bytes, 1)}


@torch.no_grad()
def log_probabilities(
    model: CausalModel, texts: Sequence[Sequence[int]], counts: Sequence[int], device: torch.device
) -> list[Tensor]:
    """For each text the log-probabilities of every token after each of its last `counts[i]` tokens, counts[i] V."""
    borders = [0, *itertools.accumulate(map(len, texts))]
    nothing = torch.empty(0, dtype=torch.long)
    batch = PackedInput(
        torch.tensor([token for text in texts for token in text], device=device),
        torch.tensor([place for text in texts for place in range(len(text))], device=device),
        borders,
        nothing,
        nothing,
    )
    states = model.hidden(batch)
    found = []
    for end, count in zip(borders[1:], counts, strict=True):
        found.append(functional.linear(states[end - count : end], model.head).float().log_softmax(-1))
    return found
