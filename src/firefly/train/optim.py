"""AdamW and the learning rate's course: linear warm-up, then cosine, linear or constant."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from firefly.recipe import TrainSection


def make_optimizer(parameters: Iterable[nn.Parameter], train: TrainSection) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with decay on matrices only; fused where torch has a fused kernel."""
    every = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=train.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        eps=train.adam_epsilon,
        fused=True,
    )


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
