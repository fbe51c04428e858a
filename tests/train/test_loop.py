"""The loop trains as plain transformers does, goes on exactly after SIGKILL, and stops before it does harm."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from firefly import api
from firefly.app.chat import Conversation
from firefly.data.example import Message
from firefly.data.loader import TrainingStream
from firefly.data.tokens import Tokens
from firefly.errors import CheckpointError, ModelError, TrainingError
from firefly.files import sha256_file
from firefly.recipe import Recipe
from tiny import recipe_table, write_pairs


def rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "run" / "metrics.jsonl").read_text("utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


def exact_losses(out: Path) -> list[tuple[int, float, float]]:
    return [(row["step"], row["loss"], row["grad_norm"]) for row in rows(out)]


@pytest.fixture
def recipe(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., Recipe]:
    source = write_pairs(tmp_path / "pairs.jsonl")

    def make(name: str = "out", family: str = "bloom", **train: Any) -> Recipe:
        return Recipe.from_table(recipe_table(tmp_path / name, tiny(family), source, **train))

    return make


@pytest.mark.parametrize("family", ["bloom", "qwen3"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_twenty_steps_equal_a_plain_transformers_loop(
    recipe: Callable[..., Recipe], tiny: Callable[[str], Path], family: str, accumulation: int
) -> None:
    made = recipe(family=family, max_steps=20, gradient_accumulation_steps=accumulation, learning_rate=3e-3)
    api.train(made)
    tokens = Tokens.open(made.out / "tokens", "train")
    stream = TrainingStream(tokens, 4, made.train.seed)
    model = AutoModelForCausalLM.from_pretrained(tiny(family)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, 20)
    expected = []
    for step in range(20):
        total, count = torch.zeros(()), 0
        for micro in range(accumulation):
            for number in stream.batch(step * accumulation + micro).sample_ids:
                sample = tokens.sample(number)
                ids = torch.from_numpy(sample.ids.astype("int64"))
                labels = torch.where(torch.from_numpy(sample.mask.astype(bool)), ids, -100)[1:]
                total = total + F.cross_entropy(model(ids[None]).logits[0, :-1], labels, reduction="sum")
                count += int((labels != -100).sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append(float(total.detach()) / count)
    assert [row["loss"] for row in rows(made.out)] == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3  # and something was learned


def start(made: Recipe) -> subprocess.Popen[str]:
    """`firefly train` in a process of its own."""
    path = made.out.parent / f"{made.out.name}.toml"
    path.write_text(made.to_toml(), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "firefly", "train", str(path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ,
    )


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until the running process has logged `step`."""
    limit_s = time.monotonic() + 120
    metrics = out / "run" / "metrics.jsonl"
    while time.monotonic() < limit_s:
        lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
        if len(lines) >= step:
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError("the process did not get that far")


@pytest.mark.parametrize("accumulation", [1, 4])
def test_sigkill_and_resume_is_bit_equal(recipe: Callable[..., Recipe], accumulation: int) -> None:
    options = {"max_steps": 60, "save_steps": 10, "gradient_accumulation_steps": accumulation}
    whole = recipe("whole", **options)
    api.train(whole)
    broken = recipe("broken", **options)
    process = start(broken)
    wait_for_step(process, broken.out, 25)
    process.kill()
    process.wait()
    assert len(rows(broken.out)) < 60, "the process was too fast to be killed in the middle"
    api.train(broken)
    assert exact_losses(broken.out) == exact_losses(whole.out)
    assert sha256_file(broken.out / "model" / "model.safetensors") == sha256_file(
        whole.out / "model" / "model.safetensors"
    )


def test_sigterm_saves_and_stops(recipe: Callable[..., Recipe]) -> None:
    made = recipe(max_steps=400, save_steps=1000, gradient_accumulation_steps=4)
    process = start(made)
    wait_for_step(process, made.out, 5)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    saved = list((made.out / "run").glob("checkpoint-*"))
    assert len(saved) == 1 and f"{saved[0]} is saved" in said
    done = int(saved[0].name.removeprefix("checkpoint-"))
    assert done == rows(made.out)[-1]["step"] < 400


