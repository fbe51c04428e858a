"""Peak memory of training, found by walking through a real step on tensors without data.

torch's `FakeTensorMode` computes shapes alone, and a ledger beneath it sees every storage come and go. The
prediction so follows whatever model, attention, loss and optimizer really do, and nothing is loaded. A deep model
is walked at two small depths and extended: within one phase of a step every byte is linear in the depth.

The walk is the CPU's path. On CUDA the loss works in larger chunks, which is reckoned in; torch's caching allocator
and the CUDA context come on top as estimates. The CUDA figures were never compared with a GPU.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firefly.data.loader import Batch
from firefly.model.adapters import attach, empty_model, linear_layers, round_frozen
from firefly.model.families import CausalModel, transformers_model
from firefly.model.loss import CHUNK_BYTES
from firefly.model.packed import PackedInput
from firefly.model.score import token_losses
from firefly.recipe import TrainSection
from firefly.train.objectives import NextToken, Preference
from firefly.train.optim import make_optimizer

_FRAMEWORK_BYTES = {"cpu": 450 << 20, "cuda": 700 << 20}
"""Interpreter and libraries; on CUDA also its context and the workspaces of cuBLAS. Both are estimates."""
_CACHE_SHARE = {"cpu": 0.0, "cuda": 0.06}
"""What torch's caching allocator holds beyond the tensors: rounding and fragments (an estimate)."""
_DEPTHS = (2, 4)  # each so many times as deep as recomputing every n-th layer repeats


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most are in use, by what they are for."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    cache: int  # held by the allocator, in no tensor
    framework: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, one.name) for one in fields(self))

    @property
    def tensors(self) -> int:
        """What the allocator hands out to tensors: all but cache and framework."""
        return self.total - self.cache - self.framework

    @property
    def fixed(self) -> int:
        """What no smaller batch changes."""
        return self.weights + self.optimizer + self.framework


@dataclass(frozen=True)
class BatchShape:
    """What of a batch decides about memory: tokens, tokens of its longest sample, and learned tokens."""

    tokens: int
    longest: int
    targets: int


def walk_phases(
    config: dict[str, Any],
    train: TrainSection,
    batch: BatchShape,
    held_out: BatchShape | None,
    bf16: bool,
    device_kind: str,
) -> list[Counter[str]]:
    """Bytes in tensors by what they are for, at the peak of every phase of a run: of training steps of `batch`, the
    largest one, and of validation batches of `held_out`."""
    num_layers = depth_of(config)
    every = max(1, train.gradient_checkpointing)
    depths = (_DEPTHS[0] * every, _DEPTHS[1] * every)
    if num_layers <= max(depths):
        phases = _walk(config, train, batch, held_out, bf16)
    else:
        walks = (_walk(at_depth(config, depth), train, batch, held_out, bf16) for depth in depths)
        phases = [_extended(one, two, depths, num_layers) for one, two in zip(*walks, strict=True)]
    if device_kind == "cuda":
        for phase in phases:
            phase["logits"] = int(phase["logits"] * _more_rows(config["vocab_size"], batch.targets))
    return phases


def memory_at_peak(phases: list[Counter[str]], device_kind: str, collectives_bytes: int = 0) -> Memory:
    """The memory of the phase with most bytes, with what the allocator and the libraries hold beside them."""
    peak = max(phases, key=Counter.total)
    return Memory(
        **{name: peak[name] for name in ("weights", "gradients", "optimizer", "activations", "logits")},
        cache=int(_CACHE_SHARE[device_kind] * peak.total()),
        framework=_FRAMEWORK_BYTES[device_kind] + collectives_bytes,
    )


def depth_of(config: dict[str, Any]) -> int:
    """Layers of a config.json's model."""
    return int(config["n_layer"] if "n_layer" in config else config["num_hidden_layers"])


