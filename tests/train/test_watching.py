"""What a run tells of itself is true: each figure is recomputed here another way, also across a resume."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from firefly import api, console, plots
from firefly.data.loader import Batch, TrainingStream, pack
from firefly.data.tokens import Tokens
from firefly.errors import RecipeError, TrainingError
from firefly.model.load import load_model
from firefly.recipe import Recipe
from firefly.train import loop
from firefly.train.checkpoint import Checkpoints
from firefly.train.curves import draw_comparison, draw_curves, note, read_rows, scalars
from firefly.train.devices import peak_flops, peak_flops_of, training_flops
from firefly.train.parallel import Ranks
from firefly.train.window import Window
from tiny import recipe_table, write_pairs

CPU = torch.device("cpu")
OF_THE_CLOCK = ("tokens_per_s", "eta_s", "memory_bytes")
Make = Callable[..., Recipe]


@pytest.fixture
def make(tiny: Callable[[str], Path], tmp_path: Path) -> Make:
    source = write_pairs(tmp_path / "pairs.jsonl")

    def recipe(out: str = "out", pack_length: int | None = None, **train: Any) -> Recipe:
        table = recipe_table(tmp_path / out, tiny("bloom"), source, **train)
        if pack_length:
            table["data"]["pack_length"] = pack_length
        return Recipe.from_table(table)

    return recipe


def rows(out: Path) -> list[dict[str, Any]]:
    text = (out / "run" / "metrics.jsonl").read_text("utf-8")
    return [row for row in map(json.loads, text.splitlines()) if "loss" in row]


# --- the window -----------------------------------------------------------------------------------------------------


def tokens_of(kinds: list[int], num_kinds: int) -> Tokens:
    empty = np.zeros(0, np.int64)
    names = tuple(f"kind{number}" for number in range(num_kinds))
    return Tokens(empty, empty, empty, np.asarray(kinds, np.uint16), empty, empty, names, 64)


def random_batch(rng: random.Random, num_samples: int) -> tuple[Batch, torch.Tensor]:
    ids = rng.sample(range(num_samples), rng.randint(1, num_samples))
    lengths = [rng.randint(2, 9) for _ in ids]
    batch = pack(
        [(np.arange(n), np.asarray([0] + [rng.random() < 0.6 for _ in range(n - 1)])) for n in lengths], ids
    )
    return batch, torch.tensor([rng.uniform(0, 9) for _ in batch.target_ids])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 5))
def test_a_window_sums_each_kind_and_goes_through_json(seed: int, num_kinds: int, stored_after: int) -> None:
    rng = random.Random(seed)
    data = tokens_of([rng.randrange(num_kinds) for _ in range(6)], num_kinds)
    window, broken = Window({}, data, Ranks(CPU), 100), Window({}, data, Ranks(CPU), 100)
    sums, counts, tokens = defaultdict(float), defaultdict(int), 0
    for step in range(6):
        batch, losses = random_batch(rng, 6)
        for one in (window, broken):
            one.add_batch(batch, batch.target_samples, losses, {"margin": losses.sum()})
            one.add_step(float(losses.sum()), float(step), 0.5)
        for sample, loss in zip(batch.target_samples, losses.tolist(), strict=True):
            kind = data.kind_names[data.kinds[batch.sample_ids[sample]]]
            sums[kind] += loss
            counts[kind] += 1
        tokens += len(batch.input_ids)
        if step == stored_after:
            broken = Window(json.loads(json.dumps(broken.state())), data, Ranks(CPU), 100)
    if not counts:
        return
    row, seconds = window.close()
    assert broken.close()[0] == row  # to the bit
    assert row["loss_by_kind"] == pytest.approx({kind: sums[kind] / counts[kind] for kind in counts})
    assert row["loss"] == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-5)
    assert (row["tokens"], row["target_tokens"], row["grad_norm"]) == (tokens, sum(counts.values()), 5.0)
    assert row["padding_share"] == pytest.approx(1 - tokens / 600, abs=1e-4) and seconds >= 3.0
    assert window.state()["tokens"] == 0 and not any(window.state()["losses"])


class NoWait(TorchDispatchMode):
    """Forbids what makes the host wait for a device: a tensor's value as a Python number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host waits for the device"
        return func(*args, **(kwargs or {}))


def test_batches_are_counted_without_waiting_for_the_device() -> None:
    data = tokens_of([0, 1], 2)
    window = Window({}, data, Ranks(CPU))
    batch, losses = random_batch(random.Random(1), 2)
    with NoWait():
        window.add_batch(batch, batch.target_samples, losses, {})
        with pytest.raises(AssertionError, match="waits"):
            losses.sum().item()


# --- rows of a run --------------------------------------------------------------------------------------------------


