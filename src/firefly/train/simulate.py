"""How long one optimizer step takes on one rank: in closed form, and by simulating its streams, which checks the form.

A rank has six streams. Each does one thing at a time, in the order of issue, as CUDA streams do: `compute`; `link`,
the collectives of the sharding group; `network`, those between replicas; `up` and `down`, transfers from and to main
memory; `host`, the optimizer that runs there. Layers go through them as under FSDP2: while one is computed, the next
`prefetch` ones are gathered, and the gradients of those before are scattered. What is not hidden so is waiting.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """The seconds that each part of a step takes alone; 0 for what a layout does not have. Layers are alike."""

    num_layers: int
    accumulation: int  # micro-batches
    gathers_again: bool  # ZeRO 3: a layer is gathered anew for each pass, else once a step
    scatters_again: bool  # ZeRO 2 and 3: after each micro-batch, else once a step
    evicts_again: bool  # gradients go to main memory after each micro-batch, else once a step
    forward_s: float  # of a layer
    backward_s: float
    root_s: float  # embedding and loss, forward and backward
    update_s: float  # optimizer on the device
    gather_s: float = 0.0  # of a layer
    scatter_s: float = 0.0  # of a layer; or the all-reduce where nothing is sharded
    root_gather_s: float = 0.0
    root_scatter_s: float = 0.0
    replicas_s: float = 0.0  # a layer's all-reduce over replicas
    fetch_s: float = 0.0  # a layer's weights from main memory
    evict_s: float = 0.0  # a layer's gradients to main memory
    host_update_s: float = 0.0  # of all
    upload_s: float = 0.0  # of all weights, after it
    prefetch: int = 1

    @property
    def busy_s(self) -> float:
        """What it takes without any waiting."""
        layers = self.num_layers * (self.forward_s + self.backward_s)
        return self.accumulation * (layers + self.root_s) + self.update_s

    def gathers(self, micro: int) -> bool:
        """Whether the forward pass of a micro-batch must gather."""
        return self.gathers_again or micro == 0


def closed_form_s(step: Step) -> float:
    """The duration of a step: each pass runs at the pace of its slowest stream, plus what fills and drains it."""
    total = step.update_s + _host_s(step)
    backlog_s = 0.0  # gradients that still wait for their way to main memory
    for micro in range(step.accumulation):
        last = micro == step.accumulation - 1
        gather, fetch = (step.gather_s, step.fetch_s) if step.gathers(micro) else (0.0, 0.0)
        forward = _pass_s(step, step.forward_s, gather, fetch, 0.0)
        forward += step.root_gather_s if step.gathers(micro) else 0.0
        gather, fetch = (step.gather_s, step.fetch_s) if step.gathers_again else (0.0, 0.0)
        forward += max(0.0, step.root_s - gather - fetch)  # the last layer is gathered meanwhile
        scatter = step.scatter_s if step.scatters_again or last else 0.0
        backward = _pass_s(step, step.backward_s, gather, fetch, scatter)
        replicas = step.replicas_s if last else 0.0
        evict = step.evict_s if step.evicts_again or last else 0.0
        slow, quick = max(replicas, evict), min(replicas, evict)
        backlog_s = max(0.0, backlog_s - forward) + step.num_layers * slow - backward
        backlog_s = max(slow, backlog_s) + quick
        total += forward + backward
    return total + step.scatter_s + max(step.root_scatter_s, backlog_s)


def _pass_s(step: Step, compute_s: float, gather_s: float, fetch_s: float, scatter_s: float) -> float:
    """All layers once: the first waits for its weights, then one a period."""
    ahead = (gather_s + fetch_s + compute_s) / (step.prefetch + 1)  # so many layers are under way at once
    period = max(compute_s, gather_s + scatter_s, fetch_s, ahead)
    return gather_s + fetch_s + compute_s + (step.num_layers - 1) * period


def _host_s(step: Step) -> float:
    """The optimizer in main memory, layer by layer, and the new weights on their way back meanwhile."""
    slow, quick = max(step.host_update_s, step.upload_s), min(step.host_update_s, step.upload_s)
    return slow + quick / step.num_layers


class _Streams:
    """When each stream is free again."""

    def __init__(self) -> None:
        self.free: defaultdict[str, float] = defaultdict(float)

    def run(self, stream: str, seconds: float, after: Iterable[float] = ()) -> float:
        """Issue work that needs others to be done; returns its end."""
        end = max(self.free[stream], *after) + seconds
        self.free[stream] = end
        return end


def simulated_s(step: Step) -> float:
    """The duration of a step, event by event."""
    streams, layers = _Streams(), range(step.num_layers)
    for micro in range(step.accumulation):
        last = micro == step.accumulation - 1
        if step.gathers(micro):
            streams.run("link", step.root_gather_s, [streams.free["compute"]])
        root = streams.free["link"]
        done = _layers(streams, step, list(layers), step.forward_s, step.gathers(micro), [root])
        streams.run("compute", step.root_s, done[-1:])
        _layers(
            streams, step, list(reversed(layers)), step.backward_s, step.gathers_again, done[-1:], True, last
        )
        if last:
            streams.run("link", step.root_scatter_s, [streams.free["compute"]])
    # The norm of all gradients must be known before the first update.
    begin = max(streams.free.values())
    streams.run("compute", step.update_s, [begin])
    for _ in layers:
        end = streams.run("host", step.host_update_s / step.num_layers, [begin])
        streams.run("up", step.upload_s / step.num_layers, [end])
    return max(streams.free.values())


def _layers(
    streams: _Streams,
    step: Step,
    order: list[int],
    compute_s: float,
    gathers: bool,
    begin: list[float],
    backward: bool = False,
    last: bool = False,
) -> list[float]:
    """One pass over the layers in `order`, none gathered before `begin`; returns when each was computed."""
    ready: list[float] = []
    done: list[float] = []
    for number in range(len(order)):
        while len(ready) < min(number + step.prefetch + 1, len(order)):
            # A layer ahead is issued once the one `prefetch + 1` before it has left its room.
            left = len(ready) - step.prefetch - 1
            room = [done[left]] if left >= 0 else begin
            fetched = streams.run("up", step.fetch_s, room) if gathers else 0.0
            ready.append(streams.run("link", step.gather_s, [*room, fetched]) if gathers else 0.0)
        done.append(streams.run("compute", compute_s, [ready[number], *begin]))
        if backward and (step.scatters_again or last):
            end = streams.run("link", step.scatter_s, [done[number]])
            if last:
                end = streams.run("network", step.replicas_s, [end])
            if step.evicts_again or last:
                streams.run("down", step.evict_s, [end])
    return done
