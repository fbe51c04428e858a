"""One recipe on many GPUs: the time of a step under every layout, and how far adding GPUs pays.

Arithmetic runs at half of the device's peak and bytes at 80 % of a link's rate. A collective goes around a ring; it
takes its bytes over the slowest part (NVLink within a node; between nodes, the adapters of all its ranks there
together), and a latency for each rank it passes, NCCL's own figures (tuning.cc, ring, simple protocol). Which of it
hides behind arithmetic, `simulate.py` says. None of the GPU figures was compared with a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from math import ceil, prod

from firefly.errors import RecipeError, choices
from firefly.train.gpus import Device
from firefly.train.memory import Memory
from firefly.train.ranks import OFFLOADS, PREFETCH, Load, rank_memory
from firefly.train.simulate import Step, closed_form_s
from firefly.train.traffic import Layout, Message, link_bytes, state_messages, unit_messages

_USABLE_PEAK, _USABLE_RATE = 0.5, 0.8
_PEER_HOP_S, _NETWORK_HOP_S, _CALL_S = 3.4e-6, 14e-6, 8.4e-6
_LEAST_LAYER_S = 1e-4  # launching a layer's kernels, forward (an estimate)
_HOST_UPDATE_BYTES_PER_S = 200e9  # of the optimizer in a node's main memory, its GPUs together (an estimate)
_WORTH = 1.5  # doubling the GPUs pays while it brings so much more speed
_NETWORKS = {
    # name: GB/s in one direction of one adapter, adapters a GPU (None: one a node)
    "XDR": (100, 1),
    "NDR": (50, 1),
    "HDR": (25, 1),
    "EDR": (12.5, 1),
    "400GbE": (50, 1),
    "100GbE": (12.5, None),
    "25GbE": (3.125, None),
    "10GbE": (1.25, None),
}


@dataclass(frozen=True)
class Cluster:
    """Nodes of like GPUs; `network_bytes_per_s` is a GPU's share of the way out of its node, one direction."""

    device: Device
    gpus_per_node: int = 8
    network: str = "NDR"
    network_bytes_per_s: float = 50e9

    @classmethod
    def of(cls, device: Device, gpus_per_node: int, network: str) -> Cluster:
        """A network by name, such as NDR (InfiniBand, an adapter a GPU) or 100GbE (one a node), or GB/s a GPU.

        Raises `RecipeError` for an unknown name, and for a device whose speed is unknown.
        """
        if device.bf16_flops is None or device.bandwidth_bytes_per_s is None:
            raise RecipeError(f"The speed of {device.name} is unknown; name the GPU, such as --gpu H100.")
        number = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:GB/s)?", network.strip(), re.IGNORECASE)
        if number and float(number[1]) > 0:
            return cls(device, gpus_per_node, f"{number[1]} GB/s a GPU", float(number[1]) * 1e9)
        found = next((name for name in _NETWORKS if name.lower() == network.strip().lower()), None)
        if found is None:
            raise RecipeError(
                f"The network '{network}' is not known; give GB/s a GPU, or a name: {choices(network, _NETWORKS)}."
            )
        rate, adapters = _NETWORKS[found]
        return cls(device, gpus_per_node, found, rate * 1e9 * (adapters or 1 / gpus_per_node))

    def seconds(self, message: Message, layout: Layout) -> float:
        """One collective alone."""
        ranks = layout.size(message.group)
        stride = {"tensor": 1, "shard": layout.tp, "replica": layout.tp * layout.size("shard")}[message.group]
        together = max(1, min(ranks, self.gpus_per_node // stride))  # of its ranks in one node
        nodes = ceil(ranks / together)
        rate = self.device.peer_bytes_per_s
        if nodes > 1:
            rate = min(rate, together * self.network_bytes_per_s)
        hops_s = (ranks - nodes) * _PEER_HOP_S + (nodes - 1) * _NETWORK_HOP_S
        rounds = 2 if message.kind == "all_reduce" else 1
        return _CALL_S + rounds * hops_s + link_bytes(message, ranks) / (_USABLE_RATE * rate)


@dataclass(frozen=True)
class Batch:
    """What a data-parallel rank computes a step: micro-batches of so many tokens, and of learned ones."""

    accumulation: int
    tokens: float
    targets: float

    def shared(self, samples: int, of_all: int | None, dp: int) -> Batch | None:
        """A rank's part when `of_all` samples a step are shared by all; a micro-batch has at most `samples` of them.

        None when there are more ranks than samples. Without `of_all`, each rank has a batch as large as alone.
        """
        if of_all is None:
            return self
        if of_all < dp:
            return None
        accumulation = ceil(of_all / dp / samples)
        part = of_all / dp / accumulation / samples
        return Batch(accumulation, self.tokens * part, self.targets * part)


@dataclass(frozen=True)
class Rank:
    """A layout's memory on each rank (and in main memory), and what a step takes."""

    layout: Layout
    accumulation: int
    memory: Memory
    memory_bytes: int
    host_bytes: int
    fits: bool
    step_s: float
    waiting_s: float  # of it, the device waits for a link
    tokens_per_s: float  # of all ranks


@dataclass(frozen=True)
class Scaling:
    """`layouts` of the asked number of GPUs, those that fit first, each the faster first; the best of 1, 2, 4 … GPUs.

    `worth_gpus`: beyond so many, doubling them brings less than half as much speed again.
    """

    cluster: Cluster
    num_gpus: int
    samples_per_step: int | None
    layouts: list[Rank]
    curve: list[Rank]
    worth_gpus: int


def step_of(load: Load, layout: Layout, batch: Batch, cluster: Cluster) -> Step:
    """The parts of a step; `batch` is that of one data-parallel rank."""
    device, units, widths = cluster.device, load.units, load.widths
    peak = device.bf16_flops if load.bf16 else device.float32_flops
    assert peak is not None and device.bandwidth_bytes_per_s is not None
    flops, bandwidth = _USABLE_PEAK * peak * layout.tp, _USABLE_RATE * device.bandwidth_bytes_per_s
    mine, shards, away = units.of_rank(layout.tp), layout.size("shard"), layout.offload
    layer, every = sum(map(prod, mine.layer)), mine.num_parameters
    recomputed = 1 / load.train.gradient_checkpointing if load.train.gradient_checkpointing else 0.0

    # Casting float32 weights reads 4 bytes and writes 2; gathered ones are cast before they are sent.
    is_cast = load.bf16 and not load.bf16_weights and load.train.method == "full" and shards == 1
    casts_s = 6 * layer / bandwidth if is_cast else 0.0
    # Backward makes the gradients of states and of learned weights, each as long as forward. (`flops` count all of tp.)
    forward_s = max(2 * layer * layout.tp * batch.tokens / flops, _LEAST_LAYER_S)
    backward_s = (1 + min(1.0, load.learned_share) + recomputed) * forward_s
    width = units.layer[0][0]
    inside, around = state_messages(width, int(batch.tokens), int(batch.targets), layout, widths, False)
    sums_s = [cluster.seconds(message, layout) for message in inside]
    forward_s += casts_s + 2 * sum(sums_s)
    backward_s += (2 + recomputed) * sum(sums_s)
    head = max((shape for shape in units.root if len(shape) > 1), key=prod)
    passes = (4 if load.learned_share < 1 else 6) + (2 if load.train.objective == "dpo" else 0)
    root_s = passes * prod(head) * batch.targets / flops + sum(
        message.times * cluster.seconds(message, layout) for message in around
    )

    def parts(shapes: object, root: bool) -> tuple[float, float, float]:
        """Seconds to gather, to scatter (or to reduce what is not sharded), and to reduce over replicas."""
        found = {"all_gather": 0.0, "reduce_scatter": 0.0, "all_reduce": 0.0}
        for message in unit_messages(shapes, layout, batch.accumulation, widths, root):  # type: ignore[arg-type]
            if (
                message.kind != "all_gather" or layout.zero < 3
            ):  # what does not learn is not even gathered there
                message = replace(message, num_bytes=int(message.num_bytes * load.learned_share))
            found[message.kind] = cluster.seconds(message, layout)
        if shards == 1:
            return 0.0, found["all_reduce"], 0.0
        return found["all_gather"], found["reduce_scatter"], found["all_reduce"]

    gather_s, scatter_s, replicas_s = parts(mine.layer, root=False)
    root_gather_s, root_scatter_s, root_replicas_s = parts(mine.root, root=True)
    to_host = _USABLE_RATE * device.host_bytes_per_s
    learned = load.learned_share * every / shards
    fetch_s = load.stored_bytes * layer / shards / to_host if away == "all" else 0.0
    evict_s = widths.gradient * load.learned_share * layer / shards / to_host if away != "none" else 0.0
    own_bytes = 2 if load.bf16_weights else 4
    traffic = 3 * own_bytes + 2 * load.optimizer_bytes  # weight and moments read and written, gradient read
    update_s = traffic * learned / bandwidth if away == "none" else 0.0
    host_rate = _HOST_UPDATE_BYTES_PER_S / min(cluster.gpus_per_node, layout.num_ranks)
    return Step(
        num_layers=units.num_layers,
        accumulation=batch.accumulation,
        gathers_again=layout.zero == 3 or away == "all",
        scatters_again=layout.zero >= 2,
        evicts_again=away == "all",
        forward_s=forward_s,
        backward_s=backward_s,
        root_s=root_s,
        update_s=update_s,
        gather_s=gather_s,
        scatter_s=scatter_s,
        root_gather_s=root_gather_s,
        root_scatter_s=root_scatter_s + root_replicas_s,
        replicas_s=replicas_s,
        fetch_s=fetch_s,
        evict_s=evict_s,
        host_update_s=traffic * learned / host_rate if away != "none" else 0.0,
        upload_s=own_bytes * learned / to_host if away == "optimizer" else 0.0,
        prefetch=PREFETCH,
    )


def possible_layouts(num_gpus: int, gpus_per_node: int, num_heads: int) -> Iterator[Layout]:
    """Every layout of that many GPUs, the simpler first."""
    for offload in OFFLOADS:
        for tp in (1, 2, 4, 8):
            if num_gpus % tp or tp > gpus_per_node or num_heads % tp:
                continue
            dp = num_gpus // tp
            nodes = num_gpus // gpus_per_node
            for zero in (0, 1, 2, 3) if dp > 1 else (0,):
                if offload == "all" and dp > 1 and zero < 3:
                    continue  # weights away from the device are gathered layer by layer, as under ZeRO 3
                for hsdp in (1, nodes) if zero and nodes > 1 and dp % nodes == 0 and dp > nodes else (1,):
                    yield Layout(zero, tp, dp, hsdp, offload)


def rank_of(load: Load, layout: Layout, batch: Batch, cluster: Cluster) -> Rank:
    """Memory and speed of one layout."""
    memory, host_bytes = rank_memory(load, layout, batch.accumulation)
    step = step_of(load, layout, batch, cluster)
    step_s = closed_form_s(step)
    return Rank(
        layout=layout,
        accumulation=batch.accumulation,
        memory=memory,
        memory_bytes=memory.total,
        host_bytes=host_bytes,
        fits=memory.total <= cluster.device.memory_bytes,
        step_s=step_s,
        waiting_s=step_s - step.busy_s,
        tokens_per_s=layout.dp * batch.accumulation * batch.tokens / step_s,
    )


def scale(
    load: Load,
    batch: Batch,
    cluster: Cluster,
    num_gpus: int,
    samples_per_step: int | None = None,
    most_gpus: int = 512,
) -> Scaling:
    """All layouts of `num_gpus`, and the best of 1, 2, 4 … `most_gpus`.

    With `samples_per_step` all ranks share so many samples a step, the same mathematics on any number of GPUs;
    without, each rank has the recipe's batch, and a step takes in more the more there are.
    """
    samples = load.train.per_device_train_batch_size

    def ranks(number: int) -> list[Rank]:
        found = []
        for layout in possible_layouts(number, cluster.gpus_per_node, load.num_heads):
            part = batch.shared(samples, samples_per_step, layout.dp)
            if part is not None:
                found.append(rank_of(load, layout, part, cluster))
        return sorted(found, key=lambda one: (not one.fits, -one.tokens_per_s))

    curve = []
    for power in range(most_gpus.bit_length()):
        best = _best(ranks(1 << power))
        if best is not None:
            curve.append(best)
    paying = takewhile(lambda two: two[1].tokens_per_s >= _WORTH * two[0].tokens_per_s, pairwise(curve))
    worth = [*curve[:1], *(larger for _, larger in paying)]
    worth_gpus = worth[-1].layout.num_ranks if worth else 0
    return Scaling(cluster, num_gpus, samples_per_step, ranks(num_gpus), curve, worth_gpus)


def _best(ranks: list[Rank]) -> Rank | None:
    """The simplest of those that fit and are within 2 % of the fastest."""
    fitting = [one for one in ranks if one.fits]
    if not fitting:
        return None
    near = [one for one in fitting if one.tokens_per_s >= 0.98 * fitting[0].tokens_per_s]
    return min(near, key=lambda one: _complexity(one.layout))


def _complexity(layout: Layout) -> tuple[int, ...]:
    return OFFLOADS.index(layout.offload), layout.tp, layout.zero, layout.hsdp
