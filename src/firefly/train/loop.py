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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
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
from firefly.model.compiled import compile_layers
from firefly.model.families import CausalModel, transformers_model
from firefly.model.load import num_parameters, read_config, save_model, stored_dtype
from firefly.model.shards import weight_files
from firefly.recipe import Recipe, TrainSection
from firefly.train.checkpoint import (
    Checkpoints,
    TrainState,
    load_checkpoint,
    newest_sound,
    stored_tensors,
)
from firefly.train.curves import Metrics, UnwrittenMetrics, note
from firefly.train.devices import peak_flops, peak_memory_bytes, training_flops
from firefly.train.objectives import Objective, make_objective, training_stream
from firefly.train.offload import OffloadedParts, activations_away
from firefly.train.optim import learning_rate_at, make_optimizer
from firefly.train.parallel import (
    Parts,
    Ranks,
    before_micro_batch,
    distribute,
    is_whole,
    process_group,
    take_places,
)
from firefly.train.plan import num_steps, require_room, try_largest_batch, with_offload
from firefly.train.reporters import open_reporters, require_reporters
from firefly.train.team import ALONE, Team
from firefly.train.window import Window

HARMLESS = frozenset(
    {
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "resume_from_checkpoint",
        "report_to",
        "check",
    }
)
"""Options of a run that may change from one start to the next: the losses do not depend on them."""

_SHARED = (
    "all of them must read the same files; put these on a disk that the machines share, or copy them anew"
)


@dataclass(frozen=True)
class TrainResult:
    """What a finished run is: steps, throughput (non-padding tokens; there is no padding), losses in nats.

    `train_loss` is the last row's; None where somebody took the rows away.
    """

    run: str
    model: str
    steps: int
    parameters: int
    trained_tokens: int
    tokens_per_s: float
    train_loss: float | None
    validation: dict[str, dict[str, float]]


