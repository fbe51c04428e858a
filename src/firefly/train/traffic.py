"""Bytes that the processes of a run exchange in one optimizer step, told from shapes alone.

    zero   weights gathered          gradients summed (after the last micro-batch, unless said otherwise)
    0      –                         all-reduce
    1      once                      reduce-scatter
    2      once                      reduce-scatter, after every micro-batch
    3      twice a micro-batch       reduce-scatter, after every micro-batch
           (the root unit: once)

A unit is what is gathered and scattered at once, as in FSDP2: a layer, or the root, which is everything else. With
`hsdp` replicas, each rank's shard is all-reduced over them as well. Tensor parallelism all-reduces the hidden states
after attention and after the MLP, and their gradients before them (Shoeybi et al. 2019, "Megatron-LM", section 3).

A message's bytes are the whole buffer of its collective: what an all-gather leaves and a reduce-scatter takes,
padding included. What then crosses the link of one rank, is told by `link_bytes`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch

from firefly.errors import RecipeError
from firefly.model.families import build, transformers_model
from firefly.recipe import ParallelSection
from firefly.train.memory import at_depth, depth_of

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Group = Literal["shard", "replica", "tensor"]
Shapes = Sequence[tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """How ranks share the work: `dp` data-parallel groups of `tp` ranks, in `hsdp` replicas of a sharding group."""

    zero: int = 0
    tp: int = 1
    dp: int = 1
    hsdp: int = 1
    offload: str = "none"

    @classmethod
    def of(cls, section: ParallelSection, num_gpus: int, num_heads: int) -> Layout:
        """The recipe's layout on so many GPUs; raises `RecipeError` when they cannot be shared out so."""
        dp, rest = divmod(num_gpus, section.tp)
        if rest or num_heads % section.tp:
            raise RecipeError(
                f"parallel.tp = {section.tp} must divide the {num_gpus} GPUs and the model's {num_heads} attention "
                "heads; choose another tp or another number of GPUs."
            )
        if dp % section.hsdp:
            raise RecipeError(
                f"parallel.hsdp = {section.hsdp} must divide the {dp} data-parallel ranks ({num_gpus} GPUs, tp = "
                f"{section.tp}); choose another hsdp or another number of GPUs."
            )
        return cls(section.zero, section.tp, dp, section.hsdp, section.offload)

    @property
    def num_ranks(self) -> int:
        """All of them."""
        return self.dp * self.tp

    def size(self, group: Group) -> int:
        """Ranks in a group. Where nothing is sharded, every data-parallel rank is a replica."""
        if group == "tensor":
            return self.tp
        shards = self.dp // self.hsdp if self.zero else 1
        return shards if group == "shard" else self.dp // shards


@dataclass(frozen=True)
class Units:
    """Shapes of the parameters by unit: the root once, and `num_layers` equal layers."""

    root: Shapes
    layer: Shapes
    num_layers: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Units:
        """The units of a config.json's model; a tied matrix counts once."""
        with torch.device("meta"):
            model = build(at_depth(config, 1))
        inside = {id(parameter) for parameter in model.layers.parameters()}
        every = list(transformers_model(model).parameters())
        return cls(
            [tuple(one.shape) for one in every if id(one) not in inside],
            [tuple(one.shape) for one in every if id(one) in inside],
            depth_of(config),
        )

    def of_rank(self, tp: int) -> Units:
        """What one of `tp` ranks holds: its share of every matrix, and vectors whole."""

        def share(shapes: Shapes) -> Shapes:
            return [(-(-shape[0] // tp), *shape[1:]) if len(shape) > 1 else shape for shape in shapes]

        return Units(share(self.root), share(self.layer), self.num_layers)

    @property
    def num_parameters(self) -> int:
        """Of the whole model."""
        return sum(map(prod, self.root)) + self.num_layers * sum(map(prod, self.layer))


@dataclass(frozen=True)
class Widths:
    """Bytes of one number: of a gathered weight, a summed gradient, and a hidden state."""

    weight: int = 4
    gradient: int = 4
    state: int = 4

    @classmethod
    def of(cls, bf16: bool, bf16_weights: bool = False) -> Widths:
        """bf16 products gather weights in bf16 and sum gradients in float32; bf16 weights have bf16 gradients."""
        return cls(2 if bf16 else 4, 2 if bf16_weights else 4, 2 if bf16 else 4)


@dataclass(frozen=True)
class Message:
    """One collective of `num_bytes`, `times` times a step, over a group of ranks."""

    kind: Kind
    group: Group
    num_bytes: int
    times: int


def padded(shapes: Shapes, num_shards: int) -> int:
    """Numbers in a unit whose parameters are each cut along their first dimension into equal shards."""
    return sum(num_shards * -(-shape[0] // num_shards) * prod(shape[1:]) for shape in shapes)


def unit_messages(
    shapes: Shapes, layout: Layout, accumulation: int, widths: Widths, root: bool = False
) -> list[Message]:
    """What one unit's weights and gradients cost in a step of `accumulation` micro-batches; `shapes` of one rank."""
    shards = layout.size("shard")
    count = padded(shapes, shards)
    gathers = 1 if layout.zero < 3 else accumulation * (1 if root else 2)
    scatters = 1 if layout.zero < 2 else accumulation
    return _real(
        layout,
        Message("all_gather", "shard", widths.weight * count, gathers),
        Message("reduce_scatter", "shard", widths.gradient * count, scatters),
        Message("all_reduce", "replica", widths.gradient * count // shards, 1),
    )


def state_messages(
    width: int, tokens: int, targets: int, layout: Layout, widths: Widths, recomputed: bool
) -> tuple[list[Message], list[Message]]:
    """Tensor-parallel traffic of one micro-batch, in one layer and around the layers.

    `width` is the hidden size. A layer that is recomputed sums its attention anew; what comes after the MLP's last
    matrix nobody needs again. Around the layers: the embedding, split by vocabulary, is summed; so are the gradients of
    the learned positions' states, and in float32 the loss's maximum, sum and target logit.
    """
    states = widths.state * tokens * width
    layer = _real(layout, Message("all_reduce", "tensor", states, 5 if recomputed else 4))
    around = _real(
        layout,
        Message("all_reduce", "tensor", states, 1),
        Message("all_reduce", "tensor", widths.state * targets * width, 1),
        Message("all_reduce", "tensor", 4 * targets, 3),
    )
    return layer, around


def communication_bytes(
    units: Units, layout: Layout, accumulation: int = 1, widths: Widths | None = None
) -> Counter[str]:
    """Bytes of one step's collectives over weights and gradients, by kind; `units` are those of the whole model."""
    widths, mine = widths or Widths(), units.of_rank(layout.tp)
    total: Counter[str] = Counter()
    for message in unit_messages(mine.root, layout, accumulation, widths, root=True):
        total[message.kind] += message.num_bytes * message.times
    for message in unit_messages(mine.layer, layout, accumulation, widths):
        total[message.kind] += message.num_bytes * message.times * units.num_layers
    return total


def link_bytes(message: Message, num_ranks: int) -> float:
    """Bytes that a rank sends for one such message around a ring of `num_ranks`."""
    around = (num_ranks - 1) / num_ranks * message.num_bytes
    return 2 * around if message.kind == "all_reduce" else around


def _real(layout: Layout, *messages: Message) -> list[Message]:
    """Those over more than one rank."""
    return [message for message in messages if layout.size(message.group) > 1]
