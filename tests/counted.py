"""Count the bytes of every collective that a step makes, and run such steps in several processes of gloo."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from firefly.recipe import Recipe

_KINDS = {"gather": "all_gather", "reduce_scatter": "reduce_scatter", "reduce": "all_reduce"}
_SMALL_BYTES = 32  # scalars: counts, the gradient's norm


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the largest buffer of every call into c10d, functional or not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, torch.distributed.tensor.DTensor) for one in types):
            return NotImplemented  # so that the collectives inside its operations are seen
        out = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.replace("allgather", "all_gather").replace("allreduce", "all_reduce")
            kind = next((kind for word, kind in _KINDS.items() if word in name), None)
            sizes = [leaf.nbytes for leaf in tree_leaves((args, out)) if isinstance(leaf, Tensor)]
            if kind and max(sizes) > _SMALL_BYTES and _group_size(args) > 1:
                self.bytes[kind] += max(sizes)
        return out


def _group_size(args: tuple[Any, ...]) -> int:
    """Of the process group among the arguments: an object, or a name."""
    for leaf in tree_leaves(args):
        if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
            return dist.ProcessGroup.unbox(leaf).size()
    name = next(
        leaf for leaf in tree_leaves(args) if isinstance(leaf, str) and leaf not in ("sum", "max", "avg")
    )
    return dist.distributed_c10d._resolve_process_group(name).size()


def counted_bytes(step: Callable[[], object]) -> Counter[str]:
    """Bytes by kind that this process's collectives hold while `step` runs: the whole buffer of each.

    Small ones (counts, norms) are left out.
    """
    with _Counting() as counting:
        step()
    return counting.bytes


def recipe_of(parallel: dict[str, Any], train: dict[str, Any]) -> Recipe:
    """A recipe of a layout and of options of training, without a model or data."""
    table: dict[str, Any] = {"name": "shares", "output_dir": "none", "model": {"base": "none"}}
    table["data"] = {"sources": [{"path": "none"}]}
    return Recipe.from_table(table | {"parallel": parallel, "train": train})


def in_processes(work: Callable[..., None], num: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `num` gloo processes; their first exception is raised here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_joined, (work, num, port, arguments), nprocs=num)  # type: ignore[no-untyped-call]


def _joined(rank: int, work: Callable[..., None], num: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=num)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
