"""The pipeline skips what is done, redoes what changed, and ends with the same bytes wherever it was killed."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly import api
from firefly.app.pipeline import STAGES, RunResult
from firefly.errors import CheckpointError, ModelError, OutputError, RecipeError
from firefly.files import exclusive, sha256_file
from firefly.recipe import Recipe
from tiny import phrases, recipe_table, write_pairs

Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Make:
    source = tmp_path / "pairs.jsonl"
    write_pairs(source)

    def recipe(name: str = "out", evaluate: dict[str, Any] | None = None, **train: Any) -> Recipe:
        table = recipe_table(tmp_path / name, tiny("bloom"), source, **train)
        table["prune"] = {"vocab_size": 470}
        table["evaluate"] |= evaluate or {}
        return Recipe.from_table(table)

    return recipe


def skipped(result: RunResult) -> list[str]:
    return [name for name, stage in result.stages.items() if stage.skipped]


def contents(out: Path) -> dict[str, str]:
    """Hashes of what a run is for: the model, the data and the scores."""
    names = ("model/model.safetensors", "model/tokenizer.json", "dataset/train.jsonl", "tokens/index.json")
    hashes = {name: sha256_file(out / name) for name in (*names, "evaluation/results.json")}
    losses = [
        (row["step"], row.get("loss"), row.get("validation"))
        for row in map(json.loads, (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    ]
    return hashes | {"losses": str(losses)}


def test_what_is_done_is_skipped_and_what_changed_is_redone(make: Make) -> None:
    first = api.run(make())
    assert skipped(first) == [] and list(first.stages) == list(STAGES)
    again = api.run(make())
    assert skipped(again) == list(STAGES)
    assert {n: s.result for n, s in again.stages.items()} == json.loads(
        json.dumps({n: s.result for n, s in first.stages.items()})
    )
    assert skipped(api.run(make(evaluate={"generations_per_kind": 1}))) == list(STAGES[:-1])
    write_pairs(Path(make().data.sources[0].path), 140)
    with pytest.raises(CheckpointError, match=r"stage dataset .* has changed since"):
        api.data(make())
    shutil.rmtree(make().out / "run")
    assert skipped(api.data(make())) == []


def test_a_changed_task_file_redoes_the_dataset(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert skipped(api.data(make())) == []
    monkeypatch.setattr("firefly.app.pipeline.task_files_mark", lambda _: ["another template"])
    assert "dataset" not in skipped(api.data(make()))


def test_plain_text_of_a_kind_of_its_own_is_pretrained_on(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    source = tmp_path / "prose.jsonl"
    rng = random.Random(0)
    lines = [json.dumps({"text": phrases(rng, 20)}) for _ in range(80)]
    source.write_text("\n".join(lines), encoding="utf-8")
    table = recipe_table(tmp_path / "out", tiny("bloom"), source, objective="pretrain", max_steps=20)
    table["data"]["sources"] = [{"path": str(source), "importer": "text", "task": "Fiction"}]
    table["data"] |= {"pack_length": 64}
    result = api.train(Recipe.from_table(table)).stages["train"].result
    rows = [*map(json.loads, (tmp_path / "out" / "run" / "metrics.jsonl").read_text("utf-8").splitlines())]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]
    assert {*result["validation"]} >= {"Fiction"}


def test_evaluate_takes_the_output_directory(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From wherever it is asked, and wherever the directory has gone since."""
    api.run(make())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    made = (tmp_path / "out" / "evaluation" / "results.json").stat()
    first = api.evaluate("../out")
    assert list(first.models) == ["base", "pruned", "tuned"] and Path(first.report).is_file()
    (tmp_path / "out").rename(tmp_path / "流萤 moved")
    again = api.evaluate("../流萤 moved")
    assert again.models == first.models and Path(again.report).is_file()
    assert (tmp_path / "流萤 moved" / "evaluation" / "results.json").stat().st_mtime_ns == made.st_mtime_ns
    assert not any((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "out").exists()


def test_evaluate_never_trains(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="run `firefly train`"):
        api.evaluate(make())
    with pytest.raises(ModelError, match="neither a model directory"):
        api.evaluate(tmp_path)


def test_nothing_held_out_is_told_before_any_work(make: Make, tmp_path: Path) -> None:
    made = make()
    without = made.model_copy(update={"data": made.data.model_copy(update={"validation_fraction": 0.0})})
    with pytest.raises(RecipeError, match="nothing to evaluate"):
        api.run(without)
    assert not (tmp_path / "out").exists()
    assert api.train(without).stages["train"].result["validation"] == {}


def test_the_finished_model_is_plain_hugging_face(make: Make, tmp_path: Path) -> None:
    api.run(make())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert model.config.vocab_size == len(tokenizer) == 470
    text = tokenizer.apply_chat_template([{"role": "user", "content": "你好"}], tokenize=False)
    assert text == "<s>你好</s></s>"


def test_one_run_at_a_time(make: Make, tmp_path: Path) -> None:
    api.data(make())
    with exclusive(tmp_path / "out", "a run"), pytest.raises(OutputError, match="Another process is working"):
        api.run(make())


def kill_when(recipe: Recipe, seen: Callable[[], bool]) -> bool:
    """Run in a process of its own and SIGKILL it as soon as `seen`; whether it was still running."""
    path = recipe.out.parent / f"{recipe.out.name}.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    command = [sys.executable, "-m", "firefly", "run", str(path), "--quiet"]
    process = subprocess.Popen(command, env=os.environ, stdout=subprocess.DEVNULL)
    limit_s = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < limit_s and not seen():
        time.sleep(0.001)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


PLACES = {
    "dataset": "dataset",
    "prune": "pruned",
    "tokens": "tokens",
    "train": "model",
    "evaluate": "evaluation",
}


@pytest.fixture
def whole(make: Make) -> dict[str, str]:
    """What an undisturbed run ends with."""
    recipe = make("whole", max_steps=12)
    api.run(recipe)
    return contents(recipe.out)


@pytest.mark.parametrize("stage", STAGES)
def test_sigkill_in_a_stage(make: Make, whole: dict[str, str], stage: str) -> None:
    """Killed the moment a stage begins to write, or has just written, and run again."""
    recipe = make("killed", max_steps=12)
    place = recipe.out / PLACES[stage]
    started = (
        place,
        place.with_name(f".{place.name}.partial"),
        *((recipe.out / "run",) if stage == "train" else ()),
    )
    assert kill_when(recipe, lambda: any(path.exists() for path in started))
    api.run(recipe)
    assert contents(recipe.out) == whole


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(12))
def test_sigkill_at_random_moments(make: Make, whole: dict[str, str], seed: int) -> None:
    """Killed three times at random moments, and run again until it ends."""
    moments = random.Random(seed)
    recipe = make("killed", max_steps=12)
    for _ in range(3):
        due_s = time.monotonic() + moments.uniform(0.5, 12)
        kill_when(recipe, lambda due_s=due_s: time.monotonic() > due_s)  # type: ignore[misc]
    api.run(recipe)
    assert contents(recipe.out) == whole


def test_a_chat_format_that_the_base_cannot_write_stops_before_the_data_is_built(make: Make) -> None:
    table = make().model_dump(exclude_none=True)
    table["data"]["chat_format"] = "chatml"
    with pytest.raises(ModelError, match=r"data\.chat_format = 'chatml' needs"):
        api.data(Recipe.from_table(table))
    assert not (Path(table["output_dir"]) / "dataset").exists()


def test_a_changed_evaluation_file_makes_the_dataset_anew(make: Make, tmp_path: Path) -> None:
    """Also one that only a pattern names."""
    table = make().model_dump(exclude_none=True)
    table["data"]["decontaminate"] = [str(tmp_path / "exam*.jsonl")]
    exam = tmp_path / "exam-1.jsonl"
    exam.write_text('{"text": "这一句不在任何训练样本里面出现，真的没有"}\n', "utf-8")
    assert skipped(api.data(Recipe.from_table(table))) == []
    assert "dataset" in skipped(api.data(Recipe.from_table(table)))
    exam.write_text('{"text": "换了一句话，它也不在任何训练样本里面出现"}\n', "utf-8")
    assert "dataset" not in skipped(api.data(Recipe.from_table(table)))
