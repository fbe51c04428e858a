"""Scaling: what must hold of any layout's memory and time, whatever the constants are; and where auto puts things."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from firefly.cli import main
from firefly.errors import RecipeError, TrainingError
from firefly.recipe import ParallelSection, Recipe, TrainSection
from firefly.train.gpus import Device, find_gpu
from firefly.train.memory import BatchShape
from firefly.train.plan import assumed_workload, load_of, make_plan, placed
from firefly.train.ranks import Load, choose_offload, rank_memory
from firefly.train.scaling import Batch, Cluster, possible_layouts, rank_of, scale, step_of
from firefly.train.simulate import closed_form_s, simulated_s
from firefly.train.traffic import Layout, Message

GIB = 1 << 30
H100 = Cluster.of(find_gpu("H100"), 8, "NDR")
BLOOM_7B1 = {"model_type": "bloom", "hidden_size": 4096, "n_layer": 30, "n_head": 32, "vocab_size": 46_145}
BLOOM_1B4 = BLOOM_7B1 | {"hidden_size": 2048, "n_layer": 24, "n_head": 16}
BATCH = Batch(1, 2200.0, 1200.0)


@cache
def load(**train: Any) -> Load:
    shapes = BatchShape(3500, 512, 1900), BatchShape(4096, 512, 2200)
    return Load(BLOOM_1B4, TrainSection(**train), *shapes, bf16=True, device_kind="cuda")


def of_rank(layout: Layout, accumulation: int = 1) -> dict[str, int]:
    memory, host_bytes = rank_memory(load(), layout, accumulation)
    return {**vars(memory), "host": host_bytes, "total": memory.total}


def test_each_stage_divides_what_it_shards() -> None:
    """What is left undivided is the working copy, which does not depend on the number of ranks."""
    for zero in (1, 2, 3):
        two, four, eight = (of_rank(Layout(zero, dp=dp), accumulation=2) for dp in (2, 4, 8))
        assert two["optimizer"] == pytest.approx(2 * four["optimizer"], rel=1e-6)
        assert four["optimizer"] == pytest.approx(2 * eight["optimizer"], rel=1e-6)
        assert two["weights"] - four["weights"] == pytest.approx(
            2 * (four["weights"] - eight["weights"]), rel=1e-6
        )
    totals = [of_rank(Layout(zero, dp=64), accumulation=2)["total"] for zero in (0, 1, 2, 3)]
    assert totals == sorted(totals, reverse=True) and totals[3] < 0.6 * totals[0]


def test_offload_moves_what_it_says() -> None:
    none, optimizer, away = (of_rank(Layout(offload=offload)) for offload in ("none", "optimizer", "all"))
    count = load().units.num_parameters
    assert none["host"] == 0 and none["optimizer"] == pytest.approx(8 * count, rel=1e-4)
    assert none["weights"] == pytest.approx(4 * count, rel=1e-4)
    assert optimizer["optimizer"] == 0 and optimizer["host"] == pytest.approx(16 * count)
    assert away["host"] == pytest.approx(16 * count) and away["weights"] + away["gradients"] < 4 * count
    assert away["total"] < optimizer["total"] < none["total"]


@pytest.mark.nightly
def test_seven_billion_parameters_train_in_40_gb_with_offload() -> None:
    recipe = a_recipe(per_device_train_batch_size=8, gradient_checkpointing=True)
    big = load_of(recipe, BLOOM_7B1, assumed_workload(recipe), find_gpu("H200"))
    memory, host_bytes = rank_memory(big, Layout(offload="all"), 8)
    assert memory.total < 40e9 and host_bytes == pytest.approx(16 * big.units.num_parameters)


@pytest.mark.parametrize("num_gpus", [1, 2, 8, 16, 64])
def test_every_layout_takes_as_long_as_its_simulation(num_gpus: int) -> None:
    for layout in possible_layouts(num_gpus, 8, num_heads=16):
        assert layout.num_ranks == num_gpus
        step = step_of(load(), layout, BATCH, H100)
        assert closed_form_s(step) == pytest.approx(simulated_s(step), rel=0.1), layout


def test_a_group_across_nodes_uses_the_adapters_of_all_its_ranks_there() -> None:
    gather = Message("all_gather", "shard", 1 << 30, 1)
    inside, across = (H100.seconds(gather, Layout(3, dp=dp)) for dp in (8, 16))
    slow = Cluster.of(find_gpu("H100"), 8, "5")
    assert across == pytest.approx(inside * (15 / 16) / (7 / 8) * 450 / 400, rel=0.1)
    assert slow.seconds(gather, Layout(3, dp=16)) == pytest.approx(10 * across, rel=0.1)
    alone = Message("all_reduce", "replica", 1 << 30, 1)  # one rank a node: one adapter
    assert H100.seconds(alone, Layout(3, dp=16, hsdp=2)) == pytest.approx((1 << 30) / (0.8 * 50e9), rel=0.01)


def test_a_slower_network_never_helps_and_stops_paying_earlier() -> None:
    fast, slow = (
        scale(load(), BATCH, Cluster.of(find_gpu("H100"), 8, name), 16) for name in ("NDR", "10GbE")
    )
    assert fast.worth_gpus > slow.worth_gpus >= 1
    for one, two in zip(fast.curve, slow.curve, strict=True):
        assert two.tokens_per_s <= one.tokens_per_s * 1.021  # the simplest within 2 % is taken
    assert [one.layout.num_ranks for one in fast.curve] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    assert all(one.fits for one in fast.curve)


def test_a_shared_batch_is_the_same_batch_on_any_number_of_gpus() -> None:
    cluster, samples = H100, 256
    shared = scale(load(), BATCH, cluster, 8, samples)
    for rank in shared.curve:
        part = BATCH.shared(16, samples, rank.layout.dp)
        assert part is not None and part.accumulation == rank.accumulation
        tokens = part.accumulation * part.tokens * rank.layout.dp
        assert tokens == pytest.approx(BATCH.tokens * samples / 16)
        assert rank.tokens_per_s * rank.step_s == pytest.approx(tokens)
    assert BATCH.shared(16, 256, 512) is None


def test_adapters_send_little() -> None:
    slow = Cluster.of(find_gpu("H100"), 8, "10GbE")
    waiting = {
        method: rank_of(load(method=method), Layout(0, dp=16), BATCH, slow).waiting_s
        for method in ("full", "lora")
    }
    assert waiting["lora"] < 0.05 * waiting["full"]


@pytest.mark.parametrize(
    ("device", "host", "chosen"),
    [(100, 0, "none"), (60, 200, "optimizer"), (20, 200, "all"), (60, 50, None), (5, 500, None)],
)
def test_auto_takes_the_first_that_fits_and_says_why(device: int, host: int, chosen: str | None) -> None:
    need = {"none": (80 * GIB, 0), "optimizer": (40 * GIB, 100 * GIB), "all": (10 * GIB, 120 * GIB)}
    if chosen is None:
        with pytest.raises(TrainingError, match=r"do not suffice: none takes 80\.0 GiB .*parallel\.zero = 3"):
            choose_offload(need.__getitem__, device * GIB, host * GIB)
    else:
        offload, why = choose_offload(need.__getitem__, device * GIB, host * GIB)
        assert offload == chosen and f"offload = {chosen}" in why and why.count("takes") >= 1


def test_auto_is_decided_by_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.train.plan.free_memory_bytes", lambda: 500 * GIB)
    whole = of_rank(Layout())["total"]
    for size, expected in ((whole, "none"), (whole - GIB, "optimizer"), (12 * GIB, "all")):
        assert placed(load(), Layout(offload="auto"), Device("one", "cuda", size)).offload == expected


@pytest.mark.parametrize(
    ("section", "num_gpus", "message"),
    [
        ({"tp": 3}, 6, r"tp = 3 must divide the 6 GPUs and the model's 16"),
        ({"tp": 2}, 5, r"tp = 2 must divide the 5 GPUs"),
        ({"zero": 3, "hsdp": 3}, 8, r"hsdp = 3 must divide the 8"),
    ],
)
def test_an_impossible_layout_is_a_sentence(section: dict[str, int], num_gpus: int, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Layout.of(ParallelSection(**section), num_gpus, 16)  # type: ignore[arg-type]


def test_an_unknown_network_is_a_sentence() -> None:
    with pytest.raises(RecipeError, match="did you mean '100GbE'"):
        Cluster.of(find_gpu("H100"), 8, "100GbEE")
    with pytest.raises(RecipeError, match="name the GPU"):
        Cluster.of(find_gpu("24GB"), 8, "NDR")
    assert Cluster.of(find_gpu("H100"), 8, "25 GB/s").network_bytes_per_s == 25e9
    assert Cluster.of(find_gpu("H100"), 4, "100gbe").network_bytes_per_s == 12.5e9 / 4


def a_recipe(**train: Any) -> Recipe:
    return Recipe.from_table(
        {
            "name": "many",
            "output_dir": "out",
            "model": {"base": "base"},
            "data": {"sources": [{"path": "none"}]},
            "train": {"max_steps": 100, **train},
        }
    )


@pytest.mark.nightly
def test_advice_for_a_small_gpu_names_adapters_and_what_it_names_fits() -> None:
    recipe = a_recipe(per_device_train_batch_size=1, gradient_checkpointing=True)
    small = Device("small", "cuda", 6 * GIB)
    made = make_plan(recipe, BLOOM_1B4, assumed_workload, small)
    assert not made.fits and any("method=lora" in one.change for one in made.advice)
    for one in made.advice:
        table = recipe.model_dump()
        for override in one.change.split():
            name, _, value = override.partition("=")
            section, key = name.split(".")
            table[section][key] = (
                json.loads(value) if value[0] in "tf0123456789" and value != "float32" else value
            )
        again = make_plan(Recipe.from_table(table), BLOOM_1B4, assumed_workload, small)
        assert again.fits and again.memory_bytes == one.memory_bytes


def test_the_verb_compares_layouts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(BLOOM_1B4))
    recipe = a_recipe(per_device_train_batch_size=4).model_dump(exclude_none=True) | {
        "model": {"base": str(base)}
    }
    path = tmp_path / "recipe.toml"
    path.write_text(Recipe.from_table(recipe).to_toml())
    options = ["--gpu", "A100", "--gpus", "16", "--interconnect", "25GbE", "parallel.zero=2"]
    for extra in ([], ["--json"]):
        with pytest.raises(SystemExit) as stopped:
            main(["plan", str(path), *options, *extra])
        assert not stopped.value.code
    shown = capsys.readouterr().out
    text, _, table = shown.partition("\n{")
    assert "16 GPUs, 8 a node, 25GbE between nodes" in text and "zero 2 dp 16" in text
    made = json.loads("{" + table)
    assert made["layout"] == {"zero": 2, "tp": 1, "dp": 16, "hsdp": 1, "offload": "none"}
    assert made["scaling"]["curve"][0]["layout"]["dp"] == 1 and made["hours"] > 0
