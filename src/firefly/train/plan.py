"""What a run will take: parameters, memory, hours, disk. And what to change when it does not fit.

    make_plan(recipe, config, estimate, device)     # `firefly plan`; nothing is loaded. With a cluster: on many GPUs
    require_room(recipe, config, data, …)           # `firefly train`, before the model is loaded
    try_largest_batch(model, optimizer, …)          # and after it, before the first step

Time is a roofline (`scaling.py`): arithmetic at 6 FLOPs a learned parameter and token (4 a frozen one, 2 more where
layers are recomputed; the output matrix only where something is learned), then the optimizer's traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from firefly.console import say
from firefly.data.loader import TrainingStream
from firefly.data.tokens import Tokens
from firefly.errors import ModelError, RecipeError, TrainingError
from firefly.files import free_disk_bytes
from firefly.model.families import CausalModel, build, transformers_model
from firefly.recipe import Recipe, TrainSection
from firefly.train.checkpoint import find_checkpoints
from firefly.train.gpus import Device, free_memory_bytes, this_device
from firefly.train.memory import BatchShape, Memory, depth_of
from firefly.train.objectives import Objective, training_stream
from firefly.train.optim import CompactAdamW, state_bytes
from firefly.train.parallel import Ranks
from firefly.train.ranks import Load, choose_offload, rank_memory
from firefly.train.scaling import Batch, Cluster, Scaling, rank_of, scale
from firefly.train.traffic import Layout

_VALIDATION_TOKENS = 8192  # in one batch of `in_order`
_ARTICLE = {"samples": 1_649_399, "median": 110.0, "sigma": 0.7, "shortest": 16, "target_share": 0.55}
"""firefly-train-1.1M with BELLE: lengths are about lognormal, and 45 % of the tokens are prompt."""
_MOST_DRAWN = 1_000_000


@dataclass(frozen=True)
class Workload:
    """What there is to train on, of real tokens or of lengths like the article's."""

    source: str
    num_units: int  # samples, or rows of packed ones
    steps: int
    tokens_per_step: float
    target_share: float
    largest: BatchShape
    held_out: BatchShape | None


@dataclass(frozen=True)
class Advice:
    """Overrides for the recipe, what they cost, and the peak memory then."""

    change: str
    cost: str
    memory_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer of `firefly plan`. Bytes, seconds and tokens; None is what cannot be known."""

    name: str
    base: str
    method: str
    device: Device
    parameters: dict[str, int]  # by part, a tied matrix once; and in `total`
    workload: Workload
    memory: Memory
    memory_bytes: int
    fits: bool
    advice: list[Advice]
    tokens_per_s: float | None  # of all ranks
    steps: int
    hours: float | None
    checkpoint_bytes: int
    model_bytes: int
    disk_bytes: int  # all that the training will write
    disk_free_bytes: int
    learned_parameters: int  # all, or those of the adapters
    layout: Layout
    host_bytes: int  # of each rank, in main memory
    scaling: Scaling | None  # over many GPUs, where a cluster is named


Estimate = Callable[[Recipe], Workload]
"""The workload of a recipe: advice tries several."""


def make_plan(
    recipe: Recipe,
    config: dict[str, Any],
    estimate: Estimate,
    device: Device,
    cluster: Cluster | None = None,
    num_gpus: int = 1,
    samples_per_step: int | None = None,
) -> Plan:
    """Say what training the model of `config` takes on `device`, or on `num_gpus` of a `cluster` of them.

    Memory and time are those of one rank under the recipe's `parallel` section; tokens a second are all ranks'.
    Raises `ModelError` for a config that describes no model of a supported family, `RecipeError` for a layout that the
    number of GPUs does not allow.
    """
    parameters = count_parameters(config)
    workload = estimate(recipe)
    load = load_of(recipe, config, workload, device)
    layout = placed(load, Layout.of(recipe.parallel, num_gpus, load.num_heads), device)
    whole = batch_of(recipe.train, workload)
    batch = whole.shared(recipe.train.per_device_train_batch_size, samples_per_step, layout.dp)
    if batch is None:
        raise RecipeError(
            f"{samples_per_step} samples a step are fewer than the {layout.dp} data-parallel ranks."
        )
    memory, host_bytes = rank_memory(load, layout, batch.accumulation)
    speed = None
    if device.bf16_flops is not None and device.bandwidth_bytes_per_s is not None:
        speed = rank_of(load, layout, batch, cluster or Cluster(device)).tokens_per_s
    fits = memory.total <= device.memory_bytes
    larger = samples_per_step / _samples(recipe.train) if samples_per_step else layout.dp
    steps = recipe.train.max_steps or max(1, math.ceil(workload.steps / larger))
    tokens = workload.tokens_per_step * larger * steps
    checkpoint, model, disk = _disk(load, recipe, steps)
    return Plan(
        name=recipe.name,
        base=recipe.model.base,
        method=recipe.train.method,
        device=device,
        parameters=parameters,
        workload=workload,
        memory=memory,
        memory_bytes=memory.total,
        fits=fits,
        advice=[] if fits else advise(recipe, config, estimate, device, num_gpus),
        tokens_per_s=speed,
        steps=steps,
        hours=_seconds(recipe, tokens, speed) / 3600 if speed else None,
        checkpoint_bytes=checkpoint,
        model_bytes=model,
        disk_bytes=disk,
        disk_free_bytes=free_disk_bytes(recipe.out),
        learned_parameters=load.learned,
        layout=layout,
        host_bytes=host_bytes,
        scaling=scale(load, whole, cluster, num_gpus, samples_per_step) if cluster else None,
    )


def load_of(recipe: Recipe, config: dict[str, Any], workload: Workload, device: Device) -> Load:
    """What a recipe puts on a device."""
    train = recipe.train
    return Load(config, train, workload.largest, workload.held_out, _is_bf16(train, device), device.kind)


def placed(load: Load, layout: Layout, device: Device) -> Layout:
    """The layout with offload = auto decided, against the memory of `device` and this machine's free main memory."""
    if layout.offload != "auto":
        return layout
    return replace(layout, offload=_choose(load, layout, device)[0])


