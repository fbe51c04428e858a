"""A checkpoint of any layout (processes, zero, tp) goes on under any other, and is written beside the training."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crew import run_ranks
from safetensors.torch import load_file

from firefly import api, console
from firefly.errors import CheckpointError
from firefly.recipe import Recipe
from firefly.train import checkpoint
from firefly.train.checkpoint import Checkpoints, TrainState, load_checkpoint, newest_sound, stored_tensors
from firefly.train.loop import train
from firefly.train.optim import CompactAdamW
from firefly.train.parallel import Parts, Ranks
from tiny import recipe_table, write_pairs

LAYOUTS: dict[str, dict[str, Any]] = {
    "alone": {},
    "zero1": {"zero": 1},
    "zero3": {"zero": 3},
    "tp2": {"tp": 2},
}
SAVED, STEPS = 5, 10
Losses = list[tuple[int, float]]


def losses(out: Path) -> Losses:
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


class Bench:
    """Runs of one recipe under different layouts, side by side in one folder, of one dataset and tokens directory."""

    def __init__(self, folder: Path, base: Path, processes: int = 2, **train: Any) -> None:
        self.folder, self.base, self.processes, self.options = folder, base, processes, train
        self.source = write_pairs(folder / "pairs.jsonl")
        api.data(self.recipe("data", "alone"))
        (folder / "data" / "tokens").rename(folder / "tokens")

    def recipe(self, name: str, layout: str) -> Recipe:
        """A recipe that learns from the same samples a step under every layout."""
        section = LAYOUTS[layout]
        shares = 1 if layout == "alone" else self.processes // section.get("tp", 1)
        options = {"max_steps": STEPS, "save_steps": SAVED, "learning_rate": 1e-3, "report_to": []}
        # A key's bias has no effect, so its gradient is rounding alone, which Adam would blow up to full steps.
        options["adam_epsilon"] = 1e-5
        table = recipe_table(
            self.folder / name,
            self.base,
            self.source,
            **options | {"per_device_train_batch_size": 4 // shares} | self.options,
        )
        return Recipe.from_table(table | {"parallel": section})

    def train(self, runs: dict[str, str]) -> None:
        """Train each run under its layout; those of several processes together, for they take long to start."""
        together = []
        for name, layout in runs.items():
            recipe, path = self.recipe(name, layout), self.folder / f"{name}.toml"
            path.write_text(recipe.to_toml(), "utf-8")
            if layout == "alone":
                out = self.folder / name
                train(recipe, self.base, self.folder / "tokens", out / "run", out / "model")
            else:
                together.append(path)
        if together:
            pairs = [str(path) for recipe in together for path in (recipe, self.folder / "tokens")]
            run_ranks(self.processes, pairs)

    def go_on_from(self, before: str, name: str) -> None:
        """The run `name` will begin with the first checkpoint of the run `before`, as soon as there is one."""
        run = self.folder / name / "run"
        run.mkdir(parents=True)
        (run / f"checkpoint-{SAVED}").symlink_to(self.folder / before / "run" / f"checkpoint-{SAVED}")


def every_way(bench: Bench) -> None:
    """Save under each layout and go on under each; the losses are those of the process alone."""
    first = {name: name for name in LAYOUTS}
    resumed = {f"{before}-{after}": after for before in LAYOUTS for after in LAYOUTS}
    for name in resumed:
        bench.go_on_from(name.split("-")[0], name)
    bench.train({"alone": first.pop("alone")})
    bench.train(first | {name: layout for name, layout in resumed.items() if layout != "alone"})
    bench.train({name: layout for name, layout in resumed.items() if layout == "alone"})
    expected = losses(bench.folder / "alone")
    weights = load_file(bench.folder / "alone" / "model" / "model.safetensors")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    for name, layout in resumed.items():
        found = losses(bench.folder / name)
        assert [step for step, _ in found] == list(range(SAVED + 1, STEPS + 1)), name
        assert [loss for _, loss in found] == pytest.approx(
            [loss for _, loss in expected[SAVED:]], abs=1e-5
        ), name
        model = load_file(bench.folder / name / "model" / "model.safetensors")
        for key, tensor in weights.items():
            torch.testing.assert_close(model[key], tensor, atol=1e-5, rtol=0, msg=f"{name} {key}")
        if name == f"{layout}-{layout}":  # nothing changed, so nothing may differ
            assert found == losses(bench.folder / layout)[SAVED:], name
            whole = load_file(bench.folder / layout / "model" / "model.safetensors")
            assert all(torch.equal(model[key], whole[key]) for key in whole), name


def test_a_checkpoint_goes_on_under_every_other_layout(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """And no file of two processes holds all of it: about half of the bytes each, every tensor whole."""
    every_way(Bench(tmp_path, tiny("bloom")))
    alone, zero3 = (tmp_path / name / "run" / f"checkpoint-{STEPS}" for name in ("alone", "zero3"))
    for kind in ("model", "optimizer"):
        shapes = [{k: v.shape for k, v in stored_tensors(path, kind).items()} for path in (alone, zero3)]
        assert shapes[0] == shapes[1]
    sizes = [sum(path.stat().st_size for path in zero3.glob(f"*-0000{rank}-of-*")) for rank in (1, 2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


@pytest.mark.nightly
@pytest.mark.parametrize("family", ["bloom", "qwen3"])
def test_the_same_with_four_processes_and_meshes(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Zero 3 beside tensor parallelism too, and replicas."""
    more = {"zero3_tp2": {"zero": 3, "tp": 2}, "hsdp": {"zero": 2, "hsdp": 2}}
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", LAYOUTS | more)
    every_way(Bench(tmp_path, tiny(family), processes=4))


