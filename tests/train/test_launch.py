"""Several processes start alike or say in one sentence why not; when one ends all do, and a restart goes on exactly."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crew import BOUND_S, Crew, Member, results, wait_for_step

from firefly import api
from firefly.app.launch import num_gpus
from firefly.errors import LaunchError
from firefly.recipe import Recipe
from tiny import recipe_table, write_pairs


@pytest.fixture(scope="module")
def crew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crew]:
    made = Crew(tmp_path_factory.mktemp("crew"))
    yield made
    made.close()


Make = Callable[..., Path]


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Make:
    """`make(name, parallel, **train)`: the file of a recipe whose dataset is there."""
    source = write_pairs(tmp_path / "pairs.jsonl")

    def recipe(name: str = "out", parallel: dict[str, Any] | None = None, **train: Any) -> Path:
        options = {"report_to": [], "per_device_train_batch_size": 2, "learning_rate": 1e-3} | train
        table = recipe_table(tmp_path / name, tiny("bloom"), source, **options)
        made = Recipe.from_table(table | {"parallel": {"zero": 3} | (parallel or {})})
        api.data(made)
        path = tmp_path / f"{name}.toml"
        path.write_text(made.to_toml(), "utf-8")
        return path

    return recipe


def train(recipe: Path, *overrides: str, **special: Any) -> Member:
    return Member(["train", str(recipe), *overrides], **special)


# --- the start ------------------------------------------------------------------------------------------------------


def test_the_first_one_prepares_and_speaks_and_all_train(crew: Crew, make: Make, tmp_path: Path) -> None:
    recipe = make()
    shutil.rmtree(tmp_path / "out")
    assert crew.run(train(recipe), train(recipe)) == [0, 0]
    assert "examples" in crew.said[0] and crew.said[1] == ""
    logs = tmp_path / "out" / "run" / "logs"
    assert sorted(path.name for path in logs.iterdir()) == ["rank-0.log", "rank-1.log"]
    assert "train: 8 steps" in (logs / "rank-1.log").read_text("utf-8")
    assert crew.run(train(recipe), train(recipe)) == [0, 0]
    assert "train: done before, skipped" in crew.said[0]


def test_others_speak_when_asked_to(crew: Crew, make: Make) -> None:
    recipe = make(parallel={"log_all_ranks": True})
    assert crew.run(train(recipe), train(recipe)) == [0, 0]
    assert "[rank 1] train: 8 steps" in crew.said[1]


def one_sentence(crew: Crew, *members: Member, world_size: int | None = None) -> str:
    """Run members that cannot be a run; returns the only error that anybody sees."""
    statuses = crew.run(*members, world_size=world_size)
    assert all(statuses) and len(crew.errors) == 1, (statuses, crew.said)
    assert not any("Traceback" in said for said in crew.said)
    return crew.errors[0]


def test_another_recipe_on_one_rank(crew: Crew, make: Make) -> None:
    recipe = make()
    other = train(recipe, "train.learning_rate=2e-3", "train.save_steps=3")
    assert one_sentence(crew, train(recipe), other) == (
        "The ranks differ in train.learning_rate (0.001 on rank 0, 0.002 on rank 1), train.save_steps (4 on rank 0, "
        "3 on rank 1); start every process with the same recipe and overrides."
    )


def test_a_bad_recipe_on_all_ranks_is_told_once(crew: Crew, make: Make) -> None:
    bad = train(make(), "train.learning_rat=2e-3")
    assert "did you mean" in one_sentence(crew, bad, bad)


OTHER_BYTES = """
from firefly.train import loop
real = loop.sha256_file
loop.sha256_file = lambda path: "0" * 64 if path.name == {name!r} else real(path)
"""


@pytest.mark.parametrize(("name", "place"), [("model.safetensors", "model ("), ("index.json", "tokens (")])
def test_other_files_under_the_same_name(crew: Crew, make: Make, name: str, place: str) -> None:
    """As on a machine with a copy of its own."""
    recipe = make()
    error = one_sentence(crew, train(recipe), train(recipe, prelude=OTHER_BYTES.format(name=name)))
    assert f"/{place}" in error and "(000000000000 on rank 1" not in error
    assert error.endswith("put these on a disk that the machines share, or copy them anew.")


def test_a_rank_that_does_not_come(crew: Crew, make: Make) -> None:
    alone = train(make(), "parallel.start_timeout_s=1")
    assert "rank 1 of 2 did not come within 1 s" in one_sentence(crew, alone, world_size=2)


def test_different_world_sizes(crew: Crew, make: Make) -> None:
    recipe = make()
    error = one_sentence(crew, train(recipe), train(recipe, environment={"WORLD_SIZE": "3"}))
    assert "Rank 1 was started as one of 3 ranks and rank 0 as one of 2" in error


def test_ranks_that_are_none(crew: Crew, make: Make) -> None:
    recipe = make()
    alone = train(recipe, environment={"RANK": "2"})
    assert "RANK is 2 and WORLD_SIZE 2: ranks count from 0 to 1" in one_sentence(crew, alone, world_size=2)
    alone = train(recipe, environment={"RANK": ""})
    assert "of RANK, MASTER_ADDR and MASTER_PORT one is missing" in one_sentence(crew, alone, world_size=2)


def test_one_rank_twice(crew: Crew, make: Make) -> None:
    recipe = make(parallel={"start_timeout_s": 5})
    again = train(recipe, environment={"RANK": "1"})
    assert all(crew.run(train(recipe), train(recipe), again))
    assert "Two processes say that they are rank 1 of 3" in crew.said[0] and "Traceback" not in crew.said[0]
    assert all(crew.run(train(recipe), train(recipe, environment={"RANK": "0"})))
    assert any("Rank 0 cannot listen on port" in error for error in crew.errors)


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 3, "zero": 0}, "parallel.tp = 3 and parallel.hsdp = 1 need a multiple of 3 processes"),
        ({"hsdp": 4}, "need a multiple of 4 processes"),
    ],
)
def test_processes_that_the_layout_cannot_share_out(
    crew: Crew, make: Make, parallel: dict[str, Any], message: str
) -> None:
    """Told before anything is computed."""
    recipe = make(parallel=parallel)
    assert message in one_sentence(crew, train(recipe), train(recipe))
    assert "dataset" not in crew.said[0]


def test_tp_that_does_not_divide_the_heads(crew: Crew, make: Make) -> None:
    """Six heads among four."""
    recipe = make(parallel={"tp": 4, "zero": 0})
    assert "does not divide the model's 6 attention heads" in one_sentence(crew, *[train(recipe)] * 4)
    assert "dataset" not in crew.said[0]


# --- the end --------------------------------------------------------------------------------------------------------

FAILS_AT_5 = """
from firefly.train import loop
from firefly.errors import TrainingError
real = loop.learning_rate_at
def failing(step, *rest):
    if step == 5:
        {what}
    return real(step, *rest)
