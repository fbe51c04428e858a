"""Cross-entropy straight from hidden states: only at learned positions, and never all logits at once.

Legend: M learned positions, C hidden size, V vocabulary.

The logits of one chunk live only while the chunk's loss and gradients are made, so memory is
chunk · V and not M · V. Softmax and sums are float32 where the inputs are less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
"""Memory for one chunk's float32 logits. Each chunk reads and writes the head's whole gradient once, so smaller ones
are slower (on the CPU, 8 MiB take twice the time); larger ones gain nothing."""


def linear_cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of softmax(hidden · headᵀ) against `targets`.

    Args:
        hidden: M C, float32 or bf16; matrix products run in its dtype.
        head: V C; under tensor parallelism a DTensor split along V, and all its ranks must call.
        targets: M, token ids.
        weights: M, a factor for each position's loss in the sum; None: 1.

    Returns:
        The sum over all positions (float32 scalar, differentiable in hidden and head), and the loss of each
        position (M, float32, detached), in nats.
    """
    rows = VocabularyRows.of(head)
    if isinstance(head, DTensor):
        head = head.to_local()
    if torch.is_grad_enabled() and (hidden.requires_grad or head.requires_grad):
        total, each = _LinearCrossEntropy.apply(hidden, head, targets, weights, rows)  # type: ignore[no-untyped-call]
        return total, each.detach()
    weight = head.to(hidden.dtype)
    each = torch.cat(
        [_chunk_losses(states @ weight.T, ids, rows)[0] for states, ids in _chunks(hidden, targets, rows)]
    )
    return _weighted_sum(each, weights), each


@dataclass(frozen=True)
class VocabularyRows:
    """Which rows of the head lie here: all, or under tensor parallelism this rank's, from `first` on.

    `most` is how many the rank with most of them has; `group` are the ranks that have them all together.
    """

    first: int
    most: int
    group: Any = None

    @classmethod
    def of(cls, head: Tensor) -> VocabularyRows:
        """The rows of a head that is whole, or split along the vocabulary."""
        if not isinstance(head, DTensor):
            return cls(0, len(head))
        mesh = head.device_mesh
        most = -(-len(head) // mesh.size())
        return cls(most * mesh.get_local_rank(), most, mesh.get_group())

    def find(self, ids: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
        """Where the row of each of `ids` lies among the `num_rows` here, and whether it is here; in their shape."""
        local = ids - self.first
        return local.clamp(0, num_rows - 1), (local >= 0) & (local < num_rows)

    def reduce(self, values: Tensor, how: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Sum (or maximum) over the ranks that hold the rows, in place."""
        if self.group is not None:
            dist.all_reduce(values, how, self.group)
        return values


def _weighted_sum(each: Tensor, weights: Tensor | None) -> Tensor:
    return each.sum() if weights is None else (each * weights).sum()


def _chunks(hidden: Tensor, targets: Tensor, rows: VocabularyRows) -> list[tuple[Tensor, Tensor]]:
    length = max(1, CHUNK_BYTES[hidden.device.type] // (4 * rows.most))
    return list(zip(torch.split(hidden, length), torch.split(targets, length), strict=True))


def _chunk_losses(logits: Tensor, targets: Tensor, rows: VocabularyRows) -> tuple[Tensor, Tensor]:
    """Losses (m) and probabilities of the rows here (m V), float32 or better; in place where the logits are that."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))  # m V
    highest = rows.reduce(scores.amax(1, keepdim=True), dist.ReduceOp.MAX)
    place, here = rows.find(targets[:, None], scores.shape[1])  # m 1
    wanted = scores.gather(1, place) * here
    weights = scores.sub_(highest).exp_()
    wanted, total = rows.reduce(torch.stack([wanted, weights.sum(1, keepdim=True)])).unbind()
    return (total.log() + highest - wanted)[:, 0], weights.div_(total)


class _LinearCrossEntropy(torch.autograd.Function):
    """Makes the gradients in the forward pass, while the chunk's logits are there; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor | None,
        vocabulary: VocabularyRows,
    ) -> tuple[Tensor, Tensor]:
        weight = head.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden)
        # A frozen head, under adapters, needs none: it would be the largest tensor of the step.
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        grad_head = torch.zeros_like(head, dtype=dtype) if ctx.needs_input_grad[1] else None
        losses, done = [], 0
        for rows, ids in _chunks(hidden, targets, vocabulary):
            each, gradient = _chunk_losses(rows @ weight.T, ids, vocabulary)
            losses.append(each)
            place, here = vocabulary.find(ids[:, None], len(head))
            gradient.scatter_add_(1, place, -here.to(gradient.dtype))
            if weights is not None:
                gradient *= weights[done : done + len(ids), None]
            gradient = gradient.to(hidden.dtype)  # m V
            torch.mm(gradient, weight, out=grad_hidden[done : done + len(ids)])
            if grad_head is None:
                pass
            elif rows.dtype == grad_head.dtype:
                grad_head.addmm_(gradient.T, rows)  # no temporary of the head's size
            else:
                grad_head += gradient.T @ rows
            done += len(ids)
        vocabulary.reduce(grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.head_dtype = head.dtype
        each = torch.cat(losses) if losses else hidden.new_zeros(0, dtype=dtype)
        ctx.mark_non_differentiable(each)
        return _weighted_sum(each, weights), each

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = gradients[0]
        # In place, for the head's gradient is large; a second backward pass then fails with autograd's own error.
        to_head = None if grad_head is None else grad_head.mul_(scale).to(ctx.head_dtype)
        return grad_hidden.mul_(scale), to_head, None, None, None
