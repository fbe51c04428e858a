"""What a device can do at most, and how much memory this process took of it: the scale of a run's figures."""

from __future__ import annotations

import re
import sys

import torch
from torch import nn

from firefly.model.families import CausalModel
from firefly.model.load import num_weights
from firefly.train.gpus import GPUS


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of a CUDA device as its maker states them; None where they are not known, as on a CPU.

    A float32 run is measured against it too: its low share says what bf16 would gain.
    """
    return peak_flops_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_flops_of(device_name: str) -> float | None:
    """The same by the device's name, such as "NVIDIA H200"."""
    for name in sorted(GPUS, key=len, reverse=True):  # "H100 PCIe" before "H100"
        if re.search(rf"\b{re.escape(name.partition('-')[0])}\b", device_name):
            return GPUS[name].bf16_flops
    return None


def training_flops(model: CausalModel) -> tuple[int, int]:
    """Floating-point operations to train on one token, and besides on one that is learned (the output matrix).

    The usual count: 6 a weight (2 forward, 2 for the input's gradient, 2 for its own), 4 for a frozen one.
    Embedding look-ups, attention scores and recomputed layers count nothing.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = {id(one): one for one in model.parameters()}
    body = sum(_flops(one) for key, one in weights.items() if key not in tables and one is not model.head)
    return body, _flops(model.head)


def _flops(weight: torch.Tensor) -> int:
    return num_weights(weight) * (6 if weight.requires_grad else 4)


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory this process held so far: resident on the CPU, allocated by torch on CUDA; else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # elsewhere it counts KiB
