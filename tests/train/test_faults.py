"""Long runs survive kills, damaged checkpoints and full disks, and their losses are those of a quiet run."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from firefly import api, console
from firefly.errors import CheckpointError, DiskFullError
from firefly.files import sha256_file
from firefly.recipe import Recipe
from firefly.train.checkpoint import Checkpoints, TrainState, find_checkpoints, newest_sound, verify
from firefly.train.parallel import Parts, Ranks
from tiny import recipe_table, write_pairs

FILES = ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Make:
    source = write_pairs(tmp_path / "pairs.jsonl")

    def recipe(out: str | Path = "out", **train: Any) -> Recipe:
        return Recipe.from_table(recipe_table(tmp_path / out, tiny("bloom"), source, **train))

    return recipe


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Everything that a user would be told."""
    lines: list[str] = []
    console.quiet(False)
    monkeypatch.setattr(console, "say", lines.append)
    return lines


def results(out: Path) -> tuple[Any, ...]:
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    return losses, sha256_file(out / "model" / "model.safetensors")


# --- SIGKILL --------------------------------------------------------------------------------------------------------

NURSERY = """
import os, sys
from firefly import api, console
import firefly.app.pipeline, firefly.model.families, transformers
import safetensors.torch, matplotlib.pyplot, torch.utils.tensorboard
console.quiet()
for line in sys.stdin:  # nothing was computed yet, so a fork is clean
    child = os.fork()
    if child == 0:
        api.train(line.strip())
        os._exit(0)
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Nursery:
    """Starts training runs within milliseconds, by forking a process that has imported everything."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ,
        )

    def run(self, recipe: Path, kill_when: Callable[[], bool]) -> bool:
        """Train until `kill_when`, then SIGKILL; whether it was still running."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{recipe}\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        while Path(f"/proc/{child}").exists() and not kill_when():
            time.sleep(0.0005)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(int(self.process.stdout.readline())) == -signal.SIGKILL

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    made = Nursery()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("seed", "kills", "in_saves"),
    [(0, 10, 4), *(pytest.param(seed, 25, 10, marks=pytest.mark.nightly) for seed in range(1, 5))],
)
def test_killed_again_and_again_it_ends_the_same(
    make: Make, nursery: Nursery, tmp_path: Path, seed: int, kills: int, in_saves: int
) -> None:
    """SIGKILL at random moments, some of them while a checkpoint is written; then run to the end."""
    options = {"max_steps": 6 * kills, "save_steps": 2, "eval_steps": 15}
    whole, broken = make("whole", **options), make("broken", **options)
    api.train(whole)
    api.data(broken)
    path = tmp_path / "broken.toml"
    path.write_text(broken.to_toml(), "utf-8")
    run, chance = broken.out / "run", random.Random(seed)

    def newest() -> int:
        return max((int(one.name.split("-")[1]) for one in run.glob("checkpoint-*")), default=0)

    def saving() -> bool:
        return any(run.glob(".checkpoint-*"))

    done = {"in a save": 0, "anywhere": 0}
    for number in range(kills):
        kind, steps, begun = (
            "in a save" if number < in_saves else "anywhere",
            chance.choice([0, 2, 4]),
            newest(),
        )
        wait_s = chance.uniform(0.0, 0.002 if kind == "in a save" else 0.02 if steps else 0.3)

        def due(kind: str = kind, aim: int = begun + steps, wait_s: float = wait_s) -> bool:
            if not saving() if kind == "in a save" else newest() < aim:
                return False
            time.sleep(wait_s)
            return True

        done[kind] += nursery.run(path, due)
    assert done == {"in a save": in_saves, "anywhere": kills - in_saves}, done
    api.train(broken)
    assert results(broken.out) == results(whole.out)


# --- damaged checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run directory with three checkpoints of a small network."""
    network = torch.nn.Linear(20, 30)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    place = tmp_path / "run"
    with Checkpoints(place, parts(network), optimizer, keep=3) as checkpoints:
        for step in (1, 2, 3):
            network(torch.ones(20)).sum().backward()
            optimizer.step()
            checkpoints.save(TrainState(step=step))
    return place