def at_depth(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """The same model with `depth` layers."""
    small = config | {name: depth for name in ("n_layer", "num_hidden_layers") if name in config}
    if small.get("layer_types"):
        small["layer_types"] = (small["layer_types"] * depth)[:depth]
    return small


def _extended(
    shallow: Counter[str], deeper: Counter[str], depths: tuple[int, int], depth: int
) -> Counter[str]:
    """The straight line through two depths, at `depth`."""
    one, two = depths
    return Counter(
        {
            name: max(0, shallow[name] + (deeper[name] - shallow[name]) * (depth - one) // (two - one))
            for name in shallow | deeper
        }
    )


def _more_rows(vocab_size: int, num_targets: int) -> float:
    """How many times more logits a chunk holds on CUDA than on the CPU."""
    rows = {kind: max(1, min(num_targets, size // (4 * vocab_size))) for kind, size in CHUNK_BYTES.items()}
    return rows["cuda"] / rows["cpu"]


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all living storages by label, and their composition at the peak of each phase."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.vocab_size = vocab_size
        self.labels: dict[int, tuple[str, int]] = {}  # a storage's address → label, bytes
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.phases: list[Counter[str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.labels:
            return
        label = "activations"
        if tensor.ndim == 2 and tensor.shape[1] == self.vocab_size:
            label = "logits"
        elif tensor.ndim == 2 and tensor.shape[0] == self.vocab_size and torch.is_floating_point(tensor):
            label = "gradients"  # of the output matrix; weights get their label when they are made
        self.labels[key] = (label, storage.nbytes())
        self.now[label] += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self._look()

    def _forget(self, key: int) -> None:
        label, size = self.labels.pop(key)
        self.now[label] -= size

    def _look(self) -> None:
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def relabel(self, tensor: Tensor, label: str) -> None:
        key = tensor.untyped_storage()._cdata
        if key in self.labels:
            before, size = self.labels[key]
            self.labels[key] = (label, size)
            self.now[before] -= size
            self.now[label] += size

    def begin_phase(self) -> None:
        """From here on another peak counts."""
        self.phases.append(self.peak)
        self.peak = Counter(self.now)


def _walk(
    config: dict[str, Any],
    train: TrainSection,
    batch: BatchShape,
    held_out: BatchShape | None,
    bf16: bool,
) -> list[Counter[str]]:
    """The peak of every phase, always as many: of one step in the middle of a run, and of a validation batch."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    ledger = _Ledger(config["vocab_size"])
    with FakeTensorMode(), ledger:
        model = _model(config, train, bf16)
        model.checkpoint_every = train.gradient_checkpointing
        model.train()
        for tensor in (*model.parameters(), *model.buffers()):
            ledger.relabel(tensor, "weights")
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(parameters, train)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # makes the moments
        optimizer.zero_grad(set_to_none=True)
        for state in optimizer.state.values():
            for tensor in state.values():
                ledger.relabel(tensor, "optimizer")
        made = model.hidden

        def hidden(batch: PackedInput) -> Tensor:
            states = made(batch)
            ledger.begin_phase()  # layers before it, the loss after it: their peaks grow differently with the depth
            return states

        model.hidden = hidden  # type: ignore[method-assign, assignment]
        hook = _halves(ledger, len(parameters))
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
        ledger.begin_phase()
        ledger.phases.clear()  # making the model is no part of a run

        made_of = _batch(batch, train)
        nothing = torch.zeros(len(made_of.sample_ids))
        objective = (
            Preference(train.dpo_beta, nothing, nothing, bf16)
            if train.objective == "dpo"
            else NextToken(bf16)
        )
        for _ in range(min(2, train.gradient_accumulation_steps)):
            loss = objective.loss(model, made_of, torch.device("cpu"))
            ledger.begin_phase()
            torch.autograd.backward(loss.total)
            del loss
            ledger.begin_phase()
        torch.nn.utils.clip_grad_norm_(parameters, train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ledger.begin_phase()
        if held_out is not None:
            token_losses(model, PackedInput.of(_batch(held_out, train), torch.device("cpu")), bf16)
        ledger.begin_phase()
    return ledger.phases


def _halves(ledger: _Ledger, num_parameters: int) -> Callable[[Tensor], None]:
    """A hook that labels gradients, and parts the backward pass where half of them are made.

    While activations go, gradients come: the peak is at one end or the other, and which one depends on the depth.
    """
    done = 0

    def hook(parameter: Tensor) -> None:
        nonlocal done
        assert parameter.grad is not None
        ledger.relabel(parameter.grad, "gradients")
        done += 1
        if done % num_parameters == num_parameters // 2:
            ledger.begin_phase()

    return hook


def _batch(shape: BatchShape, train: TrainSection) -> Batch:
    """A batch of that shape, its samples about as long as the longest: attention is the only part that could tell."""
    num_samples = math.ceil(shape.tokens / shape.longest)
    if train.objective == "dpo":
        num_samples += num_samples % 2
    borders = np.minimum(np.arange(num_samples + 1) * shape.longest, shape.tokens)
    if borders[-2] == shape.tokens:  # an odd sample out: split the last one
        borders[-2] = (borders[-3] + shape.tokens) // 2
    ids, places = np.zeros(shape.tokens, np.int64), np.zeros(shape.targets, np.int64)
    return Batch(ids, ids, borders.tolist(), places, places, places, list(range(num_samples)))


def on_meta(config: dict[str, Any], train: TrainSection, bf16: bool) -> CausalModel:
    """The model as training holds it, in the dtypes of the recipe, without numbers."""
    model = empty_model(config, train)
    if train.method == "full":
        return model
    with torch.device("meta"):
        attach(model, train, Path())
        if train.method != "qlora":
            round_frozen(model, bf16)
            return model
        inner, dtype = transformers_model(model), torch.bfloat16 if bf16 else torch.float32
        for name, layer in linear_layers(inner).items():
            cast(Any, inner.get_submodule(name)).base_layer = _Nf4(layer, dtype)
        for parameter in inner.parameters():
            if parameter.ndim > 1 and not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


def _model(config: dict[str, Any], train: TrainSection, bf16: bool) -> CausalModel:
    """The same on fake tensors. (peft moves modules about, which fake tensors do not bear, but meta ones do.)"""
    with unset_fake_temporarily():
        model = on_meta(config, train, bf16)
    made: dict[int, Tensor] = {}  # a tied matrix once
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, tensor in own.items():
                if tensor is not None and id(tensor) not in made:
                    made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        made[id(tensor)] = nn.Parameter(made[id(tensor)], tensor.requires_grad)
                if tensor is not None:
                    cast(Any, own)[name] = made[id(tensor)]
    return model


class _Nf4(nn.Module):
    """Takes the room of bitsandbytes' 4-bit linear layer: half a byte a weight, a float32 scale for 64 of them, and
    while it works the weights in `dtype`."""

    def __init__(self, layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.bias = layer.weight.shape, dtype, layer.bias
        self.register_buffer("codes", torch.zeros(layer.weight.numel() * 9 // 16, dtype=torch.uint8))

    def forward(self, states: Tensor) -> Tensor:
        out: Tensor = _Dequantised.apply(states.to(self.dtype), self.shape)  # type: ignore[no-untyped-call]
        out = out if self.bias is None else out + self.bias.to(self.dtype)
        return out.to(states.dtype)


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, shape: torch.Size) -> Tensor:
        ctx.shape = shape
        return states @ states.new_empty(shape).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ grad.new_empty(ctx.shape), None
