"""Tensor parallelism: several ranks share the arithmetic of every layer (Shoeybi et al. 2019, "Megatron-LM").

    columnwise   each rank holds some of a matrix's outputs: heads, or inner features of the MLP
    rowwise      each rank holds the inputs that belong to them; the partial results are summed over the ranks
    vocabulary   each rank holds some rows of the embedding and of the output matrix

A family says which of its layers are split how (`CausalModel.tp_plan`), in the words of transformers' plans. Norms and
the states between layers are the same on every rank.
"""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from firefly.errors import RecipeError
from firefly.model.bloom import Bloom
from firefly.model.families import CausalModel


def require_divisible(model: CausalModel, tp: int) -> None:
    """Raise `RecipeError` unless every rank gets as many heads as every other."""
    for what, count in model.num_heads.items():
        if count % tp:
            raise RecipeError(
                f"parallel.tp = {tp} does not divide the model's {count} {what}; choose a tp that divides them."
            )


def split_layers(model: CausalModel, mesh: DeviceMesh) -> None:
    """Share the layers, the embedding and the head of a whole model among the ranks of a one-dimensional mesh."""
    styles: dict[str, ParallelStyle] = {
        "colwise": ColwiseParallel(),
        "rowwise": RowwiseParallel(),
        # Norms of single heads: a rank sees its own heads alone, so the gradients are summed.
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
    }
    plan = {name: styles[word] for name, word in model.tp_plan.items()}
    for layer in model.layers:
        parallelize_module(layer, mesh, plan, src_data_rank=None)
    if isinstance(model, Bloom):
        model.slopes = model.slopes.chunk(mesh.size())[mesh.get_local_rank()]
