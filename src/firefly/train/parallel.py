"""Several processes as one trainer, on PyTorch's own engine: torchrun starts them, FSDP2 and DTensor share the work.

    parallel.zero   whole on every rank while it works    gradients summed  weights gathered
    0               weights, gradients, optimizer states  once a step       never
    1               weights, gradients                    once a step       once a step
    2               weights                               each micro-batch  once a step
    3               the weights of a layer or two         each micro-batch  each layer, twice a micro-batch

What is not whole is shared among the ranks (Rajbhandari et al. 2020, "ZeRO"). `tp` ranks share each layer's
arithmetic (firefly.model.split), the others, `dp` of them, take shares of the samples. The mesh is
replicas × shards × tp: with `hsdp` replicas of the sharding group, weights travel within a replica alone, and gradients
between replicas once a step.

The optimizer sees plain tensors, this rank's parts of the parameters, so any optimizer works under any layout.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

from firefly.errors import RecipeError
from firefly.model.families import CausalModel
from firefly.model.split import part_of, require_divisible, split
from firefly.recipe import ParallelSection, Recipe

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them; by default it is alone.

    `dp_rank` of `dp` says which share of the samples is its own, `tp_rank` of `tp` which share of a layer.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1
    tp: int = 1
    mesh: DeviceMesh | None = None  # replicate × shard × tp

    @property
    def main(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    @property
    def dp(self) -> int:
        """Ranks with samples of their own."""
        return self.world_size // self.tp

    @property
    def dp_rank(self) -> int:
        """Which of them this is."""
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        """The place among the ranks that share layers."""
        return self.rank % self.tp

    def reseed(self, seed: int, step: int) -> None:
        """Make the random numbers of a step (dropout's) this rank's own, whatever it drew before."""
        if self.world_size > 1:
            torch.manual_seed(hash((seed, step, self.dp_rank)) & 0x7FFF_FFFF_FFFF_FFFF)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over the ranks with samples of their own; alone, the values themselves."""
        if self.mesh is None:
            return values
        total = (
            values.to(self.device, copy=True)
            if self.tp_rank == 0
            else torch.zeros_like(values, device=self.device)
        )
        dist.all_reduce(total)
        return total

    def highest(self, values: Tensor) -> Tensor:
        """The largest over all ranks, element by element; alone, the values themselves."""
        if self.mesh is None:
            return values
        most = values.to(self.device, copy=True)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return most

    def told(self, value: Item) -> list[Item]:
        """What every process says, all of which must."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, ask: Callable[[], Item]) -> Item:
        """What the main process finds, for all of them."""
        found = [ask() if self.main else None]
        if self.mesh is not None:
            dist.broadcast_object_list(found, device=torch.device("cpu"))
        return found[0]  # type: ignore[return-value]

    def share(self, items: Iterable[Item]) -> Iterator[Item]:
        """This rank's share of `items`, as many as every other's: the last ones are given out repeatedly."""
        turn: list[Item] = []
        for item in items:
            turn.append(item)
            if len(turn) == self.dp:
                yield turn[self.dp_rank]
                turn = []
        if turn:
            yield turn[self.dp_rank % len(turn)]


ALONE = Ranks(torch.device("cpu"))


@contextmanager
def process_group() -> Iterator[None]:
    """While the block runs, the processes that torchrun started, if it did, can exchange tensors."""
    mine = not dist.is_initialized()
    if mine and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # Whoever hangs is found by firefly.train.team; a checkpoint or a merge may keep the others waiting long.
        # torchrun's store outlives a restart, with addresses of processes that are gone: each attempt has its own keys.
        store, rank, world_size = next(torch.distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT")
        store = torch.distributed.PrefixStore(f"attempt {attempt}", store)  # type: ignore[attr-defined]
        dist.init_process_group(
            _backend(), store=store, rank=rank, world_size=world_size, timeout=timedelta(days=1)
        )
    yield
    if mine and dist.is_initialized():
        dist.destroy_process_group()  # not after an error: it waits for ranks that may be gone


def _backend() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def take_places(recipe: Recipe, device: torch.device) -> Ranks:
    """Lay the processes out as the recipe says; raises `RecipeError` where it does not fit their number or itself."""
    section = recipe.parallel
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    require_layout(recipe, world_size)
    if world_size == 1 and section.offload == "all" and not dist.is_initialized():
        # FSDP2 brings the layers, and wants a group of processes.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(_backend(), store=store, rank=0, world_size=1)
    elif world_size == 1 and section.offload != "all":
        return Ranks(device)
    dp = world_size // section.tp
    replicas = dp if section.zero == 0 else section.hsdp
    shape = (replicas, dp // replicas, section.tp)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard", "tp"))
    return Ranks(device, dist.get_rank(), world_size, section.tp, mesh)


def require_layout(recipe: Recipe, world_size: int) -> None:
    """Raise `RecipeError` unless so many processes can share the work out, and the recipe's options bear it."""
    section, train = recipe.parallel, recipe.train
    group = section.tp * section.hsdp
    if world_size % group:
        raise RecipeError(
            f"parallel.tp = {section.tp} and parallel.hsdp = {section.hsdp} need a multiple of {group} processes and "
            f"there {'is one' if world_size == 1 else f'are {world_size}'}; "
            f"start them with torchrun --nproc-per-node, or change the recipe."
        )
    if section.hsdp > 1 and section.zero == 0:
        raise RecipeError(
            "parallel.hsdp counts replicas of a sharding group, and parallel.zero = 0 shards nothing; "
            "choose zero 1 to 3."
        )
    compact = train.optimizer != "adamw" or train.weights != "float32"
    copies = section.tp > 1 or section.hsdp > 1 or section.zero == 0
    if compact and copies and world_size > 1:
        raise RecipeError(
            "Compact optimizers and bf16 weights round at random, so that copies on several ranks would drift apart; "
            "use parallel.zero 1 to 3 with tp = 1 and hsdp = 1, or train.optimizer = 'adamw' and weights = 'float32'."
        )
    if train.method == "qlora" and (section.tp > 1 or _stage(section) == 3):
        raise RecipeError(
            "train.method = 'qlora' holds the base in 4 bits, which cannot be split; use parallel.zero 0 to 2 with "
            "tp = 1 and without offload = 'all', or train.method = 'lora'."
        )
    if train.method == "dora" and section.tp > 1:
        raise RecipeError(
            "train.method = 'dora' needs whole rows of weights, which parallel.tp splits; use tp = 1, or 'lora'."
        )
    if train.compile and section.tp > 1:
        raise RecipeError(
            "train.compile does not work with parallel.tp > 1, as PyTorch's compiler fails on split layers; use one of "
            "them (parallel.zero goes with both)."
        )


def is_whole(section: ParallelSection, ranks: Ranks) -> bool:
    """Whether every rank has the whole model on its device."""
    return ranks.mesh is None or (ranks.tp == 1 and section.zero == 0 and section.offload != "all")


def distribute(model: CausalModel, section: ParallelSection, ranks: Ranks, bf16: bool) -> None:
    """Share a model in main memory or on the meta device among the ranks, in place; its parameters are DTensors then.

    With `bf16`, weights travel as bf16 and gradients are summed in float32. Frozen weights, which nobody updates, stay
    whole unless zero is 3. What was on the meta device has memory afterwards, for this rank's part, and no values.
    """
    assert ranks.mesh is not None
    if ranks.tp > 1:
        require_divisible(model, ranks.tp)
        split(model, ranks.mesh["tp"])
    away = section.offload == "all"
    if away or (ranks.dp > 1 and section.zero > 0):
        _shard(model, section, ranks, bf16)
    home = torch.device("cpu") if away else ranks.device

    def settle(tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return torch.empty_like(tensor, device=home)
        # Away from the device, FSDP2 has put everything where it belongs.
        return tensor if away or tensor.device.type == home.type else tensor.to(home)

    model._apply(settle)  # type: ignore[no-untyped-call]


def _shard(model: CausalModel, section: ParallelSection, ranks: Ranks, bf16: bool) -> None:
    """Share the parameters among the ranks with samples of their own, layer by layer."""
    assert ranks.mesh is not None
    away, by_layer = section.offload == "all", _stage(section) == 3
    one_replica = ranks.mesh["replicate"].size() == 1
    whole = set() if by_layer else {p for p in model.parameters() if not p.requires_grad}
    on_gpu = ranks.device.type == "cuda"
    policy = MixedPrecisionPolicy(
        torch.bfloat16 if bf16 else None, torch.float32 if bf16 else None, cast_forward_inputs=False
    )
    for module in (*model.layers, model):
        fully_shard(
            module,
            mesh=ranks.mesh["shard"] if one_replica else ranks.mesh["replicate", "shard"],
            reshard_after_forward=by_layer and module is not model,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=on_gpu) if away else OffloadPolicy(),
            ignored_params=whole,
        )
        module.set_gradient_divide_factor(1.0)  # the loss is divided by what all ranks learn from
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    register_fsdp_forward_method(model, "hidden")


def before_micro_batch(model: CausalModel, section: ParallelSection, last: bool) -> None:
    """Set what the next backward pass reduces and frees; `last` of its step or not."""
    if isinstance(model, FSDPModule):
        stage = _stage(section)
        model.set_requires_gradient_sync(last or stage >= 2)
        model.set_requires_all_reduce(last)
        model.set_reshard_after_backward(last or stage == 3)
        model.set_is_last_backward(last)


def _stage(section: ParallelSection) -> int:
    """How little is kept on the device between uses: with everything in main memory as little as possible."""
    return 3 if section.offload == "all" else section.zero


class Parts:
    """This rank's parts of the parameters that learn, as plain tensors of their own, by the parameters' names."""

    def __init__(self, parameters: dict[str, nn.Parameter], ranks: Ranks) -> None:
        self.whole, self.ranks = parameters, ranks
        self.by_fsdp = any("shard" in _mesh_of(parameter) for parameter in parameters.values())
        with torch.no_grad():
            self.here = {
                name: nn.Parameter(p.to_local()) if isinstance(p, DTensor) else p
                for name, p in parameters.items()
            }
        self.local = self.here  # what the optimizer sees

    def take_gradients(self) -> None:
        """Hand the gradients that a step's backward passes left over to the parts."""
        for parameter, part in zip(self.whole.values(), self.here.values(), strict=True):
            if part is parameter or parameter.grad is None:
                continue
            assert isinstance(parameter, DTensor) and isinstance(parameter.grad, DTensor)
            part.grad = parameter.grad.redistribute(placements=parameter.placements).to_local()
            parameter.grad = None
        if self.ranks.mesh is not None and self.ranks.dp > 1 and not self.by_fsdp:
            group = self.ranks.mesh.get_group("replicate")
            gradients = [part.grad for part in self.here.values() if part.grad is not None]
            for work in [dist.all_reduce(one, group=group, async_op=True) for one in gradients]:
                assert work is not None
                work.wait()

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm is at most that; returns what it was."""
        norm = self._gradient_norm()
        torch.nn.utils.clip_grads_with_norm_(self.here.values(), max_norm, norm)
        return norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parts with their gradients."""
        optimizer.step()

    def put(self, name: str, values: Tensor) -> None:
        """Give this rank's part of a parameter new values."""
        self.local[name].data.copy_(values)

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, over all parts of all ranks."""
        gradients = {name: part.grad for name, part in self.here.items() if part.grad is not None}
        if self.ranks.mesh is None:
            return torch.nn.utils.get_total_norm(list(gradients.values()))
        mine = [g.double().square().sum() for name, g in gradients.items() if self.counts(name)]
        squares = torch.stack(mine).sum() if mine else torch.zeros((), dtype=torch.float64)
        squares = squares.to(self.ranks.device)
        dist.all_reduce(squares)
        return squares.sqrt().float()

    def counts(self, name: str) -> bool:
        """Whether this rank's part of a parameter is the one that counts, of those that are copies of it."""
        mesh, parameter = self.ranks.mesh, self.whole[name]
        if mesh is None:
            return True
        places = parameter.placements if isinstance(parameter, DTensor) else ()
        shared_over = {
            name for name, place in zip(_mesh_of(parameter), places, strict=True) if not place.is_replicate()
        }
        return all(
            name in shared_over or mesh.get_local_rank(name) == 0 for name in mesh.mesh_dim_names or ()
        )

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.whole.values(), *self.here.values()):
            parameter.grad = None

    def gather(self, name: str, part: Tensor) -> Tensor:
        """Put the parts of something shaped like parameter `name` together again; all ranks must ask."""
        parameter = self.whole[name]
        if not isinstance(parameter, DTensor) or part.shape != self.local[name].shape:
            return part
        whole = DTensor.from_local(
            part.to(self.ranks.device),
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return whole.full_tensor()

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of something shaped like parameter `name`."""
        parameter = self.whole[name]
        if not isinstance(parameter, DTensor) or whole.shape != parameter.shape:
            return whole
        return whole[part_of(parameter)].to(self.ranks.device)


def _mesh_of(parameter: Tensor) -> tuple[str, ...]:
    """The dimensions of the mesh that a parameter is laid out on."""
    return (parameter.device_mesh.mesh_dim_names or ()) if isinstance(parameter, DTensor) else ()