def test_rows_say_where_the_run_stands(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(max_steps=13, logging_steps=3, gradient_accumulation_steps=2)
    monkeypatch.setattr(loop, "peak_flops", lambda _: 1e9)
    api.train(made)
    logged = rows(made.out)
    assert [row["step"] for row in logged] == [3, 6, 9, 12, 13]
    data = Tokens.open(made.out / "tokens", "train")
    stream = TrainingStream(data, 4, made.train.seed)
    per_token, per_target = training_flops(load_model(Path(made.model.base)))
    before = 0
    for row in logged:
        batches = [stream.batch(number) for number in range(2 * before, 2 * row["step"])]
        before = row["step"]
        kinds = {data.kind_names[data.kinds[number]] for batch in batches for number in batch.sample_ids}
        targets: dict[str, int] = defaultdict(int)
        for batch in batches:
            for sample in batch.target_samples:
                targets[data.kind_names[data.kinds[batch.sample_ids[sample]]]] += 1
        assert set(row["loss_by_kind"]) == kinds and row["target_tokens"] == sum(targets.values())
        mean = sum(loss * targets[kind] for kind, loss in row["loss_by_kind"].items()) / row["target_tokens"]
        assert row["loss"] == pytest.approx(mean, rel=1e-5)
        assert row["tokens"] == sum(len(batch.input_ids) for batch in batches)
        assert row["epoch"] == pytest.approx(8 * row["step"] / len(data), abs=1e-4)
        assert row["sample"] == 8 * row["step"] % len(data) and row["total_steps"] == 13
        assert row["padding_share"] == 0 and row["memory_bytes"] > 50 << 20
        flops = row["tokens"] * per_token + row["target_tokens"] * per_target
        assert row["mfu"] == pytest.approx(flops / row["tokens"] * row["tokens_per_s"] / 1e9, rel=1e-2)
    assert logged[-1]["eta_s"] == 0 < logged[0]["eta_s"]


def test_padding_of_packed_rows_is_told_and_a_cpu_has_no_mfu(make: Make) -> None:
    made = make(pack_length=96, max_steps=2, logging_steps=1)
    api.train(made)
    for row in rows(made.out):
        assert (
            row["padding_share"] == pytest.approx(1 - row["tokens"] / (4 * 96), abs=1e-4) and "mfu" not in row
        )
        assert row["padding_share"] > 0


def test_a_resumed_run_writes_the_same_rows_in_the_midst_of_a_window(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_steps": 14, "logging_steps": 7, "save_steps": 5}
    whole, broken = make("whole", **options), make("broken", **options)
    api.train(whole)
    real = Checkpoints.save

    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt if real(*arguments).name == "checkpoint-10" else SystemExit

    monkeypatch.setattr(Checkpoints, "save", killed)
    with pytest.raises(SystemExit):
        api.train(broken)
    with pytest.raises(KeyboardInterrupt):
        api.train(broken)
    monkeypatch.undo()
    api.train(broken)

    def lasting(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in OF_THE_CLOCK}

    assert len(rows(whole.out)) == 2
    assert [lasting(row) for row in rows(broken.out)] == [lasting(row) for row in rows(whole.out)]


def test_validation_shows_progress(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(max_steps=2, eval_steps=1)
    api.data(made)
    console.quiet(False)
    api.train(made)
    said = capsys.readouterr().err
    held_out = Tokens.open(made.out / "tokens", "validation")
    assert said.count(f"validate: {len(held_out.ids):,} tokens in ") == 2


@pytest.mark.parametrize("junk", ["[1]", '{"loss": 1}', '{"step": "x"}', '{"step": 3', "\x00\ud800"])
def test_rows_are_read_up_to_the_first_that_is_none(tmp_path: Path, junk: str) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = ['{"step": 1}', '{"step": 2}', junk, '{"step": 4}']
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    assert read_rows(path) == [{"step": 1}, {"step": 2}]


# --- devices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bloom", "llama"])  # with a tied head, and with one of its own
def test_flops_count_each_matrix_once(tiny: Callable[[str], Path], family: str) -> None:
    model = load_model(tiny(family))
    layers = sum(
        one.numel()
        for name, one in model.named_parameters()
        if "embeddings.weight" not in name and "embed_tokens" not in name and "lm_head" not in name
    )
    assert training_flops(model) == (6 * layers, 6 * 503 * 48)
    for one in model.parameters():
        one.requires_grad_(False)
    assert training_flops(model) == (4 * layers, 4 * 503 * 48)


def test_a_device_is_known_by_a_word_of_its_name() -> None:
    names = {"NVIDIA H200": 989, "NVIDIA H20": 148, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A10": 125}
    names |= {"NVIDIA H100 PCIe": 756, "NVIDIA H100 80GB HBM3": 989, "NVIDIA L40S": 362, "NVIDIA L4": 121}
    assert {name: peak_flops_of(name) for name in names} == {
        name: peak * 1e12 for name, peak in names.items()
    }
    assert peak_flops_of("Some Card 9000") is None and peak_flops(CPU) is None


# --- reporters ------------------------------------------------------------------------------------------------------

STAND_IN = """
calls = []
def init(**options): calls.append(("init", options))
def log(row, step):
    calls.append(("log", step, row))
    if failing and step >= 2: raise OSError("no network")
def finish(): calls.append(("finish",))
failing = False
"""


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A module that looks like wandb or swanlab and writes down what it is told."""
    name = request.param
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / f"{name}.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.delitem(sys.modules, name, raising=False)
    yield __import__(name)
    sys.modules.pop(name, None)


@pytest.mark.parametrize("tracker", ["wandb", "swanlab"], indirect=True)
def test_a_tracker_hears_every_row_under_one_id(make: Make, tracker: Any) -> None:
    made = make(max_steps=4, eval_steps=4, report_to=[tracker.__name__])
    api.train(made)
    (_, first), *logged, last = tracker.calls
    assert last == ("finish",) and first["config"]["max_steps"] == 4 and first["resume"] == "allow"
    assert first["name" if tracker.__name__ == "wandb" else "experiment_name"] == "tiny"
    assert [step for _, step, _ in logged] == [1, 2, 3, 4, 4]
    for (_, _, told), row in zip(logged, rows(made.out), strict=False):
        assert told["train/loss"] == row["loss"] and told["train/epoch"] == row["epoch"]
        assert {f"train/loss_by_kind/{kind}" for kind in row["loss_by_kind"]} <= set(told)
    assert {"validation/loss/all", "validation/bits_per_byte/all"} <= set(logged[-1][2])
    (made.out / ".stages" / "train.json").unlink()
    tracker.calls.clear()
    api.train(made)  # nothing left to do, and the same run for the tracker
    assert tracker.calls[0][1]["id"] == first["id"] and 1 <= len(first["id"]) <= 64


@pytest.mark.parametrize("tracker", ["wandb"], indirect=True)
def test_a_tracker_that_fails_does_not_end_the_run(
    make: Make, tracker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("firefly.train.reporters.warn", said.append)
    tracker.failing = True
    made = make(max_steps=4, report_to=["wandb"])
    api.train(made)
    assert len(rows(made.out)) == 4 and len(said) == 1 and "wandb failed (no network)" in said[0]
    monkeypatch.setattr(tracker, "init", lambda **_: 1 / 0)
    with pytest.raises(TrainingError, match=r"wandb does not start .* `wandb login`"):
        api.train(make("again", report_to=["wandb"]))


def test_a_missing_tracker_is_named_before_any_work(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.train.reporters.find_spec", lambda _: None)
    made = make(report_to=["swanlab"])
    with pytest.raises(RecipeError, match=r"'swanlab', which is not installed; run `pip install swanlab`"):
        api.train(made)
    assert not made.out.exists()


# --- for people -----------------------------------------------------------------------------------------------------


def a_row(step: int, num_kinds: int) -> dict[str, Any]:
    kinds = {f"任务{number}": 2.0 + number for number in range(num_kinds)}
    row = {"step": step, "loss": 2.5, "loss_by_kind": kinds, "learning_rate": 1e-5, "grad_norm": 1.0}
    return row | {
        "tokens_per_s": 1234.5,
        "mfu": 0.512,
        "memory_bytes": 3 << 30,
        "padding_share": 0.01,
        "epoch": 0.5,
    }


def test_a_note_is_one_line_whatever_the_number_of_tasks() -> None:
    assert note(a_row(1, 2)).endswith(
        "1,234 tokens/s · MFU 51.2% · 3.2 GB · padding 1.0% · epoch 0.50 · 任务1 3.00 · 任务0 2.00"
    )
    many = note(a_row(1, 23))
    assert (
        "任务22 24.00" in many
        and "任务0" not in many
        and many.endswith("17 kinds below")
        and "\n" not in many
    )


def test_every_number_of_a_row_has_a_name_of_its_own() -> None:
    told = scalars(a_row(3, 2) | {"validation": {"all": {"loss": 1.5}}})
    assert told["train/loss_by_kind/任务1"] == 3.0 and told["validation/loss/all"] == 1.5
    assert "train/step" not in told and len(told) == 11


@pytest.mark.pictures
def test_pictures_draw_with_our_font_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plots.fonts()
    monkeypatch.setattr(plots, "fonts", lambda: (plots.FONT_NAME, "DejaVu Sans"))
    logged = [a_row(step, 23) for step in range(1, 120)] + [{"step": 9, "validation": {"all": {"loss": 2.0}}}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(logged, tmp_path / "one.png")
        draw_curves(logged[:1], tmp_path / "short.png")
        draw_comparison({"甲": logged, "鱻 b": logged[:50], "none": []}, tmp_path / "many.png")
    for name in ("one.png", "short.png", "many.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
