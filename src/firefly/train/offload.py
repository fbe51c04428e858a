"""Main memory as the device's second storey: optimizer states, weights and activations live there while not in use.

    parallel.offload   in main memory                            on the device
    optimizer          AdamW's states, a copy of the weights     weights, gradients, activations
    all                all that lasts, and activations           the layers at work (FSDP2 brings them)

The optimizer steps on the CPU (Ren et al. 2021, "ZeRO-Offload"). Transfers go through pinned memory on streams of their
own, beside the work: gradients come down while the CPU updates those before them, and updated weights go up meanwhile;
an activation comes back while the backward pass of the layer above it runs. Where the device is the CPU itself all this
is plain copies, which is how it is tested; the CUDA paths have not run yet.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from firefly.data.loader import Batch
from firefly.train.parallel import Parts, Ranks

_BUCKET_BYTES = 64 << 20  # of gradients that come down together, and are updated together


class OffloadedParts(Parts):
    """Parts whose optimizer lives in main memory: it sees float32 copies there, and the device gets them back."""

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        super().__init__(parameters, ranks)
        self.pinned = ranks.device.type == "cuda"
        self.down, self.up = Stream(ranks.device), Stream(ranks.device)
        self.local = {name: nn.Parameter(self._host_copy(part.detach())) for name, part in self.here.items()}
        self._gradients: dict[str, Tensor] = {}  # made at the first step, then used again

    def _host_copy(self, values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=self.pinned).copy_(values)

    def put(self, name: str, values: Tensor) -> None:
        """Give this rank's part of a parameter new values, in both places."""
        super().put(name, values)
        self.here[name].data.copy_(self.local[name].data)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update bucket by bucket, each while the next one's gradients come down and the last one's weights go up."""
        buckets = [(bucket, self._bring_down(bucket)) for bucket in self._buckets()]
        for bucket, arrived in buckets:
            arrived()
            for name in bucket:
                self.local[name].grad = self._gradients[name]
            optimizer.step()  # passes over the parameters that have no gradient now
            for name in bucket:
                self.local[name].grad = None
            with self.up.beside():
                for name in bucket:
                    self.here[name].data.copy_(self.local[name].data, non_blocking=True)
        self.up.join()

    def _buckets(self) -> Iterator[list[str]]:
        bucket: list[str] = []
        size = 0
        for name, part in self.here.items():
            if part.grad is None:
                continue
            if bucket and size + part.grad.nbytes > _BUCKET_BYTES:
                yield bucket
                bucket, size = [], 0
            bucket.append(name)
            size += part.grad.nbytes
        if bucket:
            yield bucket

    def _bring_down(self, names: list[str]) -> Callable[[], None]:
        """Start copying gradients to main memory; returns what waits for them."""
        with self.down.beside():
            for name in names:
                gradient = self.here[name].grad
                assert gradient is not None
                if name not in self._gradients:
                    self._gradients[name] = self._host_copy(gradient)
                self._gradients[name].copy_(gradient, non_blocking=True)
                self.down.keep(gradient)
                self.here[name].grad = None
            return self.down.mark()


class Stream:
    """A side stream of a CUDA device; on the CPU, where everything runs in order, none."""

    def __init__(self, device: torch.device) -> None:
        self.cuda: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Work of the block runs beside what comes next, after what is under way now."""
        if self.cuda is None:
            yield
            return
        self.cuda.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.cuda):
            yield

    def keep(self, tensor: Tensor) -> None:
        """Memory of a tensor that this stream reads is not given away before it has."""
        if self.cuda is not None:
            tensor.record_stream(self.cuda)

    def mark(self) -> Callable[[], None]:
        """What waits, on the host, for the work given to this stream so far."""
        return self.cuda.record_event().synchronize if self.cuda is not None else lambda: None

    def join(self, *made: Tensor) -> None:
        """The device's main work goes on after this stream's; it uses the tensors `made` here."""
        if self.cuda is not None:
            torch.cuda.current_stream().wait_stream(self.cuda)
            for tensor in made:
                tensor.record_stream(torch.cuda.current_stream())


@dataclass(eq=False)
class _Away:
    """One activation in main memory, and on the device again once it is asked for or likely to be."""

    host: Tensor
    back: Tensor | None = None


@contextlib.contextmanager
def activations_away(batch: Batch, ranks: Ranks) -> Iterator[None]:
    """What the forward pass of a batch saves for the backward pass goes to main memory, if it is a row a token.

    With `gradient_checkpointing` that is one hidden state a layer. Weights, which autograd saves too, stay.
    """
    num_tokens, device = len(batch.input_ids), ranks.device
    stream, on_gpu = Stream(device), device.type == "cuda"
    saved: list[_Away] = []

    def pack(tensor: Tensor) -> Tensor | _Away:
        of_tokens = tensor.is_floating_point() and num_tokens in tensor.shape[:2]
        if not of_tokens or type(tensor) is not Tensor:  # a parameter's type is another
            return tensor
        with stream.beside():
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            host.copy_(tensor, non_blocking=True)
        stream.keep(tensor)
        saved.append(_Away(host))
        return saved[-1]

    def fetch(away: _Away) -> Tensor:
        if away.back is None:
            with stream.beside():
                away.back = away.host.to(device, non_blocking=True, copy=True)
        return away.back

    def unpack(packed: Tensor | _Away) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        back = fetch(packed)
        stream.join(back)
        if packed in saved:  # the backward pass comes to the one before it next
            del saved[saved.index(packed) :]
            if saved:
                fetch(saved[-1])
        return back

    with saved_tensors_hooks(pack, unpack):
        yield
