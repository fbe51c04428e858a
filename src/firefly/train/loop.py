"""The training loop. There is one; objective, method and parallelism are its parameters.

    for step: micro-batches → loss sum / number of learned tokens in the whole step → backward
              → all finite? → clip → AdamW → log → (validate) → (save)

The divisor is counted before the first micro-batch runs, so the loss does not depend on batch shape or
accumulation. A loss or gradient that is not finite stops the run *before* the update, naming the samples.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firefly.console import progress, say, warn
from firefly.data.chatformat import open_format
from firefly.data.loader import Batch, TrainingStream
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.errors import CheckpointError, DiskFullError, Interrupted, ModelError, TrainingError
from firefly.files import sha256_file, sha256_json, write_atomic, write_json
from firefly.model.adapters import load_for_training, merge_adapter, save_adapter
from firefly.model.families import CausalModel, transformers_model
from firefly.model.load import num_parameters, save_model, stored_dtype
from firefly.model.shards import weight_files
from firefly.recipe import Recipe, TrainSection
from firefly.train.checkpoint import TrainState, load_checkpoint, newest_sound, save_checkpoint
from firefly.train.curves import Metrics
from firefly.train.objectives import Objective, make_objective
from firefly.train.optim import learning_rate_at, make_optimizer

HARMLESS = frozenset(
    {"logging_steps", "eval_steps", "save_steps", "save_total_limit", "resume_from_checkpoint", "report_to"}
)
"""Options of a run that may change from one start to the next: the losses do not depend on them."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run is: steps, throughput (non-padding tokens; there is no padding), losses in nats."""

    run: str
    model: str
    steps: int
    parameters: int
    trained_tokens: int
    tokens_per_s: float
    train_loss: float
    validation: dict[str, dict[str, float]]


