"""Tensor parallelism: several ranks share the arithmetic of every layer (Shoeybi et al. 2019, "Megatron-LM").

    columnwise   each rank holds some of a matrix's outputs: heads, or inner features of the MLP
    rowwise      each rank holds the inputs that belong to them; the partial results are summed over the ranks
    vocabulary   each rank holds some rows of the embedding and of the output matrix

A family says which of its layers are split how (`CausalModel.tp_plan`), in the words of transformers' plans. Norms and
the states between layers are the same on every rank. So a layer sums four times: its states after attention and after
the MLP, and their gradients before either (not before each of the matrices that read them).
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any, cast

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.func import functional_call

from firefly.errors import RecipeError
from firefly.model.bloom import Bloom
from firefly.model.families import CausalModel, transformers_model
from firefly.model.loss import VocabularyRows


def part_of(parameter: DTensor) -> tuple[slice, ...]:
    """Which rows and columns of the whole parameter lie on this rank.

    Tensor parallelism, the last dimension of a mesh, has cut first, and FSDP what that left. `distribute_tensor` cuts
    the other way round, and elsewhere where numbers do not divide.
    """
    bounds = [[0, length] for length in parameter.shape]
    mesh, places = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert places is not None
    for number in reversed(range(mesh.ndim)):
        cut = getattr(parameter.placements[number], "dim", None)
        if cut is not None:  # else it is whole along this dimension of the mesh
            start, stop = bounds[cut]
            each = -(-(stop - start) // mesh.size(number))
            start = min(start + each * places[number], stop)
            bounds[cut] = [start, min(start + each, stop)]
    return tuple(slice(*one) for one in bounds)


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
        "colwise": _Columns(),
        "adapter's": ColwiseParallel(),  # sums the gradient of its few inputs itself
        "rowwise": RowwiseParallel(),
        # Norms of single heads: a rank sees its own heads alone, so their gradients are summed.
        "replicated_with_grad_allreduce": SequenceParallel(sequence_dim=2, use_local_output=True),
    }
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    blocks = {name.rpartition(".")[0] for name, how in model.tp_plan.items() if how == "colwise"}
    for layer in model.layers:
        for name, how in model.tp_plan.items():
            for inner, style in _inside(layer.get_submodule(name), how, mesh):
                parallelize_module(inner, mesh, styles[style], src_data_rank=None)
        for block in blocks:
            _hook_input(layer.get_submodule(block), mesh, Partial(), Replicate())
    _split_vocabulary(model, mesh)
    if isinstance(model, Bloom):
        model.slopes = model.slopes.chunk(mesh.size())[mesh.get_local_rank()]
    for name, parameter in model.named_parameters():  # SequenceParallel forgets what was frozen
        parameter.requires_grad_(learns[name])


def _inside(module: nn.Module, how: str, mesh: DeviceMesh) -> Iterator[tuple[nn.Module, str]]:
    """What is split of a layer's module: itself, or with an adapter the base and the adapter's matrix at the cut."""
    children = dict(module.named_children())
    if "base_layer" not in children:
        yield module, how
        return
    yield children["base_layer"], how
    if how == "rowwise":
        yield from ((matrix, how) for matrix in children["lora_A"].children())
        return
    yield from ((matrix, "adapter's") for matrix in children["lora_B"].children())
    for matrix in children[
        "lora_A"
    ].children():  # whole on every rank, as its gradient; and the block will sum
        _hook_input(matrix, mesh, Replicate(), Partial())


class _Columns(ColwiseParallel):
    """Some columns of a matrix, which leave the gradient of their input a part of a sum."""

    @staticmethod
    def _prepare_input_fn(
        _layouts: Any, _wanted: Any, _module: Any, inputs: Any, mesh: DeviceMesh
    ) -> DTensor:
        return DTensor.from_local(
            inputs[0], mesh, [Replicate()], run_check=False, grad_placements=[Partial()]
        )


def _hook_input(module: nn.Module, mesh: DeviceMesh, inside: Placement, outside: Placement) -> None:
    """A module's input stays as it is; its gradient, which the module makes as `inside`, leaves it as `outside`."""

    def passed(states: Tensor) -> Tensor:
        shared = DTensor.from_local(states, mesh, [Replicate()], run_check=False, grad_placements=[outside])
        return shared.to_local(grad_placements=[inside])

    def hook(_module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
        if args:
            return (passed(args[0]), *args[1:]), named
        return args, named | {"hidden_states": passed(named["hidden_states"])}

    module.register_forward_pre_hook(hook, with_kwargs=True)


def _split_vocabulary(model: CausalModel, mesh: DeviceMesh) -> None:
    embedding, head = model.embedding, getattr(transformers_model(model), "lm_head", None)
    tied = model.head is embedding.weight
    split_embedding(embedding, mesh)
    if head is not None and tied:
        head.weight = embedding.weight
    elif head is not None:
        parallelize_module(head, mesh, ColwiseParallel(), src_data_rank=None)


def split_embedding(embedding: nn.Embedding, mesh: DeviceMesh) -> None:
    """Each rank looks up the tokens whose rows it has; the others are zero here, and all ranks sum.

    DTensor's own embedding makes the gradient of the whole matrix on every rank, this one that of the rows here.
    """
    rows_here = distribute_tensor(embedding.weight, mesh, [Shard(0)], src_data_rank=None)
    embedding.weight = nn.Parameter(rows_here)
    padding = embedding.padding_idx
    plain = copy(embedding)  # the same weight, and the forward of its class: Gemma's also scales

    def forward(ids: Tensor) -> Tensor:  # … → … C
        rows, part = VocabularyRows.of(embedding.weight), cast(DTensor, embedding.weight).to_local()
        places, found = rows.find(ids, len(part))
        if padding is not None:  # its row does not learn
            at = padding - rows.first
            plain.padding_idx = at if 0 <= at < len(part) else None
        states = functional_call(plain, {"weight": part}, (places,)) * found[..., None]
        parts = DTensor.from_local(states, mesh, [Partial()], run_check=False)
        return parts.redistribute(placements=[Replicate()]).to_local()

    embedding.forward = forward  # type: ignore[method-assign, assignment]