def _choose(load: Load, layout: Layout, device: Device) -> tuple[str, str]:
    def need(offload: str) -> tuple[int, int]:
        at = replace(layout, offload=offload)
        memory, host_bytes = rank_memory(load, at, load.train.gradient_accumulation_steps)
        return memory.total, host_bytes * layout.num_ranks

    return choose_offload(need, device.memory_bytes, free_memory_bytes())


def _samples(train: TrainSection) -> int:
    return train.per_device_train_batch_size * train.gradient_accumulation_steps


def batch_of(train: TrainSection, workload: Workload) -> Batch:
    """What a rank computes a step when each has the batch of the recipe."""
    tokens = workload.tokens_per_step / train.gradient_accumulation_steps
    return Batch(train.gradient_accumulation_steps, tokens, workload.target_share * tokens)


def _seconds(recipe: Recipe, tokens: float, tokens_per_s: float) -> float:
    """Of a whole run over so many tokens; dpo asks its reference about each answer once, a third of the arithmetic."""
    once = min(1.0, 1 / recipe.train.num_train_epochs) / 3 if recipe.train.objective == "dpo" else 0.0
    return tokens * (1 + once) / tokens_per_s


def count_parameters(config: dict[str, Any]) -> dict[str, int]:
    """Parameters by part and in `total`, a tied matrix once, of a config.json alone."""
    parts = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head"), 0)
    with torch.device("meta"):
        model = transformers_model(build(config))
    for name, parameter in model.named_parameters():
        parts[_part(name)] += parameter.numel()
    return {**parts, "total": sum(parts.values())}


def _part(name: str) -> str:
    words = {"norm": "norms", "ln_f": "norms", "embed": "embeddings", "lm_head": "head", "mlp": "mlp"}
    return next((part for word, part in words.items() if word in name), "attention")


def num_steps(train: TrainSection, num_units: int, dp: int = 1) -> int:
    """Optimizer steps of a whole run over `num_units` samples or rows an epoch, on `dp` ranks."""
    if train.max_steps is not None:
        return train.max_steps
    per_step = train.per_device_train_batch_size * train.gradient_accumulation_steps * dp
    return max(1, math.ceil(num_units * train.num_train_epochs / per_step))


def estimate_from(tokens_dir: Path) -> Estimate:
    """Workloads over a tokens directory where there is one, else over lengths like the article's."""
    if not (tokens_dir / "index.json").is_file():
        return assumed_workload
    data, held_out = (Tokens.open(tokens_dir, split) for split in ("train", "validation"))
    return lambda recipe: real_workload(recipe, data, held_out)


