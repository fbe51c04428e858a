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

from counted import counted_bytes, in_processes, recipe_of
from firefly.model.families import CausalModel, transformers_model
from firefly.model.load import load_model, read_config
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss
from firefly.model.split import split
from firefly.recipe import Recipe
from firefly.train.memory import depth_of
from firefly.train.parallel import Parts, Ranks, before_micro_batch, distribute, is_whole, take_places
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


def one_step(model: CausalModel, recipe: Recipe, ranks: Ranks, bf16: bool) -> None:
    """Forward and backward of a step as the loop has them."""
    parts = Parts(dict(transformers_model(model).named_parameters()), ranks)
    accumulation = recipe.train.gradient_accumulation_steps
    for micro in range(accumulation):
        before_micro_batch(model, recipe.parallel, last=micro == accumulation - 1)
        torch.autograd.backward(batch_loss(model, a_batch(), bf16)[0])
    parts.take_gradients()


Case = tuple[Path, dict[str, Any], int, bool]  # model, the table parallel, accumulation, bf16 products


def check(_rank: int, cases: list[Case]) -> None:
    """Run one step of each case and compare."""
    for folder, parallel, accumulation, bf16 in cases:
        recipe = recipe_of(parallel, {"gradient_accumulation_steps": accumulation})
        ranks, model, config = (
            take_places(recipe, torch.device("cpu")),
            load_model(folder),
            read_config(folder),
        )
        if not is_whole(recipe.parallel, ranks):
            distribute(model, recipe.parallel, ranks, bf16)
        counted = counted_bytes(partial(one_step, model, recipe, ranks, bf16))
        layout = Layout.of(recipe.parallel, ranks.world_size, num_heads=ranks.tp)
        expected = communication_bytes(Units.of(config), layout, accumulation, Widths.of(bf16))
        if layout.tp == 1:
            assert counted == expected, (folder.parent.name, parallel, counted, expected)
            continue
        expected["all_reduce"] += accumulation * states_bytes(config, layout, recomputed=False)
        # A split matrix's bias is split too, which the formula passes over.
        assert counted == {kind: pytest.approx(size, rel=0.02) for kind, size in expected.items()}, parallel


def states_bytes(config: dict[str, Any], layout: Layout, recomputed: bool) -> int:
    """What tensor-parallel ranks sum in one micro-batch."""
    batch = a_batch()
    sizes = config["hidden_size"], len(batch.input_ids), len(batch.target_ids)
    layer, around = state_messages(*sizes, layout, Widths(), recomputed)
    inside = depth_of(config) * sum(one.num_bytes * one.times for one in layer)
    return inside + sum(one.num_bytes * one.times for one in around)


def test_two_processes_send_what_the_formula_says(tiny: Callable[[str], Path]) -> None:
    bloom, qwen3, llama = tiny("bloom"), tiny("qwen3"), tiny("llama")
    cases: list[Case] = [(bloom, {"zero": zero}, 2, True) for zero in (0, 1, 2, 3)]
    cases += [(qwen3, {"zero": zero}, 1, False) for zero in (0, 1, 3)]
    cases += [(llama, {"zero": 3}, 1, True)]  # its head is no embedding
    cases += [(bloom, {"zero": 3, "offload": "all"}, 2, False)]
    in_processes(check, 2, cases)


@pytest.mark.nightly
def test_four_processes_send_what_the_formula_says(tiny: Callable[[str], Path]) -> None:
    """Three shards would pad; four of 503 rows do, and so do two replicas of two."""
    layouts = [{"zero": zero} for zero in (0, 1, 2, 3)] + [{"zero": zero, "hsdp": 2} for zero in (1, 2, 3)]
    cases: list[Case] = [(tiny("bloom"), layout, 3, True) for layout in layouts]
    cases += [(tiny("bloom"), {"zero": zero, "tp": 2}, 3, False) for zero in (0, 2, 3)]
    in_processes(check, 4, cases)


def check_tensor_parallel(_rank: int, folders: list[Path]) -> None:
    batch = a_batch()
    for folder, recomputed in product(folders, (False, True)):
        model = load_model(folder)
        split(model, init_device_mesh("cpu", (2,)))
        model.checkpoint_every = int(recomputed)
        counted = counted_bytes(lambda model=model: batch_loss(model, batch)[0].backward())  # type: ignore[misc]
        expected = states_bytes(read_config(folder), Layout(tp=2), recomputed)
        assert counted == {"all_reduce": expected}, (folder, recomputed, counted)


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
