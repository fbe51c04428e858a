"""Tensor parallelism: several ranks share the arithmetic of every layer (Shoeybi et al. 2019, "Megatron-LM").

    columnwise   each rank holds some of a matrix's outputs: heads, or inner features of the MLP
    rowwise      each rank holds the inputs that belong to them; the partial results are summed over the ranks
    vocabulary   each rank holds some rows of the embedding and of the output matrix

A family says which of its layers are split how (`CausalModel.tp_plan`), in the words of transformers' plans. Norms and
the states between layers are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from firefly.errors import RecipeError
from firefly.model.bloom import Bloom
from firefly.model.families import CausalModel, transformers_model


def require_divisible(model: CausalModel, tp: int) -> None:
    """Raise `RecipeError` unless every rank gets as many heads as every other."""
    for what, count in model.num_heads.items():
        if count % tp:
            raise RecipeError(
                f"parallel.tp = {tp} does not divide the model's {count} {what}; choose a tp that divides them."
            )


def split(model: CausalModel, mesh: DeviceMesh) -> None:
    """Share layers, embedding and head of a whole model among the ranks of a one-dimensional mesh, in place."""
    styles: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        # Norms of single heads: a rank sees its own heads alone, so their gradients are summed.
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
    }
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for layer in model.layers:
        for name, how in model.tp_plan.items():
            for inner, style in _inside(layer.get_submodule(name), how):
                parallelize_module(inner, mesh, styles[style], src_data_rank=None)
    _split_vocabulary(model, mesh)
    if isinstance(model, Bloom):
        model.slopes = model.slopes.chunk(mesh.size())[mesh.get_local_rank()]
    for name, parameter in model.named_parameters():  # SequenceParallel forgets what was frozen
        parameter.requires_grad_(learns[name])


def _inside(module: nn.Module, how: str) -> Iterator[tuple[nn.Module, str]]:
    """What is split of a layer's module: itself, or with an adapter the base and the adapter's matrix at the cut."""
    children = dict(module.named_children())
    if "base_layer" not in children:
        yield module, how
        return
    yield children["base_layer"], how
    for matrix in children["lora_B" if how == "colwise" else "lora_A"].children():
        yield matrix, how


def _split_vocabulary(model: CausalModel, mesh: DeviceMesh) -> None:
    embedding, head = model.embedding, getattr(transformers_model(model), "lm_head", None)
    tied = model.head is embedding.weight
    parallelize_module(embedding, mesh, RowwiseParallel(input_layouts=Replicate()), src_data_rank=None)
    if head is not None and tied:
        head.weight = embedding.weight
    elif head is not None:
        parallelize_module(head, mesh, ColwiseParallel(), src_data_rank=None)