def real_workload(recipe: Recipe, data: Tokens, held_out: Tokens) -> Workload:
    """What the recipe will train on, its largest batch looked up; samples beyond a lowered limit count as cut."""
    train, limit = recipe.train, recipe.data.max_seq_length
    stream = training_stream(recipe, data)
    steps = num_steps(train, stream.num_units)
    sizes = stream.batch_tokens(steps * train.gradient_accumulation_steps)
    largest = stream.batch(int(sizes.argmax()))
    cut = np.minimum(np.diff(largest.borders), limit)
    share = 1.0 if stream.learn_everything else float(data.mask.mean())
    return Workload(
        source="tokens",
        num_units=stream.num_units,
        steps=steps,
        tokens_per_step=float(sizes.mean()) * train.gradient_accumulation_steps,
        target_share=share,
        largest=BatchShape(
            int(cut.sum()), int(cut.max()), max(1, min(len(largest.target_ids), int(cut.sum())))
        ),
        held_out=_validation(np.minimum(np.diff(held_out.borders), limit), share),
    )


def assumed_workload(recipe: Recipe) -> Workload:
    """Lengths like the article's, cut at data.max_seq_length."""
    train, limit, most = recipe.train, recipe.data.max_seq_length, recipe.data.pack_length
    drawn = np.random.default_rng(0).lognormal(np.log(_ARTICLE["median"]), _ARTICLE["sigma"], _MOST_DRAWN)
    lengths = np.clip(drawn, min(_ARTICLE["shortest"], limit), limit).astype(np.int64)
    num_samples, batch = int(_ARTICLE["samples"]), train.per_device_train_batch_size
    batch *= 2 if train.objective == "dpo" else 1  # pairs
    share = 1.0 if train.objective == "pretrain" else _ARTICLE["target_share"]
    if most is not None:
        num_units = math.ceil(num_samples * lengths.mean() / most)
        sizes = np.asarray([batch * most])
    else:
        num_units = num_samples
        num_batches = num_steps(train, num_units) * train.gradient_accumulation_steps
        count = min(num_batches, max(1, len(lengths) // batch))
        sizes = lengths[: count * batch].reshape(count, -1).sum(1)
    tokens = int(sizes.max())
    return Workload(
        source="assumed: lengths like the article's, there is no tokens directory yet",
        num_units=num_units,
        steps=num_steps(train, num_units),
        tokens_per_step=float(sizes.mean()) * train.gradient_accumulation_steps,
        target_share=share,
        largest=BatchShape(tokens, min(limit, tokens), max(1, int(share * tokens))),
        held_out=_validation(lengths[:1000], share) if recipe.data.validation_fraction else None,
    )


def _validation(lengths: NDArray[np.int64], share: float) -> BatchShape | None:
    """About the largest batch of a pass over held-out samples."""
    if not len(lengths):
        return None
    tokens = min(_VALIDATION_TOKENS, int(lengths.sum()))
    return BatchShape(tokens, min(tokens, int(lengths.max())), max(1, int(share * tokens)))


def _is_bf16(train: TrainSection, device: Device) -> bool:
    """Whether products run in bf16, as the loop decides it."""
    if train.weights != "float32" or train.precision == "bf16":
        return True
    return train.precision == "auto" and device.kind == "cuda"


def advise(
    recipe: Recipe, config: dict[str, Any], estimate: Estimate, device: Device, num_gpus: int = 1
) -> list[Advice]:
    """Changes that take less memory, all reckoned, none guessed: up to three that fit, the cheapest first.

    A dearer one is among them only if it takes less than those before, or is another method. When none fits: all, the
    least first.
    """
    found: list[Advice] = []
    fitting: list[Advice] = []
    for wanted, cost in _candidates(recipe, device, num_gpus):
        changes = {
            section: {
                key: value for key, value in values.items() if value != getattr(getattr(recipe, section), key)
            }
            for section, values in wanted.items()
        }
        changed = recipe.model_copy(
            update={
                section: getattr(recipe, section).model_copy(update=values)
                for section, values in changes.items()
            }
        )
        load = load_of(changed, config, estimate(changed), device)
        layout = Layout.of(changed.parallel, num_gpus, load.num_heads)
        layout = replace(layout, offload=layout.offload.replace("auto", "all"))
        memory, _ = rank_memory(load, layout, changed.train.gradient_accumulation_steps)
        names = " ".join(
            f"{section}.{key}={str(value).lower()}"
            for section, values in changes.items()
            for key, value in values.items()
        )
        found.append(Advice(names, cost, memory.total, memory.total <= device.memory_bytes))
        is_other = "method" in changes.get("train", {})
        if found[-1].fits and (is_other or all(memory.total < one.memory_bytes for one in fitting)):
            fitting.append(found[-1])
        if len(fitting) == 3:
            break
    return fitting or sorted(found, key=lambda one: one.memory_bytes)


def _candidates(
    recipe: Recipe, device: Device, num_gpus: int
) -> Iterator[tuple[dict[str, dict[str, Any]], str]]:
    """Changes from cheap to dear."""
    train, parallel = recipe.train, recipe.parallel
    batch, accumulation = train.per_device_train_batch_size, train.gradient_accumulation_steps
    recompute = {} if train.gradient_checkpointing == 1 else {"gradient_checkpointing": True}

    def split(into: int) -> dict[str, Any]:
        return {
            "per_device_train_batch_size": batch // into,
            "gradient_accumulation_steps": accumulation * into,
        }

    parts = sorted({into for into in (2, 4, batch) if into > 1 and batch % into == 0})
    smallest = recompute | (split(parts[-1]) if parts else {})
    for into in parts[:2]:
        yield {"train": split(into)}, "the same mathematics, smaller batches at once"
    if num_gpus > parallel.tp:
        for zero in range(parallel.zero + 1, 4):
            yield {"parallel": {"zero": zero}}, "the same mathematics, more traffic between the GPUs"
    if recompute:
        yield {"train": recompute}, "a third more time"
        for into in parts:
            yield {"train": {**recompute, **split(into)}}, "a third more time, smaller batches at once"
    elif parts[2:]:
        yield {"train": split(parts[-1])}, "the same mathematics, one sample at once"
    if train.method == "full":
        compact = {"optimizer": "adamw_8bit"}
        yield {"train": {**smallest, **compact}}, "moments in 8 bits"
        compact["weights"] = "bf16_stochastic"
        if train.weights == "float32" and train.precision != "float32":
            yield {"train": {**smallest, **compact}}, "weights in bf16, moments in 8 bits"
        if device.kind == "cuda" and (num_gpus == 1 or parallel.zero == 3):
            for offload in ("optimizer", "all"):
                if parallel.offload in ("none", "optimizer") and parallel.offload != offload:
                    cost = "waits for main memory each step; less with more accumulation"
                    yield {"train": smallest, "parallel": {"offload": offload}}, cost
        adapters = {**smallest, "method": "lora", "weights": "float32", "optimizer": "adamw"}
        yield {"train": adapters}, "adapters learn, the base stays as it is"
    if train.method != "qlora" and device.kind == "cuda":
        in_4_bits = {**smallest, "method": "qlora", "weights": "float32", "optimizer": "adamw"}
        yield {"train": in_4_bits}, "adapters learn, the base stays as it is, in 4 bits"
    length = recipe.data.max_seq_length // 2
    if length >= 64 and recipe.data.pack_length is None:
        yield (
            {"train": smallest, "data": {"max_seq_length": length}},
            "longer samples are cut; the tokens are made anew",
        )


def _disk(load: Load, recipe: Recipe, steps: int) -> tuple[int, int, int]:
    """Bytes of one checkpoint, of the finished model, and of all that is there at once at most."""
    own_bytes = 2 if load.bf16_weights else 4
    checkpoint = int((own_bytes + load.optimizer_bytes) * load.learned) + (1 << 20)
    stored = str(load.config.get("dtype") or load.config.get("torch_dtype") or "float32")
    model = load.units.num_parameters * (2 if "16" in stored else 4)
    if recipe.train.method != "full":
        model += 4 * load.learned  # the adapter beside the merged model
    saves = math.ceil(steps / recipe.train.save_steps)
    kept = min(recipe.train.save_total_limit, saves)
    while_saving = min(kept + 1, saves)  # an old one goes only once the new one is whole
    return checkpoint, model, max(while_saving * checkpoint, kept * checkpoint + model)


def with_offload(
    recipe: Recipe, config: dict[str, Any], data: Tokens, held_out: Tokens, ranks: Ranks
) -> Recipe:
    """The recipe with parallel.offload = "auto" decided by the main rank, which says why.

    A CPU has no other memory to put things into. Raises `TrainingError` when nothing fits.
    """
    if recipe.parallel.offload != "auto":
        return recipe
    chosen = "none"
    if ranks.device.type == "cuda":
        chosen = ranks.from_main(lambda: _reasoned_offload(recipe, config, data, held_out, ranks.world_size))
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"offload": chosen})})