loop.learning_rate_at = failing
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_s_own_error_is_the_one_that_is_shown(crew: Crew, make: Make, rank: int) -> None:
    recipe = make()
    failing = train(recipe, prelude=FAILS_AT_5.format(what="raise TrainingError('all is lost.')"))
    members = [train(recipe), train(recipe)]
    members[rank] = failing
    error = one_sentence(crew, *members)
    assert error == ("all is lost." if rank == 0 else "rank 1: all is lost.")


def test_our_own_mistake_on_a_rank_is_named_and_its_log_has_the_traceback(
    crew: Crew, make: Make, tmp_path: Path
) -> None:
    recipe = make()
    failing = train(recipe, prelude=FAILS_AT_5.format(what="raise KeyError('a mistake')"))
    assert "rank 1: KeyError: 'a mistake'" in one_sentence(crew, train(recipe), failing)
    assert "Traceback" in (tmp_path / "out/run/logs/rank-1.log").read_text("utf-8")


ABORTS = r"""import os
        os.write(2, b"terminate called after throwing an instance of 'Odd'\n  what():  odd\n")
        os.abort()"""


def test_a_rank_that_a_library_aborts_leaves_its_last_words(crew: Crew, make: Make, tmp_path: Path) -> None:
    """C++ ends a process without a Python error; what it said and where Python was is in the rank's log."""
    recipe = make()
    statuses = crew.run(train(recipe), train(recipe, prelude=FAILS_AT_5.format(what=ABORTS)))
    log = tmp_path / "out/run/logs/rank-1.log"
    assert statuses == [1, -signal.SIGABRT]
    assert crew.errors == [
        "rank 1 was ended by a fault (Aborted: terminate called after throwing an instance of 'Odd' what(): odd); "
        f"{log} has its stacks; run the same command to go on from the last checkpoint."
    ]
    assert "in failing" in log.read_text("utf-8")  # the function that aborts