@process_group()
def train(
    recipe: Recipe, model_dir: Path, tokens_dir: Path, run: Path, out: Path, team: Team = ALONE
) -> TrainResult:
    """Train `model_dir` on a tokens directory; checkpoints go to `run`, the finished model to `out`.

    Goes on from the newest sound checkpoint in `run`. A full disk lets the run go on without that checkpoint, and
    it is tried again soon. Raises `CheckpointError` when no checkpoint is sound or they belong to another run,
    `TrainingError` when the loss is not finite, `Interrupted` after saving on SIGTERM or SIGINT.
    """
    section = recipe.train
    require_reporters(section.report_to)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = take_places(recipe, device)
    bf16_weights = section.weights != "float32"
    bf16 = (
        bf16_weights or section.precision == "bf16" or (section.precision == "auto" and device.type == "cuda")
    )
    torch.manual_seed(section.seed)  # adapters begin with random numbers, and dropout draws them

    tokenizer = ModelTokenizer.load(model_dir)
    data = Tokens.open(tokens_dir, "train", tokenizer.sha256)
    held_out = Tokens.open(tokens_dir, "validation", tokenizer.sha256)
    recipe = with_offload(recipe, read_config(model_dir), data, held_out, ranks)
    chat_format = open_format(recipe.data.chat_format, tokenizer)
    stream = training_stream(recipe, data, ranks)
    if recipe.data.pack_length is not None:
        say(f"train: {stream.num_units:,} rows an epoch, {stream.efficiency:.2%} of their slots real tokens")
    total_steps = num_steps(section, stream.num_units, ranks.dp)
    if section.warmup_steps >= total_steps:
        warn(
            f"train.warmup_steps = {section.warmup_steps} and the run has {total_steps} steps: "
            "the learning rate never reaches its peak; lower warmup_steps"
        )

    if section.check and ranks.world_size == 1:
        require_room(recipe, read_config(model_dir), data, held_out, run)
    share = None
    if not is_whole(recipe.parallel, ranks):
        share = partial(distribute, section=recipe.parallel, ranks=ranks, bf16=bf16 and not bf16_weights)
    model = load_for_training(model_dir, section, device, bf16, share)
    if len(model.head) <= tokenizer.highest_id:
        raise ModelError(
            f"{model_dir} has {len(model.head)} embedding rows and its tokenizer the id {tokenizer.highest_id}; "
            "they are not of one model."
        )
    model.checkpoint_every = section.gradient_checkpointing
    compiled = section.compile and compile_layers(model, device)
    every = transformers_model(model).named_parameters()  # a tied matrix once
    names = {name: parameter for name, parameter in every if parameter.requires_grad}
    num_learning = sum(parameter.numel() for parameter in names.values())
    if section.method != "full":
        say(
            f"train: {section.method} adapters, {num_learning:,} of {num_parameters(model):,} parameters learn"
        )
    parts = OffloadedParts(names, ranks) if recipe.parallel.offload == "optimizer" else Parts(names, ranks)
    optimizer = make_optimizer(parts.local.values(), section, compiled)

    fingerprint = _fingerprint(
        section, model_dir, tokens_dir, total_steps, recipe.data.pack_length, ranks.dp, team
    )
    num_batches = total_steps * section.gradient_accumulation_steps
    cache = run / "reference.safetensors"
    objective = make_objective(section, model, stream, num_batches, held_out, cache, fingerprint, bf16, ranks)
    state = _start_or_resume(recipe, run, parts, optimizer, fingerprint, ranks)
    if section.check and state.step < total_steps:
        try_largest_batch(model, optimizer, objective, stream, num_batches)
    packed = recipe.data.pack_length
    window = Window(state.window, data, ranks, packed and packed * section.per_device_train_batch_size)
    scale = _Scale.of(model, ranks, stream.num_units, total_steps, section)
    resumed_s, resumed_step, elapsed_before_s = time.monotonic(), state.step, state.elapsed_s
    next_save = _next_save(state.step, section.save_steps)
    with (
        _stop_signals() as stop,
        team.watching(recipe.parallel.hang_timeout_s),
        _open_metrics(recipe, run, state.step, ranks) as metrics,
        Checkpoints(run, parts, optimizer, section.save_total_limit) as checkpoints,
        progress("train", total_steps, "steps", state.step) as bar,
    ):
        while state.step < total_steps:
            began_s = time.monotonic()
            rate = learning_rate_at(state.step, total_steps, section)
            ranks.reseed(section.seed, state.step)
            batches = _micro_batches(stream, state.step, section.gradient_accumulation_steps)
            done = _backward(
                model, parts, objective, batches, recipe, data, window, stop.asked, checkpoints.failed
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts.step(optimizer)
            parts.zero_grad()
            state.step += 1
            state.trained_tokens += done.num_tokens
            state.elapsed_s = elapsed_before_s + time.monotonic() - resumed_s

            window.add_step(done.loss_sum, done.norm, time.monotonic() - began_s)
            if state.step % section.logging_steps == 0 or state.step == total_steps:
                left_s = (
                    (time.monotonic() - resumed_s) / (state.step - resumed_step) * (total_steps - state.step)
                )
                row = _row(window, state.step, rate, scale) | {"eta_s": round(left_s, 1)}
                metrics.write(row)
                bar.advance(1, note(row))
            else:
                bar.advance(1)
            last = state.step == total_steps
            if last or (section.eval_steps and state.step % section.eval_steps == 0):
                metrics.write({"step": state.step, "validation": objective.validate(model, held_out, device)})
            try:
                if done.save_failed:
                    checkpoints.finish()
                if last or done.asked or state.step >= next_save:
                    next_save = _next_save(state.step, section.save_steps)
                    state.window = window.state()
                    saved = checkpoints.save(state)
                    metrics.draw(at_once=last or bool(done.asked))
                if last or done.asked:
                    checkpoints.finish()
            except DiskFullError as error:
                if last or done.asked:
                    raise
                next_save = min(next_save, state.step + max(1, section.save_steps // 10))
                warn(f"{error} Training goes on; the next checkpoint is tried at step {next_save}.")
            if done.asked:
                raise Interrupted(f"stopped; {saved} is saved, run the same command to go on.", done.asked)

    optimizer.state.clear()  # room for what follows
    trained = stored_tensors(run / f"checkpoint-{state.step}", "model")
    if ranks.main and section.method == "full":
        weights = {name: trained[name] for name in parts.local}
        save_model(
            weights, model_dir, out, chat_format.template, stored_dtype(model_dir), chat_format.stop_ids
        )
    elif ranks.main:
        adapter = out.with_name("adapter")
        adapted = model if ranks.world_size == 1 else _with_adapter(model_dir, section, trained)
        save_adapter(adapted, adapter, chat_format.template, chat_format.stop_ids)
        model.to("cpu")
        merge_adapter(model_dir, adapter, out)
    rows = metrics.rows()
    return TrainResult(
        run=str(run),
        model=str(out),
        steps=state.step,
        parameters=num_parameters(model),
        trained_tokens=state.trained_tokens,
        tokens_per_s=round(state.trained_tokens / max(state.elapsed_s, 1e-9), 1),
        train_loss=next((row["loss"] for row in reversed(rows) if "loss" in row), None),
        validation=next((row["validation"] for row in reversed(rows) if "validation" in row), {}),
    )


def _start_or_resume(
    recipe: Recipe,
    run: Path,
    parts: Parts,
    optimizer: torch.optim.Optimizer,
    fingerprint: str,
    ranks: Ranks,
) -> TrainState:
    """Go on from the newest checkpoint of `run`, or begin: freeze recipe and environment."""
    device = ranks.device
    if ranks.main:
        for leftover in run.glob(".checkpoint-*"):  # of a process that was killed while it saved
            shutil.rmtree(leftover)
    newest = ranks.from_main(lambda: newest_sound(run))
    if newest is None:
        if ranks.main:
            write_atomic(run / "recipe.toml", recipe.to_toml())
            write_json(run / "environment.json", _environment(device))
        return TrainState(fingerprint=fingerprint, num_threads=torch.get_num_threads())
    if recipe.train.resume_from_checkpoint == "never":
        raise CheckpointError(
            f"{run} already holds checkpoints and train.resume_from_checkpoint is 'never'; "
            "choose another output_dir, or set it to 'auto' to go on."
        )
    state = load_checkpoint(newest, parts, optimizer, fingerprint)
    say(f"train: resuming from {newest.name}")
    if state.num_threads != torch.get_num_threads() and device.type == "cpu":
        warn(
            f"{state.num_threads} threads before, {torch.get_num_threads()} now: losses may differ in the last bits"
        )
    return state


@dataclass(frozen=True)
class _Done:
    """What all ranks together did in a step: the sum of its losses, the gradient norm before clipping, and news."""

    loss_sum: float
    norm: float
    num_tokens: int
    asked: int  # the signal to stop, or 0
    save_failed: bool


def _backward(
    model: CausalModel,
    parts: Parts,
    objective: Objective,
    batches: list[Batch],
    recipe: Recipe,
    data: Tokens,
    window: Window,
    asked: int,
    save_failed: bool,
) -> _Done:
    """Gradients of one step, clipped.

    One rank may have been `asked` to stop, or know that a checkpoint failed; now all hear of it. Reading the numbers is
    the step's only wait for the device. It cannot be put off: what is not finite must stop the run before the update.
    It costs the device the time to begin the next step, far below a millisecond.
    """
    ranks = parts.ranks
    model.train()
    counts = [(len(objective.units(one)), len(one.target_ids), len(one.input_ids)) for one in batches]
    count, num_targets, num_tokens = ranks.sum(torch.tensor(counts).sum(0)).tolist()
    if num_targets == 0:
        raise TrainingError(
            f"{_samples(batches, data, ranks)}: no token to learn in this batch; check the dataset."
        )
    total = torch.zeros((), device=ranks.device)
    for batch in batches:
        before_micro_batch(model, recipe.parallel, last=batch is batches[-1])
        with activations_away(batch, ranks) if recipe.parallel.offload == "all" else nullcontext():
            loss = objective.loss(model, batch, ranks.device)
        window.add_batch(batch, objective.units(batch), loss.each, loss.others)
        torch.autograd.backward(loss.total / count)
        total += loss.total.detach()
    parts.take_gradients()
    found = parts.clip(recipe.train.max_grad_norm)
    if ranks.world_size > 1:
        news = ranks.sum(torch.stack([total, total.new_tensor(asked), total.new_tensor(save_failed)]))
        total, told, save_failed = news[0], int(news[1]), bool(news[2])
        asked = told and (asked or signal.SIGTERM)
    loss_sum, norm = torch.stack([total, found.to(total.dtype)]).tolist()
    if not math.isfinite(loss_sum + norm):
        raise TrainingError(
            f"The loss is {loss_sum / count} and the gradient norm {norm}; stopped before the update. "
            f"{_samples(batches, data, ranks)}. Look at these samples, lower train.learning_rate, "
            "or use precision = 'float32'; then run again to go on from the last checkpoint."
        )
    return _Done(loss_sum, norm, num_tokens, asked, save_failed)


def _samples(batches: list[Batch], data: Tokens, ranks: Ranks) -> str:
    mine = [number for batch in batches for number in batch.sample_ids]
    numbers = dict.fromkeys(number for one in ranks.told(mine) for number in one)
    lines = [int(data.origins[number]) + 1 for number in numbers]
    return f"The samples are lines {', '.join(map(str, lines))} of the dataset's train.jsonl"


def _next_save(step: int, save_steps: int) -> int:
    """The next multiple of `save_steps`."""
    return (step // save_steps + 1) * save_steps


def _micro_batches(stream: TrainingStream, step: int, accumulation: int) -> list[Batch]:
    return [stream.batch(step * accumulation + index) for index in range(accumulation)]


def _fingerprint(
    section: TrainSection,
    model_dir: Path,
    tokens_dir: Path,
    total_steps: int,
    pack_length: int | None,
    dp: int,
    team: Team,
) -> str:
    """What a checkpoint belongs to: options that change the losses, base weights, and data.

    Raises `LaunchError` where the ranks do not see the same files.

    How a step's samples are dealt out to ranks and micro-batches changes nothing; how many they are does.
    """
    dealt = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    options = section.model_dump(exclude={*HARMLESS, *dealt, "max_steps", "num_train_epochs"})
    options["samples_per_step"] = (
        section.per_device_train_batch_size * section.gradient_accumulation_steps * dp
    )
    weights = [sha256_file(path) for path in weight_files(model_dir)]
    tokens = sha256_file(tokens_dir / "index.json")
    team.same("files", {str(model_dir): sha256_json(weights)[:12], str(tokens_dir): tokens[:12]}, _SHARED)
    return sha256_json([options, total_steps, pack_length, weights, tokens])


@dataclass(frozen=True)
class _Scale:
    """What a run's figures are measured against, the same from its first step to its last."""

    flops_per_token: int
    flops_per_target: int
    peak_flops: float | None  # of all devices; None where it is not known
    device: torch.device
    num_units: int  # samples or packed rows in an epoch
    units_per_step: int
    total_steps: int

    @classmethod
    def of(
        cls, model: CausalModel, ranks: Ranks, num_units: int, total_steps: int, section: TrainSection
    ) -> _Scale:
        units_per_step = section.per_device_train_batch_size * section.gradient_accumulation_steps * ranks.dp
        peak = peak_flops(ranks.device)
        return cls(
            *training_flops(model),
            peak and peak * ranks.world_size,
            ranks.device,
            num_units,
            units_per_step,
            total_steps,
        )


def _row(window: Window, step: int, rate: float, scale: _Scale) -> dict[str, Any]:
    """One metrics row for the steps since the last one."""
    sums, seconds = window.close()
    seconds = max(seconds, 1e-9)
    row = {"step": step} | sums | {"learning_rate": rate, "tokens_per_s": round(sums["tokens"] / seconds, 1)}
    if scale.peak_flops:
        flops = sums["tokens"] * scale.flops_per_token + sums["target_tokens"] * scale.flops_per_target
        row["mfu"] = round(flops / seconds / scale.peak_flops, 4)
    memory = peak_memory_bytes(scale.device)
    if memory is not None:
        row["memory_bytes"] = memory
    units = step * scale.units_per_step
    row |= {"epoch": round(units / scale.num_units, 4), "sample": units % scale.num_units}
    return row | {"total_steps": scale.total_steps}


def _open_metrics(recipe: Recipe, run: Path, step: int, ranks: Ranks) -> Metrics:
    if not ranks.main:
        return UnwrittenMetrics()
    section = recipe.train
    reporters = open_reporters(section.report_to, run, step, recipe.name, section.model_dump())
    return Metrics(run, step, reporters)


def _with_adapter(model_dir: Path, section: TrainSection, trained: dict[str, Tensor]) -> CausalModel:
    """The base with the adapter that was `trained`, whole in this process."""
    model = load_for_training(model_dir, section, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in transformers_model(model).named_parameters():
            if name in trained:
                parameter.copy_(trained[name])
    return model


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