def _reasoned_offload(
    recipe: Recipe, config: dict[str, Any], data: Tokens, held_out: Tokens, num_ranks: int
) -> str:
    device = this_device()
    load = load_of(recipe, config, real_workload(recipe, data, held_out), device)
    offload, why = _choose(load, Layout.of(recipe.parallel, num_ranks, load.num_heads), device)
    say(f"train: {why}")
    return offload


def require_room(recipe: Recipe, config: dict[str, Any], data: Tokens, held_out: Tokens, run: Path) -> None:
    """Raise `TrainingError` with advice when memory or disk cannot hold the run of a recipe on this machine."""

    def estimate(changed: Recipe) -> Workload:
        return real_workload(changed, data, held_out)

    workload, device = estimate(recipe), this_device()
    load = load_of(recipe, config, workload, device)
    needed = _disk(load, recipe, workload.steps)[2]
    there = sum(
        path.stat().st_size for one in find_checkpoints(run) for path in one.rglob("*") if path.is_file()
    )
    free = free_disk_bytes(run)
    if needed - there > free:
        raise TrainingError(
            f"The checkpoints and the model need {_gib(needed - there)} of disk and {run} has {_gib(free)} free; "
            "free some space, choose another output_dir, lower train.save_total_limit, or set train.check = false."
        )
    if _generous_bytes(config, load.units.num_parameters, workload) < device.memory_bytes:
        return
    layout = Layout.of(recipe.parallel, 1, load.num_heads)
    memory, _ = rank_memory(load, layout, recipe.train.gradient_accumulation_steps)
    if memory.total > device.memory_bytes:
        ways = advise(recipe, config, estimate, device)
        raise TrainingError(
            f"Training needs {_gib(memory.total)} of memory ({_parts(memory)}) and {device.name} has "
            f"{_gib(device.memory_bytes)}; {_advice_sentence(ways, memory, device)} "
            "(train.check = false tries it all the same)."
        )


