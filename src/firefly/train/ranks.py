"""Memory of one rank under a layout, and where things must lie so that they fit.

What each stage shards is Rajbhandari et al. 2020, "ZeRO", as FSDP2 does it: from stage 1 on a rank keeps its shard of
the weights and works on gathered copies, in bf16 where the products are; stage 3 keeps only a few layers gathered.
Activations and logits come from walking through a step (`memory.py`), the rest is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from firefly.errors import TrainingError
from firefly.recipe import TrainSection
from firefly.train.memory import BatchShape, Memory, memory_at_peak, on_meta, walk_phases
from firefly.train.optim import state_bytes
from firefly.train.traffic import Layout, Units, Widths

PREFETCH = 1
"""Layers gathered ahead, FSDP2's default."""
OFFLOADS = ("none", "optimizer", "all")
_COLLECTIVES_BYTES = 400 << 20  # NCCL's buffers (an estimate)


@dataclass(frozen=True)
class Load:
    """What is trained with, as far as ranks care: the model, the options, and the largest batch."""

    config: dict[str, Any]
    train: TrainSection
    batch: BatchShape
    held_out: BatchShape | None
    bf16: bool
    device_kind: str

    @cached_property
    def units(self) -> Units:
        """The model's layers and root."""
        return Units.of(self.config)

    @property
    def widths(self) -> Widths:
        """Bytes of what is gathered, summed and passed on."""
        return Widths.of(self.bf16, self.bf16_weights)

    @cached_property
    def learned(self) -> int:
        """Parameters that learn: all, or those of the adapters."""
        if self.train.method == "full":
            return self.units.num_parameters
        every = on_meta(self.config, self.train, self.bf16).parameters()
        return sum(parameter.numel() for parameter in every if parameter.requires_grad)

    @property
    def learned_share(self) -> float:
        """Of the model's own parameters."""
        return self.learned / self.units.num_parameters

    @property
    def num_heads(self) -> int:
        """Attention heads, which tensor parallelism shares out."""
        return int(self.config["n_head"] if "n_head" in self.config else self.config["num_attention_heads"])

    @property
    def stored_bytes(self) -> float:
        """A parameter of the model as it is kept, adapters included."""
        return self.phases[0]["weights"] / self.units.num_parameters

    @property
    def bf16_weights(self) -> bool:
        """Whether weights are kept in bf16."""
        return self.train.weights != "float32"

    @property
    def optimizer_bytes(self) -> float:
        """AdamW's states, a parameter."""
        return state_bytes(self.train.optimizer == "adamw_8bit", self.train.weights == "bf16_kahan")

    @cached_property
    def phases(self) -> list[Counter[str]]:
        """The peaks of a step's phases on one device alone."""
        return self._walk(self.train)

    @cached_property
    def gathered_phases(self) -> list[Counter[str]]:
        """The same where layers work on gathered bf16 weights: none are cast, so no casts are kept."""
        if not self.bf16 or self.bf16_weights or self.train.method != "full":
            return self.phases
        return self._walk(self.train.model_copy(update={"weights": "bf16_stochastic"}))

    def _walk(self, train: TrainSection) -> list[Counter[str]]:
        return walk_phases(self.config, train, self.batch, self.held_out, self.bf16, self.device_kind)