def test_accumulation_does_not_change_the_mathematics(recipe: Callable[..., Recipe]) -> None:
    api.train(recipe("once", per_device_train_batch_size=8))
    api.train(recipe("twice", per_device_train_batch_size=4, gradient_accumulation_steps=2))
    once, twice = (recipe(name).out for name in ("once", "twice"))
    assert [row["loss"] for row in rows(once)] == pytest.approx(
        [row["loss"] for row in rows(twice)], abs=1e-5
    )


def test_loss_that_is_not_finite_stops_before_the_update(
    recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    from firefly.train import objectives

    made = recipe(save_steps=2, max_steps=10)
    real, calls = objectives.batch_loss, []  # the first call is the probe's

    def poisoned(*arguments: Any) -> Any:
        calls.append(1)
        total, each = real(*arguments)
        return (total * math.nan if len(calls) == 7 else total), each

    monkeypatch.setattr(objectives, "batch_loss", poisoned)
    with pytest.raises(
        TrainingError, match=r"stopped before the update.*lines \d+, \d+, \d+, \d+ of the dataset"
    ) as caught:
        api.train(made)
    lines = [int(part) for part in str(caught.value).split("lines ")[1].split(" of")[0].split(", ")]
    tokens = Tokens.open(made.out / "tokens", "train")
    bad = TrainingStream(tokens, 4, made.train.seed).batch(5)
    assert lines == [int(tokens.origins[number]) + 1 for number in bad.sample_ids]
    assert [row["step"] for row in rows(made.out)] == [1, 2, 3, 4, 5]
    monkeypatch.undo()
    api.train(made)  # the weights of checkpoint-4 are clean, so the run goes on and ends
    assert rows(made.out)[-1]["step"] == 10
    assert all(math.isfinite(row["loss"]) for row in rows(made.out))


def test_checkpoint_of_another_recipe_is_refused(recipe: Callable[..., Recipe]) -> None:
    """And nothing is touched: the old recipe still finds everything done."""
    first = recipe()
    api.train(first)
    with pytest.raises(CheckpointError, match=r"differs in train\.learning_rate \(0\.01 → 0\.0001\)"):
        api.train(recipe(learning_rate=1e-4))
    assert all(stage.skipped for stage in api.train(first).stages.values())
    assert Recipe.load(first.out / "recipe.toml") == first


def test_checkpoint_of_other_data_is_refused(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    api.train(made)
    write_pairs(Path(made.data.sources[0].path), seed=7)
    before = {path: path.read_bytes() for path in made.out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"What the stage dataset reads .* has changed"):
        api.train(made)
    assert {path: path.read_bytes() for path in made.out.rglob("*") if path.is_file()} == before


def test_another_tokenizer_is_an_error(recipe: Callable[..., Recipe]) -> None:
    made = recipe()
    api.data(made)
    with pytest.raises(ModelError, match="made with another tokenizer"):
        Tokens.open(made.out / "tokens", "train", "0" * 64)


def test_checkpointing_gives_the_same_losses(recipe: Callable[..., Recipe]) -> None:
    api.train(recipe("plain"))
    api.train(recipe("recomputed", gradient_checkpointing=True))
    plain, recomputed = (exact_losses(recipe(name).out) for name in ("plain", "recomputed"))
    assert [loss for _, loss, _ in plain] == pytest.approx([loss for _, loss, _ in recomputed], abs=1e-6)


def test_pretrain_learns_every_token(recipe: Callable[..., Recipe]) -> None:
    made = recipe(objective="pretrain", max_steps=3)
    api.train(made)
    for row in rows(made.out):
        assert row["target_tokens"] == row["tokens"] - 4  # all but the first of each of the 4 samples


def assert_tensorboard_has(out: Path) -> None:
    """What TensorBoard would show are the very rows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "learning_rate", "grad_norm", "tokens_per_s", "memory_bytes", "epoch", "eta_s"):
        shown = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert shown == pytest.approx({row["step"]: row[name] for row in rows(out)}, rel=1e-6)
    tags = events.Tags()["scalars"]
    assert {"train/loss_by_kind/Couplet", "train/padding_share", "validation/loss/all"} <= set(tags)


@pytest.mark.pictures
def test_run_directory_tells_the_story(recipe: Callable[..., Recipe]) -> None:
    made = recipe(eval_steps=4)
    result = api.train(made).stages["train"].result
    run = made.out / "run"
    assert Recipe.load(run / "recipe.toml") == made
    assert json.loads((run / "environment.json").read_text("utf-8"))["torch"] == torch.__version__
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert_tensorboard_has(made.out)
    validated = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()
        if "validation" in line
    ]
    assert [row["step"] for row in validated] == [4, 8]
    assert set(result["validation"]) == {"Couplet", "Dictionary", "all"}
    assert [path.name for path in sorted(run.glob("checkpoint-*"))] == ["checkpoint-4", "checkpoint-8"]


def test_rows_that_are_gone_stop_no_run(recipe: Callable[..., Recipe]) -> None:
    made = recipe(max_steps=2)
    api.train(made)
    (made.out / "run" / "metrics.jsonl").write_text('["junk"]')
    (made.out / ".stages" / "train.json").unlink()
    assert api.train(made).stages["train"].result["train_loss"] is None


def test_packed_rows_train_on_the_same_losses(
    recipe: Callable[..., Recipe], tiny: Callable[[str], Path]
) -> None:
    """With data.pack_length a batch counts rows; a row's loss is that of its samples, each run alone."""
    made = recipe(max_steps=3, per_device_train_batch_size=2, learning_rate=1e-9, warmup_steps=0)
    made = made.model_copy(update={"data": made.data.model_copy(update={"pack_length": 128})})
    api.train(made)
    tokens = Tokens.open(made.out / "tokens", "train")
    stream = TrainingStream(tokens, 2, made.train.seed, pack_length=128)
    model = AutoModelForCausalLM.from_pretrained(tiny("bloom")).eval()
    expected = []
    for step in range(3):
        batch = stream.batch(step)
        assert 128 < len(batch.input_ids) <= 256 and len(batch.sample_ids) > 2
        total, count = 0.0, 0
        for number in batch.sample_ids:
            sample = tokens.sample(number)
            ids = torch.from_numpy(sample.ids.astype("int64"))
            labels = torch.where(torch.from_numpy(sample.mask.astype(bool)), ids, -100)[1:]
            with torch.no_grad():
                total += float(F.cross_entropy(model(ids[None]).logits[0, :-1], labels, reduction="sum"))
            count += int((labels != -100).sum())
        expected.append(total / count)
    assert [row["loss"] for row in rows(made.out)] == pytest.approx(expected, abs=1e-4)


def test_the_model_directory_says_how_to_talk_to_it(
    recipe: Callable[..., Recipe], tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """Trained on ChatML: its template stands there, alone, and <|im_end|> ends an answer."""
    base = tmp_path / "base"
    shutil.copytree(tiny("bloom"), base)
    rust = Tokenizer.from_file(str(base / "tokenizer.json"))
    for old, new in (("<unk>", "<|im_start|>"), ("<pad>", "<|im_end|>")):
        text = rust.to_str().replace(json.dumps(old), json.dumps(new))
        rust = Tokenizer.from_str(text)
    rust.save(str(base / "tokenizer.json"))
    settings = {"eos_token": "</s>", "bos_token": "<s>", "chat_template": "{{ 'another' }}"}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    made = recipe(max_steps=2, save_steps=2)
    made = made.model_copy(
        update={
            "model": made.model.model_copy(update={"base": str(base)}),
            "data": made.data.model_copy(update={"chat_format": "chatml"}),
        }
    )
    api.train(made)
    out = made.out / "model"
    end = rust.token_to_id("<|im_end|>")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [end, 2]
    assert "chat_template" not in json.loads((out / "tokenizer_config.json").read_text())
    theirs = AutoTokenizer.from_pretrained(out)
    conversation = Conversation(out, made.generation)
    prompt = conversation._fit(Message("user", "你好"))
    expected = theirs.apply_chat_template(
        [{"role": "user", "content": "你好"}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == expected and prompt[0] == rust.token_to_id("<|im_start|>")
    assert set(conversation.generator.eos_ids) == {end, 2}
