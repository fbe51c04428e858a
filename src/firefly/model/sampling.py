"""The next token of each row: the likeliest one, or one drawn from the likeliest few; and whether it was a close call.

Rounding differs with the shape of a batch, by about one part in a million. A choice is *close* when such an error could
turn it; the caller then works that row out alone, in one shape for all batches, and so gets the same token in any.

Legend: R rows, V vocabulary, K tokens looked at.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from firefly.recipe import GenerationSection

TIE = 1e-4
"""Relative distance below which two numbers may change places; some hundred times float32's error in a logit."""

_FIRST_LOOK = 64  # tokens that are sorted; all of them where these do not reach top_p


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were `seen` less likely (Keskar et al. 2019); R V and R V (bool)."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def likeliest(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the highest logit of each row, R, and whether the second is close, R."""
    (first, second), tokens = (found.T for found in logits.topk(2))
    return tokens[0], first - second < TIE * torch.maximum(first.abs(), second.abs())


def drawn(logits: Tensor, options: GenerationSection, chances: Tensor) -> tuple[Tensor, Tensor]:
    """A token of each row's nucleus, the fewest likeliest tokens that hold top_p of the probability; R, and R (close).

    `chances`, R, from 0 to 1, say which: the same chance and logits give the same token (Holtzman et al. 2020).
    """
    probabilities = (logits / options.temperature).softmax(-1)
    num = min(_FIRST_LOOK, logits.shape[1])
    while True:
        top, tokens = probabilities.topk(num)  # R K, falling
        reached = top.cumsum(1)
        if num == logits.shape[1] or bool((reached[:, -1] > options.top_p + TIE).all()):
            break
        num = logits.shape[1]
    kept = reached - top < options.top_p
    mass = top * kept
    wanted = (chances * mass.sum(1))[:, None]
    borders = mass.cumsum(1)
    last = kept.sum(1, keepdim=True) - 1
    at = torch.minimum((borders <= wanted).sum(1, keepdim=True), last)
    # Where rounding decides whether one more token belongs to the nucleus, the borders may lie that token apart.
    on_edge = ((reached - options.top_p).abs() < TIE).any(1, keepdim=True)
    slack = TIE + top.gather(1, last) * on_edge
    ahead, here, behind = (top.gather(1, (at + step).clamp(0, num - 1)) for step in (-1, 0, 1))
    tied = ((at > 0) & (ahead - here < TIE * here)) | ((at < num - 1) & (here - behind < TIE * here))
    close = ((borders - wanted).abs() < slack).any(1) | tied[:, 0]
    return tokens.gather(1, at)[:, 0], close


def chances(seed: int, key: str) -> np.random.Generator:
    """The random numbers of one answer: a function of seed and key, whatever else is answered beside it."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))