def rank_memory(load: Load, layout: Layout, accumulation: int) -> tuple[Memory, int]:
    """Peak memory of a rank on its device, and its bytes in main memory."""
    if layout.num_ranks == 1 and layout.offload == "none":
        return memory_at_peak(load.phases, load.device_kind), 0
    mine, shards = load.units.of_rank(layout.tp), layout.size("shard")
    every, stored = mine.num_parameters, load.stored_bytes
    root = sum(map(prod, mine.root))
    room = min(every, root + (1 + PREFETCH) * sum(map(prod, mine.layer)))
    gathered_bytes = min(load.widths.weight, stored)
    gradient_bytes, state_bytes = (
        size * load.learned_share for size in (load.widths.gradient, load.optimizer_bytes)
    )
    away, adapters = layout.offload == "all", load.train.method != "full"

    if away or layout.zero == 3:
        weights = gathered_bytes * room + (0 if away else stored * every / shards)
    elif shards > 1 and not adapters:  # frozen weights stay whole
        weights = gathered_bytes * every + stored * every / shards
    else:
        weights = stored * every
    if away or layout.zero >= 2 or (layout.zero == 1 and accumulation == 1):
        kept, working = 0 if away else gradient_bytes * every / shards, gradient_bytes * room
    else:
        kept, working = gradient_bytes * every, 0
    states = state_bytes * every / shards
    # The optimizer that runs in main memory has float32 weights and gradients there.
    moved = {"none": 0, "optimizer": states + 8 * load.learned_share * every / shards}
    moved["all"] = states + (stored + 4 * load.learned_share) * every / shards

    gathered = away or shards > 1
    phases = load.gathered_phases if gathered else load.phases
    alone = 4 * load.learned if adapters else phases[0]["weights"]

    def gradients(of_all: int) -> int:
        """Of the `of_all` bytes on one device alone."""
        made = min(1.0, of_all / alone)
        # Beyond one for each weight: those of a tied matrix from both its uses, added when the layers' have gone.
        uses = max(0, of_all - alone) / layout.tp
        if uses and working:
            uses += root * gradient_bytes
        return int(kept * made + max(working * made, uses))

    share = _activation_share(load, layout.tp)
    peak = memory_at_peak(
        [
            Counter(
                weights=int(weights),
                gradients=gradients(phase["gradients"]),
                optimizer=int(states) if layout.offload == "none" else 0,
                activations=int(share * phase["activations"]),
                logits=phase["logits"] // layout.tp,
            )
            for phase in phases
        ],
        load.device_kind,
        _COLLECTIVES_BYTES if layout.num_ranks > 1 else 0,
    )
    return peak, int(moved[layout.offload])


def _activation_share(load: Load, tp: int) -> float:
    """How much of its activations a tensor-parallel rank holds: four hidden states a layer are whole on each (an
    estimate); and layers that are recomputed keep nothing else."""
    if tp == 1 or load.train.gradient_checkpointing == 1:
        return 1.0
    width = min(shape[0] for shape in load.units.layer if len(shape) > 1)
    split = sum(shape[0] for shape in load.units.layer if len(shape) > 1)
    return (4 * width + split / tp) / (4 * width + split)


def choose_offload(
    need: Callable[[str], tuple[int, int]], free_device_bytes: int, free_host_bytes: int
) -> tuple[str, str]:
    """Where `parallel.offload = "auto"` lets things lie, and why, in a sentence.

    `need` tells the bytes on the device and in the main memory of the node for one of "none", "optimizer", "all". The
    first that fits is taken, as each costs time. Raises `TrainingError` when none fits.
    """
    told = []
    for offload in OFFLOADS:
        device_bytes, host_bytes = need(offload)
        told.append(f"{offload} takes {_gib(device_bytes)} and {_gib(host_bytes)}")
        if device_bytes <= free_device_bytes and host_bytes <= free_host_bytes:
            refused = f", and {'; '.join(told[:-1])}" if told[:-1] else ""
            reason = (
                f"offload = {offload}: of {_gib(free_device_bytes)} device memory and {_gib(free_host_bytes)} main "
                f"memory it takes {_gib(device_bytes)} and {_gib(host_bytes)}{refused}."
            )
            return offload, reason
    raise TrainingError(
        f"{_gib(free_device_bytes)} of device memory and {_gib(free_host_bytes)} of main memory do not suffice: "
        f"{'; '.join(told)}. Use more GPUs with parallel.zero = 3, smaller batches, or train.method = 'lora'."
    )


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