@pytest.mark.nightly
def test_the_same_with_main_memory(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {
        "alone": {},
        "zero2": {"zero": 2},
        "optimizer": {"zero": 1, "offload": "optimizer"},
        "all": {"zero": 3, "offload": "all"},
    }
    monkeypatch.setattr(sys.modules[__name__], "LAYOUTS", more)
    every_way(Bench(tmp_path, tiny("qwen3")))


@pytest.mark.nightly
def test_8_bit_moments_stay_as_they_were_shared_out(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiny("bloom"), optimizer="adamw_8bit")
    bench.go_on_from("zero3", "same")
    bench.go_on_from("zero3", "other")
    bench.go_on_from("alone", "more")
    bench.train({"alone": "alone"})
    bench.train({"zero3": "zero3", "same": "zero3", "more": "zero3"})
    assert losses(tmp_path / "same") == losses(tmp_path / "zero3")[SAVED:]
    assert "8-bit moments" in (tmp_path / "more.error").read_text("utf-8")
    with pytest.raises(CheckpointError, match=r"8-bit moments.*go on with 2 processes"):
        bench.train({"other": "alone"})


@pytest.mark.parametrize(("before", "after", "told"), [(1, 2, "1 process and"), (2, 1, "2 processes and")])
def test_8_bit_moments_under_another_layout_are_refused(
    tmp_path: Path, before: int, after: int, told: str
) -> None:
    """Whole ones as those of parts: their scales are of blocks, which other parts do not share."""
    network = torch.nn.Linear(20, 30)
    optimizer = CompactAdamW([{"params": list(network.parameters())}], 0.1, eight_bit=True)
    network(torch.ones(20)).sum().backward()
    optimizer.step()
    parts = Parts(dict(network.named_parameters()), Ranks(torch.device("cpu")))
    with Checkpoints(tmp_path, parts, optimizer, keep=1) as checkpoints:
        path = checkpoints.save(TrainState(step=1))
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"processes": before}))
    parts.ranks = Ranks(torch.device("cpu"), 0, after)
    with pytest.raises(CheckpointError, match=f"holds 8-bit moments.*go on with {told} the same parallel"):
        load_checkpoint(path, parts, optimizer, "")


# --- beside the training --------------------------------------------------------------------------------------------


def small(run: Path, keep: int = 2) -> tuple[torch.nn.Linear, Checkpoints]:
    network = torch.nn.Linear(20, 30)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    parts = Parts(dict(network.named_parameters()), Ranks(device=torch.device("cpu")))
    return network, Checkpoints(run, parts, optimizer, keep)


def test_what_is_saved_is_the_moment_of_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes the weights while they are written, and the file does not see it."""
    from threading import Event

    monkeypatch.setattr(checkpoint, "COPIES_FROM", {"cpu"})
    changed, real = Event(), checkpoint.save_file

    def late(*arguments: Any, **options: Any) -> None:
        assert changed.wait(30)
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", late)
    network, checkpoints = small(tmp_path)
    before = network.weight.detach().clone()
    with checkpoints:
        path = checkpoints.save(TrainState(step=1))
        assert not path.exists()
        with torch.no_grad():
            network.weight.add_(1)
        changed.set()
    assert torch.equal(stored_tensors(path, "model")["weight"], before)


def test_without_memory_for_a_copy_it_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "COPIES_FROM", {"cpu"})
    monkeypatch.setattr(checkpoint, "free_memory_bytes", lambda: 1)
    network, checkpoints = small(tmp_path)
    path = checkpoints.save(TrainState(step=1))
    assert newest_sound(tmp_path) == path
    assert torch.equal(stored_tensors(path, "model")["weight"], network.weight)


def test_a_disk_that_is_full_is_noticed_beside_the_training_and_tried_again(
    tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(checkpoint, "COPIES_FROM", {"cpu"})
    console.quiet(False)
    monkeypatch.setattr(console, "say", said.append)
    source = write_pairs(tmp_path / "pairs.jsonl")

    def made(name: str) -> Recipe:
        options = {"max_steps": 30, "save_steps": 20}
        return Recipe.from_table(recipe_table(tmp_path / name, tiny("bloom"), source, **options))

    api.train(made("whole"))
    real, calls = checkpoint.save_file, []

    def full(*arguments: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_file", full)
    api.train(made("full"))
    assert sum("Training goes on; the next checkpoint is tried at step" in line for line in said) == 1
    run = tmp_path / "full" / "run"
    saved = [int(path.name.removeprefix("checkpoint-")) for path in run.glob("checkpoint-*")]
    assert 20 < min(saved) < 30 and max(saved) == 30
    assert losses(tmp_path / "full") == losses(tmp_path / "whole")


def test_a_run_ends_with_the_error_of_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise CheckpointError("broken")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    _, checkpoints = small(tmp_path)
    with pytest.raises(CheckpointError, match="broken"), checkpoints:
        checkpoints.save(TrainState(step=1))
    assert list(tmp_path.iterdir()) == []
