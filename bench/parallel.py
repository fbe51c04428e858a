"""Memory of each process under parallel.zero 0 to 3 and tensor parallelism, counted from the tensors themselves.

    python bench/parallel.py [--quick]      1, 2 and 4 processes on the CPU; quick: 1 and 2

A BLOOM of random weights (hidden 256, 8 layers, vocabulary 4,096; float32) makes two optimizer steps of two
micro-batches. Between the two micro-batches of the second step, when no activation is alive, the storages of all
weights, gradients and optimizer states are counted, and as a layer in the middle begins to work the weights once more.
A row tells them as shares of what the weights take, in the process that has most: 1 is 4 bytes a parameter. With zero 1
and 2 a process keeps its shard beside the gathered weights, so they take 1 + 1/n while the step lasts.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import rows
from firefly.data.loader import pack
from firefly.model.families import build, transformers_model
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss
from firefly.recipe import Recipe, TrainSection
from firefly.train.optim import make_optimizer
from firefly.train.parallel import Parts, before_micro_batch, distribute, is_whole, process_group, take_places

VOCAB = 4096
SHAPE = {"model_type": "bloom", "vocab_size": VOCAB, "hidden_size": 256, "n_layer": 8, "n_head": 8}
LAYOUTS: list[dict[str, int]] = [{"zero": 0}, {"zero": 1}, {"zero": 2}, {"zero": 3}, {"zero": 0, "tp": 2}]


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind some tensors, what they share counted once and what was freed not at all."""
    locals_ = [one.to_local() if isinstance(one, DTensor) else one for one in tensors]
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in locals_}
    return sum(storages.values())


def living_parameters() -> list[nn.Parameter]:
    """All parameters that are alive in this process, shards and gathered ones."""
    tensors = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    return [one for one in tensors if isinstance(one, nn.Parameter)]


def weights_bytes() -> int:
    """Bytes of all of them."""
    return storage_bytes(one.detach() for one in living_parameters())


def gradient_bytes() -> int:
    """Bytes of their gradients."""
    return storage_bytes(one.grad for one in living_parameters() if one.grad is not None)


def measure(layout: dict[str, int]) -> dict[str, float]:
    """Two steps under a layout; shares of the weights' bytes in the process that has most."""
    table = {
        "name": "bench",
        "output_dir": "none",
        "model": {"base": "none"},
        "data": {"sources": [{"path": "none"}]},
    }
    recipe = Recipe.from_table(table | {"parallel": layout})
    ranks = take_places(recipe, torch.device("cpu"))
    torch.manual_seed(0)
    model = build(SHAPE)
    whole = 4 * sum(one.numel() for one in model.parameters())
    if not is_whole(recipe.parallel, ranks):
        distribute(model, recipe.parallel, ranks, bf16=False)
    parts = Parts(dict(transformers_model(model).named_parameters()), ranks)
    optimizer = make_optimizer(parts.local.values(), TrainSection())
    ids = torch.randint(VOCAB, (64,)).numpy()
    batch = PackedInput.of(pack([(ids, ids >= 0)]), ranks.device)
    found: dict[str, int] = {}
    middle = model.layers[len(model.layers) // 2]
    middle.register_forward_pre_hook(lambda *_: found.update(weights_at_work=weights_bytes()))
    for _ in range(2):
        for last in (False, True):
            before_micro_batch(model, recipe.parallel, last)
            torch.autograd.backward(batch_loss(model, batch)[0])
            if not last:
                states = [value for state in optimizer.state.values() for value in state.values()]
                found |= {"weights": weights_bytes(), "gradients": gradient_bytes()}
                found["optimizer"] = storage_bytes(states)
        parts.take_gradients()
        parts.step(optimizer)
        parts.zero_grad()
    most = ranks.highest(torch.tensor(list(found.values()), dtype=torch.float64))
    return dict(zip(found, (most / whole).tolist(), strict=True))


@process_group()
def work(out: Path) -> None:
    """What each process does."""
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    measured = []
    for layout in LAYOUTS:
        if num_processes % layout.get("tp", 1) == 0:
            shares = measure(layout)
            measured.append({"processes": num_processes, "zero": 0, "tp": 1} | layout | shares)
            gc.collect()
    if not dist.is_initialized() or dist.get_rank() == 0:
        out.write_text(json.dumps(measured), encoding="utf-8")


def main() -> None:
    """Start the processes, and write the rows down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="1 and 2 processes only")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    measured: list[dict[str, Any]] = []
    for num_processes in (1, 2) if arguments.quick else (1, 2, 4):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
            subprocess.run([sys.executable, *torchrun, __file__, "--work", str(out)], check=True)
            measured += json.loads(out.read_text("utf-8"))
    table = [{key: round(value, 4) for key, value in row.items()} for row in measured]
    for row in table:
        print("  ".join(f"{name} {value:g}" for name, value in row.items()))
    rows.append("parallel", table)
    names = ("weights", "gradients", "optimizer")
    shares = {
        (row["processes"], row["zero"], row["tp"]): sum(row[name] for name in names) for row in measured
    }
    rows.finish(
        {
            f"zero {zero}, {num} processes": shares[num, zero, 1] / shares[1, 0, 1]
            for num, zero, tp in shares
            if num > 1 and tp == 1
        }
    )


if __name__ == "__main__":
    main()