def _generous_bytes(config: dict[str, Any], num_parameters: int, workload: Workload) -> int:
    """More than the run can take, in no time: most small runs need no closer look."""
    width = config.get("hidden_size") or config.get("n_embed") or 0
    inner = config.get("intermediate_size") or 4 * width
    a_token = 4 * (depth_of(config) + 2) * (24 * width + 8 * inner)
    held = workload.held_out.tokens if workload.held_out else 0
    return (1 << 30) + 24 * num_parameters + (workload.largest.tokens + held) * a_token


def _advice_sentence(ways: list[Advice], memory: Memory, device: Device) -> str:
    if ways and ways[0].fits:
        listed = "; or ".join(f"{one.change} ({_gib(one.memory_bytes)}, {one.cost})" for one in ways[:3])
        return f"change the recipe: {listed}"
    if memory.fixed > device.memory_bytes:
        return f"weights and AdamW alone take {_gib(memory.fixed)}: choose a smaller base model or a larger device"
    least = f"; the least is {_gib(ways[0].memory_bytes)} with {ways[0].change}" if ways else ""
    return f"no smaller batch fits{least}: choose a smaller base model or a larger device"


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {_gib(size)}" for name, size in asdict(memory).items() if size)


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:,.0f} MiB"


def try_largest_batch(
    model: CausalModel,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    stream: TrainingStream,
    num_batches: int,
) -> None:
    """Run the batch with most tokens forward and backward and forget it: memory runs out now or never.

    Weights, gradients and random state are as before. The moments that a new optimizer has yet to make are held
    free meanwhile. Raises `TrainingError` where memory does not suffice.
    """
    number = int(stream.batch_tokens(num_batches).argmax())
    batch = stream.batch(number)
    if not len(batch.target_ids):
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            compact = optimizer if isinstance(optimizer, CompactAdamW) else None
            each = state_bytes(compact.eight_bit, compact.kahan) if compact else state_bytes(False, False)
            moments = 0 if optimizer.state else each * sum(parameter.numel() for parameter in parameters)
            room = torch.empty(int(moments), dtype=torch.uint8, device=device)
            model.train()
            torch.autograd.backward(objective.loss(model, batch, device).total / len(batch.target_ids))
            del room
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "memory" not in str(error):
            raise
        raise TrainingError(
            f"Memory runs out on the largest batch ({len(batch.input_ids):,} tokens); set "
            "train.gradient_checkpointing = true, or halve train.per_device_train_batch_size and double "
            "train.gradient_accumulation_steps. `firefly plan` says what fits."
        ) from error
    finally:
        model.zero_grad(set_to_none=True)


def planned_config(recipe: Recipe, base: Path) -> dict[str, Any]:
    """config.json of the model that will be trained: the pruned one, as it is or as it will be."""
    from firefly.model.load import read_config

    if recipe.prune is None:
        return read_config(base)
    pruned = recipe.out / "pruned"
    if (pruned / "config.json").is_file():
        return read_config(pruned)
    config, multiple = read_config(base), recipe.prune.pad_to_multiple
    rows = -(-recipe.prune.vocab_size // multiple) * multiple
    if rows > config.get("vocab_size", 0):
        raise ModelError(
            f"prune.vocab_size = {rows:,} and {recipe.model.base} has {config.get('vocab_size', 0):,} tokens; "
            "lower it, or leave the prune table out."
        )
    return config | {"vocab_size": rows}
