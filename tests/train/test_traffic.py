"""Bytes on the wire: what the formula says is what FSDP2 and all-reduce send, counted in two processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from counted import counted_bytes, in_processes
from firefly.model.families import CausalModel
from firefly.model.load import load_model, read_config
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss
from firefly.model.split import split
from firefly.train.memory import depth_of
from firefly.train.traffic import (
    Layout,
    Message,
    Units,
    Widths,
    communication_bytes,
    link_bytes,
    state_messages,
)


def a_batch() -> PackedInput:
    ids = torch.arange(24) % 50
    return PackedInput(ids, torch.arange(24) % 12, [0, 12, 24], torch.arange(1, 20), ids[2:21])


def shard(model: CausalModel, layout: Layout, bf16: bool) -> None:
    """The stages as FSDP2 has them; 0 is a shard of one, and replicas."""
    mesh = init_device_mesh("cpu", (layout.size("replica"), layout.size("shard")), mesh_dim_names=("r", "s"))
    options: dict[str, Any] = {
        "mesh": mesh if layout.size("replica") > 1 else mesh["s"],
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16 if bf16 else None, torch.float32),
    }
    for layer in model.layers:
        fully_shard(layer, reshard_after_forward=layout.zero == 3, **options)
    fully_shard(model, reshard_after_forward=False, **options)
    register_fsdp_forward_method(model, "hidden")


def one_step(model: CausalModel, layout: Layout, accumulation: int) -> None:
    """Forward and backward of a step, gradients summed as late as the stage allows."""
    for micro in range(accumulation):
        last = micro == accumulation - 1
        model.set_requires_gradient_sync(last or layout.zero >= 2)  # type: ignore[operator]
        model.set_requires_all_reduce(last)  # type: ignore[operator]
        model.set_reshard_after_backward(last or layout.zero == 3)  # type: ignore[operator]
        batch_loss(model, a_batch())[0].backward()


Case = tuple[Path, Layout, int, bool]


def check(_rank: int, cases: list[Case]) -> None:
    """Run one step of each case and compare."""
    for folder, layout, accumulation, bf16 in cases:
        model = load_model(folder)
        shard(model, layout, bf16)
        counted = counted_bytes(partial(one_step, model, layout, accumulation))
        units = Units.of(read_config(folder))
        expected = communication_bytes(units, layout, accumulation, Widths.of(bf16))
        if counted != expected:
            raise AssertionError(f"{layout}, {folder.parent.name}: {counted} counted, {expected} expected")


def test_two_processes_send_what_the_formula_says(tiny: Callable[[str], Path]) -> None:
    cases = [(tiny("bloom"), Layout(zero, dp=2), 2, True) for zero in (0, 1, 2, 3)]
    cases += [(tiny("qwen3"), Layout(zero, dp=2), 1, False) for zero in (0, 1, 3)]
    cases += [(tiny("llama"), Layout(3, dp=2), 1, True)]  # its head is no embedding
    in_processes(check, 2, cases)


@pytest.mark.nightly
def test_four_processes_send_what_the_formula_says(tiny: Callable[[str], Path]) -> None:
    """Three shards would pad; four of 503 rows do, and so do two replicas of two."""
    layouts = [Layout(zero, dp=4, hsdp=hsdp) for zero in (0, 1, 2, 3) for hsdp in (1, 2)]
    in_processes(check, 4, [(tiny("bloom"), layout, 3, True) for layout in layouts])


def check_tensor_parallel(_rank: int, folders: list[Path]) -> None:
    batch = a_batch()
    for folder, recomputed in product(folders, (False, True)):
        config, model = read_config(folder), load_model(folder)
        split(model, init_device_mesh("cpu", (2,)))
        model.checkpoint_every = int(recomputed)
        counted = counted_bytes(lambda model=model: batch_loss(model, batch)[0].backward())  # type: ignore[misc]
        layer, around = state_messages(
            config["hidden_size"],
            len(batch.input_ids),
            len(batch.target_ids),
            Layout(tp=2),
            Widths(),
            recomputed,
        )
        sums = [one.num_bytes * one.times for one in around]
        sums += [one.num_bytes * one.times * depth_of(config) for one in layer]
        assert counted == {"all_reduce": sum(sums)}, (folder, recomputed, counted)


def test_tensor_parallel_ranks_sum_what_the_formula_says(tiny: Callable[[str], Path]) -> None:
    """Four times a layer, whether one projection reads the states or several do."""
    in_processes(check_tensor_parallel, 2, [tiny(family) for family in ("bloom", "llama")])


def test_what_a_ring_sends() -> None:
    gather, reduce = Message("all_gather", "shard", 800, 1), Message("all_reduce", "replica", 800, 1)
    assert link_bytes(gather, 8) == 700 and link_bytes(reduce, 8) == 1400 and link_bytes(reduce, 1) == 0


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_sharding_moves_as_much_as_an_all_reduce_and_zero_3_half_as_much_again(zero: int) -> None:
    """Rajbhandari et al. 2020, "ZeRO", section 7: 2Ψ for the first two stages, 3Ψ for the third."""
    units = Units([(64, 8)], [(8, 8)] * 12, 10_000)
    plain, ours = (communication_bytes(units, Layout(stage, dp=8)) for stage in (0, zero))

    def sent(counted: Counter[str]) -> float:
        return sum(link_bytes(Message(kind, "shard", size, 1), 8) for kind, size in counted.items())  # type: ignore[arg-type]

    assert sent(ours) / sent(plain) == pytest.approx(1.5 if zero == 3 else 1.0, rel=1e-3)
