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
    sums: dict[str, list[float]] = {}  # kind → nats, tokens, bytes
    was_training = model.training
    for batch in batches:
        for number, *amounts in zip(
            batch.sample_ids, *sample_losses(model, batch, device, bf16), strict=True
        ):
            for name in (kinds[number], "all"):
                entry = sums.setdefault(name, [0.0, 0.0, 0.0])
                for column, amount in enumerate([*amounts, target_bytes[number]]):
                    entry[column] += amount
    model.train(was_training)
    return {name: mean_loss(*amounts) for name, amounts in sorted(sums.items())}


def sample_losses(
    model: CausalModel, batch: SupportsScoring, device: torch.device, bf16: bool = False
) -> tuple[list[float], list[int]]:
    """For each sample of a batch its loss in nats, summed over its learned tokens, and their number."""
    num_samples = len(batch.sample_ids)
    losses = token_losses(model, PackedInput.of(batch, device), bf16).double().cpu()
    samples = torch.from_numpy(batch.target_samples)
    nats = torch.bincount(samples, losses, num_samples).tolist()
    return nats, torch.bincount(samples, minlength=num_samples).tolist()


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