def parts(network: torch.nn.Module) -> Parts:
    """All of a network, in a process alone."""
    return Parts(dict(network.named_parameters()), Ranks(device=torch.device("cpu")))


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.nightly)])
def test_every_flipped_byte_and_truncation_is_found_and_the_one_before_is_taken(
    run: Path, tmp_path: Path, said: list[str], count: int
) -> None:
    chance = random.Random(0)
    for number in range(count):
        place = tmp_path / f"copy{number}"
        shutil.copytree(run, place)
        name = FILES[number % len(FILES)]
        damaged = place / "checkpoint-3" / name
        content = bytearray(damaged.read_bytes())
        if number % 3:
            content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        else:
            del content[chance.randrange(len(content)) :]
        damaged.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"checkpoint-3/{name} is .*damaged"):
            verify(place / "checkpoint-3")
        said.clear()
        assert newest_sound(place) == place / "checkpoint-2"
        assert len(said) == 1 and "going on from checkpoint-2" in said[0] and name.split(".")[0] in said[0]
        assert [path.name for path in find_checkpoints(place)] == ["checkpoint-1", "checkpoint-2"]
        assert (place / "checkpoint-3.damaged" / name).read_bytes() == content
        shutil.rmtree(place)


def test_without_a_sound_checkpoint_nothing_is_touched(run: Path) -> None:
    assert newest_sound(run.parent / "other") is None
    for path in find_checkpoints(run):
        (path / "state.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"checkpoint-3/state\.json is damaged.*No older checkpoint is sound"
    ):
        newest_sound(run)
    assert len(find_checkpoints(run)) == 3


def test_a_run_goes_on_from_the_checkpoint_before_the_damaged_one(make: Make, said: list[str]) -> None:
    whole, made = make("whole"), make()
    api.train(whole)
    api.train(made)
    damaged = made.out / "run" / "checkpoint-8" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (made.out / ".stages" / "train.json").unlink()
    api.train(made)
    assert any("going on from checkpoint-4" in line for line in said)
    assert results(made.out) == results(whole.out)


# --- a full disk ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_at_any_point_of_a_save_leaves_the_checkpoint_before(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room left shrinks page by page, so that every write of a save is once the one that fails."""
    monkeypatch.setattr("firefly.train.checkpoint.require_disk", lambda *_: None)  # the check before the save
    network = torch.nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    checkpoints = Checkpoints(small_disk / "run", parts(network), optimizer, keep=1)

    def save(step: int) -> None:
        network(torch.ones(100)).sum().backward()
        optimizer.step()
        checkpoints.save(TrainState(step=step))
        checkpoints.finish()

    save(1)
    page, failed = 4096, 0
    room = os.statvfs(small_disk)
    for free_pages in range(45):
        filler = small_disk / "filler"
        filler.write_bytes(b"x" * page * (room.f_bavail - free_pages))
        step = 2 + free_pages
        try:
            save(step)
        except DiskFullError:
            failed += 1
            assert newest_sound(small_disk / "run") == small_disk / "run" / "checkpoint-1"
            assert [path.name for path in (small_disk / "run").iterdir()] == ["checkpoint-1"]
        else:
            break
        filler.unlink()
    assert failed > 25 and newest_sound(small_disk / "run") == small_disk / "run" / f"checkpoint-{step}"


def test_a_full_disk_does_not_stop_a_run(
    make: Make, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    """Two saves fail, the run goes on, the next try succeeds, and the losses are those of a quiet run."""
    options = {"max_steps": 24, "save_steps": 10}
    api.train(make("whole", **options))
    made, real, tries = make(**options), Checkpoints.save, []

    def full(checkpoints: Checkpoints, state: TrainState) -> Path:
        tries.append(state.step)
        if state.step in (10, 11):
            raise DiskFullError("The disk is full.")
        return real(checkpoints, state)

    monkeypatch.setattr(Checkpoints, "save", full)
    api.train(made)
    assert tries == [10, 11, 12, 20, 24]
    assert sum("Training goes on; the next checkpoint is tried at step" in line for line in said) == 2
    assert results(made.out) == results(make("whole").out)


def test_metrics_wait_for_space_and_no_line_is_lost_or_broken(small_disk: Path, said: list[str]) -> None:
    from firefly.train.curves import Metrics

    (small_disk / "run").mkdir()
    filler = small_disk / "filler"
    with Metrics(small_disk / "run", 0) as metrics:
        for step in range(1, 40):
            if step == 5:
                filler.write_bytes(b"x" * 4096 * os.statvfs(small_disk).f_bavail)
            if step == 30:
                filler.unlink()
            metrics.write({"step": step, "loss": 1.0, "note": "火" * 150})
        assert [row["step"] for row in metrics.rows()] == list(range(1, 40))
    assert sum("metrics wait in memory" in line for line in said) == 1