def test_a_rank_that_hangs_ends_the_run_and_is_found(crew: Crew, make: Make, tmp_path: Path) -> None:
    recipe = make(parallel={"hang_timeout_s": 5})
    hanging = train(recipe, prelude=FAILS_AT_5.format(what="import time; time.sleep(1000)"))
    error = one_sentence(crew, train(recipe), hanging)
    assert "Nothing advanced for 5 s" in error and "run the same command to go on" in error
    assert "failing" in (tmp_path / "out/run/logs/rank-1.log").read_text("utf-8")  # the function that sleeps


@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.nightly)])
def test_killed_again_and_again_it_ends_the_same(crew: Crew, make: Make, tmp_path: Path, kills: int) -> None:
    """SIGKILL for one of the ranks at a random step: the others end, and the same command goes on exactly."""
    options = {"max_steps": 12 * (kills + 1), "save_steps": 4}
    whole, broken = make("whole", **options), make("broken", **options)
    assert crew.run(train(whole), train(whole)) == [0, 0]
    chance = random.Random(kills)
    for kill in range(kills):
        crew.start(train(broken), train(broken))
        wait_for_step(tmp_path / "broken", 12 * kill + chance.randrange(1, 12))
        rank = kill % 2
        crew.signal(rank, signal.SIGKILL)
        statuses = crew.end()
        assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1, crew.said
        assert len(crew.errors) == 1 and f"rank {rank}" in crew.errors[0], crew.said
    assert crew.run(train(broken), train(broken)) == [0, 0]
    assert results(tmp_path / "broken") == results(tmp_path / "whole")


BESIDE = "from firefly.train import checkpoint; checkpoint.COPIES_FROM = {'cpu'}"


def test_checkpoints_beside_the_training_change_nothing(crew: Crew, make: Make, tmp_path: Path) -> None:
    """As on GPUs: the ranks' writers talk to each other while the ranks train."""
    options = {"max_steps": 12, "save_steps": 2}
    whole, beside = make("whole", **options), make("beside", **options)
    assert crew.run(train(whole), train(whole)) == [0, 0]
    assert crew.run(train(beside, prelude=BESIDE), train(beside, prelude=BESIDE)) == [0, 0], crew.said
    assert results(tmp_path / "beside") == results(tmp_path / "whole")


@pytest.mark.parametrize("told", [(0, 1), (1,)])
def test_sigterm_saves_and_stops_all(crew: Crew, make: Make, tmp_path: Path, told: tuple[int, ...]) -> None:
    options = {"max_steps": 300, "save_steps": 1000}
    recipe = make(**options)
    crew.start(train(recipe), train(recipe))
    wait_for_step(tmp_path / "out", 4)
    for rank in told:
        crew.signal(rank, signal.SIGTERM)
    assert crew.end() == [128 + signal.SIGTERM] * 2
    saved = list((tmp_path / "out" / "run").glob("checkpoint-*"))
    assert len(saved) == 1 and f"{saved[0]} is saved" in crew.said[0]


# --- firefly train --processes --------------------------------------------------------------------------------------


def test_the_launcher_hands_signals_on_and_says_who_was_killed(make: Make, tmp_path: Path) -> None:
    recipe = make(max_steps=400, save_steps=1000)
    command = [sys.executable, "-m", "firefly", "train", "--processes", "2", str(recipe)]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)

    process = start()
    wait_for_step(tmp_path / "out", 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=BOUND_S)
    assert process.returncode == 128 + signal.SIGTERM and "is saved, run the same command" in said
    assert "Traceback" not in said
    done = int(next((tmp_path / "out" / "run").glob("checkpoint-*")).name.removeprefix("checkpoint-"))

    process = start()
    wait_for_step(tmp_path / "out", done + 3)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {rank_of(int(child)): int(child) for child in children if rank_of(int(child))}
    os.kill(ranks["1"], signal.SIGKILL)
    _, said = process.communicate(timeout=BOUND_S)
    assert process.returncode == 1 and "rank 1" in said.split("error: ")[1] and "Traceback" not in said
    assert said.count("error: ") == 1


def rank_of(pid: int) -> str:
    """What a process has in its environment as RANK."""
    text = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return next((part.removeprefix(b"RANK=").decode() for part in text if part.startswith(b"RANK=")), "")


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    for found, wanted in [(0, "all"), (0, "1"), (2, "3"), (2, "some"), (2, "0")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda found=found: found)
        with pytest.raises(LaunchError, match="--gpus"):
            num_gpus(wanted)
    assert num_gpus("all") == num_gpus("2") == 2
