"""torch.compile for the layers of a model, where it works.

Layers are compiled one by one, as they are all alike, and with dynamic shapes, as no two packed batches have the same
number of tokens. Attention stays outside, so norms, activations, biases and residuals are what gets fused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from firefly.console import warn
from firefly.model.families import CausalModel


def compile_layers(model: CausalModel, device: torch.device) -> bool:
    """Compile every layer, once `checkpoint_every` is set; where torch.compile does not work on this machine, say so
    and change nothing."""
    if (problem := _compiler_problem(device)) is not None:
        warn(f"torch.compile does not work here ({problem}), so train.compile is ignored.")
        return False
    layer: Any
    for layer in model.layers:
        if getattr(layer, "gradient_checkpointing", False):
            # transformers recomputes within the layer's forward, where the compiler, stopped by attention, gives up.
            layer._gradient_checkpointing_func = partial(_recompute, layer._gradient_checkpointing_func)
        else:
            layer.compile(dynamic=True)
    return True


def _recompute(checkpoint: Callable[..., Any], run: partial[Any], *inputs: Any) -> Any:
    """transformers' checkpointing of `run`, its layer's forward pass, with the compiler inside and not around it."""
    return checkpoint(partial(_compiled(run.func), *run.args, **run.keywords), *inputs)


@cache
def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=True)


def _compiler_problem(device: torch.device) -> str | None:
    """What stops torch.compile, found by compiling something small: often a missing C++ compiler or Triton."""
    try:
        torch.autograd.backward(
            torch.compile(_probe, dynamic=True)(torch.ones(8, device=device, requires_grad=True))
        )
    except Exception as error:  # whatever it is, training goes on without the compiler
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    return None


def _probe(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(values).sum()