def train(recipe: Recipe, model_dir: Path, tokens_dir: Path, run: Path, out: Path) -> TrainResult:
    """Train `model_dir` on a tokens directory; checkpoints go to `run`, the finished model to `out`.

    Goes on from the newest sound checkpoint in `run`. A full disk lets the run go on without that checkpoint, and
    it is tried again soon. Raises `CheckpointError` when no checkpoint is sound or they belong to another run,
    `TrainingError` when the loss is not finite, `Interrupted` after saving on SIGTERM or SIGINT.
    """
    section = recipe.train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = section.precision == "bf16" or (section.precision == "auto" and device.type == "cuda")
    torch.manual_seed(section.seed)  # adapters begin with random numbers, and dropout draws them

    tokenizer = ModelTokenizer.load(model_dir)
    data = Tokens.open(tokens_dir, "train", tokenizer.sha256)
    held_out = Tokens.open(tokens_dir, "validation", tokenizer.sha256)
    chat_format = open_format(recipe.data.chat_format, tokenizer)
    stream = TrainingStream(
        data,
        section.per_device_train_batch_size,
        section.seed,
        section.objective == "pretrain",
        recipe.data.pack_length,
        pairs=section.objective == "dpo",
    )
    if recipe.data.pack_length is not None:
        say(f"train: {stream.num_units:,} rows an epoch, {stream.efficiency:.2%} of their slots real tokens")
    total_steps = _total_steps(section, stream.num_units)
    if section.warmup_steps >= total_steps:
        warn(
            f"train.warmup_steps = {section.warmup_steps} and the run has {total_steps} steps: "
            "the learning rate never reaches its peak; lower warmup_steps"
        )

    model = load_for_training(model_dir, section, device, bf16)
    if len(model.head) <= tokenizer.highest_id:
        raise ModelError(
            f"{model_dir} has {len(model.head)} embedding rows and its tokenizer the id {tokenizer.highest_id}; "
            "they are not of one model."
        )
    model.gradient_checkpointing = section.gradient_checkpointing
    every = transformers_model(model).named_parameters()  # a tied matrix once
    names = {name: parameter for name, parameter in every if parameter.requires_grad}
    num_learning = sum(parameter.numel() for parameter in names.values())
    if section.method != "full":
        say(
            f"train: {section.method} adapters, {num_learning:,} of {num_parameters(model):,} parameters learn"
        )
    optimizer = make_optimizer(names.values(), section)

    fingerprint = _fingerprint(section, model_dir, tokens_dir, total_steps, recipe.data.pack_length)
    num_batches = total_steps * section.gradient_accumulation_steps
    cache = run / "reference.safetensors"
    objective = make_objective(
        section, model, stream, num_batches, held_out, cache, fingerprint, device, bf16
    )
    state = _start_or_resume(recipe, run, names, optimizer, fingerprint, device)
    resumed_s, resumed_tokens, elapsed_before_s = time.monotonic(), state.trained_tokens, state.elapsed_s
    next_save = _next_save(state.step, section.save_steps)
    with (
        _stop_signals() as stop,
        Metrics(run, state.step, section.report_to) as metrics,
        progress("train", total_steps, "steps", state.step) as bar,
    ):
        while state.step < total_steps:
            rate = learning_rate_at(state.step, total_steps, section)
            batches = _micro_batches(stream, state.step, section.gradient_accumulation_steps)
            sums, norm = _backward(model, optimizer, objective, batches, device, section.max_grad_norm, data)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.trained_tokens += sum(len(batch.input_ids) for batch in batches)
            state.elapsed_s = elapsed_before_s + time.monotonic() - resumed_s

            _count(state.window, sums, norm, batches, objective)
            if state.step % section.logging_steps == 0 or state.step == total_steps:
                row = _close_window(state, rate)
                speed = (state.trained_tokens - resumed_tokens) / (time.monotonic() - resumed_s)
                metrics.write(row | {"tokens_per_s": round(speed, 1)})
                note = f"loss {row['loss']:.3f} · {speed:,.0f} tokens/s"
            else:
                note = ""
            bar.advance(1, note)
            last = state.step == total_steps
            if last or (section.eval_steps and state.step % section.eval_steps == 0):
                metrics.write({"step": state.step, "validation": objective.validate(model, held_out, device)})
            if last or stop.asked or state.step >= next_save:
                next_save = _next_save(state.step, section.save_steps)
                try:
                    saved = save_checkpoint(run, names, optimizer, state, section.save_total_limit)
                except DiskFullError as error:
                    if last or stop.asked:
                        raise
                    next_save = min(next_save, state.step + max(1, section.save_steps // 10))
                    warn(f"{error} Training goes on; the next checkpoint is tried at step {next_save}.")
                metrics.draw()
                if stop.asked:
                    raise Interrupted(
                        f"stopped; {saved} is saved, run the same command to go on.", stop.asked
                    )

    export_dtype = stored_dtype(model_dir)
    if section.method == "full":
        save_model(model, model_dir, out, chat_format.template, export_dtype, chat_format.stop_ids)
    else:
        adapter = out.with_name("adapter")
        save_adapter(model, adapter, chat_format.template, chat_format.stop_ids)
        optimizer.state.clear()
        model.to("cpu")
        merge_adapter(model_dir, adapter, out)
    rows = metrics.rows()
    losses = [row["loss"] for row in rows if "loss" in row]
    return TrainResult(
        run=str(run),
        model=str(out),
        steps=state.step,
        parameters=num_parameters(model),
        trained_tokens=state.trained_tokens,
        tokens_per_s=round(state.trained_tokens / max(state.elapsed_s, 1e-9), 1),
        train_loss=losses[-1],
        validation=next((row["validation"] for row in reversed(rows) if "validation" in row), {}),
    )


def _start_or_resume(
    recipe: Recipe,
    run: Path,
    names: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    device: torch.device,
) -> TrainState:
    """Go on from the newest checkpoint of `run`, or begin: freeze recipe and environment."""
    for leftover in run.glob(".checkpoint-*"):  # of a process that was killed while it saved
        shutil.rmtree(leftover)
    newest = newest_sound(run)
    if newest is None:
        write_atomic(run / "recipe.toml", recipe.to_toml())
        write_json(run / "environment.json", _environment(device))
        return TrainState(fingerprint=fingerprint, num_threads=torch.get_num_threads())
    if recipe.train.resume_from_checkpoint == "never":
        raise CheckpointError(
            f"{run} already holds checkpoints and train.resume_from_checkpoint is 'never'; "
            "choose another output_dir, or set it to 'auto' to go on."
        )
    state = load_checkpoint(newest, names, optimizer, fingerprint)
    say(f"train: resuming from {newest.name}")
    if state.num_threads != torch.get_num_threads() and device.type == "cpu":
        warn(
            f"{state.num_threads} threads before, {torch.get_num_threads()} now: losses may differ in the last bits"
        )
    return state


def _backward(
    model: CausalModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    batches: list[Batch],
    device: torch.device,
    max_norm: float,
    data: Tokens,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of one step, clipped; returns `loss` and the objective's other sums, and the norm before clipping."""
    model.train()
    if sum(len(batch.target_ids) for batch in batches) == 0:
        raise TrainingError(f"{_samples(batches, data)}: no token to learn in this batch; check the dataset.")
    count = sum(objective.count(batch) for batch in batches)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        loss, others = objective.loss(model, batch, device)
        torch.autograd.backward(loss / count)
        for name, value in ({"loss": loss} | others).items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    if not bool(torch.isfinite(sums["loss"] + norm)):
        raise TrainingError(
            f"The loss is {float(sums['loss']) / count} and the gradient norm {float(norm)}; stopped before the "
            f"update. {_samples(batches, data)}. Look at these samples, lower train.learning_rate, "
            "or use precision = 'float32'; then run again to go on from the last checkpoint."
        )
    return sums, norm


def _samples(batches: list[Batch], data: Tokens) -> str:
    numbers = [number for batch in batches for number in batch.sample_ids]
    lines = [int(data.origins[number]) + 1 for number in numbers]
    return f"The samples are lines {', '.join(map(str, lines))} of the dataset's train.jsonl"


def _next_save(step: int, save_steps: int) -> int:
    """The next multiple of `save_steps`."""
    return (step // save_steps + 1) * save_steps


def _micro_batches(stream: TrainingStream, step: int, accumulation: int) -> list[Batch]:
    return [stream.batch(step * accumulation + index) for index in range(accumulation)]


def _total_steps(section: TrainSection, num_units: int) -> int:
    if section.max_steps is not None:
        return section.max_steps
    per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps
    return max(1, math.ceil(num_units * section.num_train_epochs / per_step))


def _fingerprint(
    section: TrainSection, model_dir: Path, tokens_dir: Path, total_steps: int, pack_length: int | None
) -> str:
    """What a checkpoint belongs to: options that change the losses, base weights, and data."""
    options = section.model_dump(exclude={*HARMLESS, "max_steps", "num_train_epochs"})
    weights = [sha256_file(path) for path in weight_files(model_dir)]
    return sha256_json([options, total_steps, pack_length, weights, sha256_file(tokens_dir / "index.json")])


def _count(
    window: dict[str, Any],
    sums: dict[str, Tensor],
    norm: Tensor,
    batches: list[Batch],
    objective: Objective,
) -> None:
    totals = window.setdefault("sums", {})
    for name, value in sums.items():
        totals[name] = totals.get(name, 0.0) + float(value)
    window["count"] = window.get("count", 0) + sum(objective.count(batch) for batch in batches)
    window["num_targets"] = window.get("num_targets", 0) + sum(len(batch.target_ids) for batch in batches)
    window["num_tokens"] = window.get("num_tokens", 0) + sum(len(batch.input_ids) for batch in batches)
    window["grad_norm"] = float(norm)


def _close_window(state: TrainState, rate: float) -> dict[str, Any]:
    """One metrics row for the steps since the last one."""
    window, state.window = state.window, {}
    return {
        "step": state.step,
        **{name: total / window["count"] for name, total in window["sums"].items()},
        "grad_norm": window["grad_norm"],
        "learning_rate": rate,
        "target_tokens": window["num_targets"],
        "tokens": window["num_tokens"],
    }


class _Stop:
    """Set to a signal's number once that signal has come."""

    asked = 0


@contextmanager
def _stop_signals() -> Iterator[_Stop]:
    """While the block runs, SIGTERM and the first SIGINT ask for a stop after the current step."""
    stop = _Stop()

    def ask(number: int, _frame: Any) -> None:
        if stop.asked == signal.SIGINT == number:
            raise KeyboardInterrupt
        stop.asked = number
        say(f"{signal.Signals(number).name}: saving after this step")

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not in the main thread, where Python allows no handlers
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(device: torch.device) -> dict[str, Any]:
    """What a later reader needs to compare runs."""
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "num_threads": torch.get_num_threads(),
        "num_cores": os.cpu_count(),
    }
