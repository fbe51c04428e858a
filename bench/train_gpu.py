"""Fine-tuning on one GPU: Firefly's options against padding and eager attention, correctness first.

    python bench/train_gpu.py           on a GPU, under 8 minutes; stops early rather than late
    python bench/train_gpu.py --tiny    the same steps with a tiny model on whatever there is, for a test

The shapes are bloom-1b4-zh and bloom-2b6-zh, every parameter learning, and bloom-7b1-zh with adapters on a base in 4
bits, all with random weights (vocabulary 46,145); samples have lognormal lengths (median 110, σ 0.7, 16 … 512), 45 % of
each a prompt without loss. Before anything is timed, the loss and gradients of a small model of the same kind are
compared with float32: the error of our bf16 must not exceed that of the padded bf16 way. Counted are real tokens. MFU
counts 6 · N operations a token (4 · N for frozen weights) with the head at learned positions only, over the dense bf16
peak that a large matrix product reaches on the same machine. A way that fails costs no other its figures. This file has
not yet run on a GPU; its kernels were compiled for an H200.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import rows
from firefly.console import quiet
from firefly.data.loader import Batch, pack
from firefly.model.adapters import attach, quantize
from firefly.model.bloom import Bloom, BloomShape, alibi_slopes
from firefly.model.compiled import compile_layers
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss
from firefly.recipe import TrainSection
from firefly.train.devices import training_flops
from firefly.train.optim import make_optimizer

SHAPES = {
    "tiny": {"vocab_size": 500, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "bloom-1b4-zh": {"vocab_size": 46_145, "hidden_size": 2048, "n_layer": 24, "n_head": 16},
    "bloom-7b1-zh": {"vocab_size": 46_145, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
    "bloom-2b6-zh": {"vocab_size": 46_145, "hidden_size": 2560, "n_layer": 30, "n_head": 32},
}
CHECKED = {"vocab_size": 4_000, "hidden_size": 256, "n_layer": 4, "n_head": 8}
MEMORY_GB = {"bloom-1b4-zh": 12.0, "bloom-2b6-zh": 24.0, "bloom-7b1-zh": 10.0}
"""What the lean way of each shape should need at most."""
BUDGET_S = 400
"""No further way is begun after this; one that compiles may take a minute."""

COMPACT = {"weights": "bf16_stochastic", "optimizer": "adamw_8bit"}
LADDER: list[tuple[str, dict[str, Any]]] = [
    ("packed", {}),
    ("packed, compiled", {"compile": True}),
    ("bf16 weights", {"weights": "bf16_stochastic", "compile": True}),
    ("bf16 weights, 8-bit moments", {**COMPACT, "compile": True}),
    ("the same, every 2nd layer recomputed", {**COMPACT, "compile": True, "gradient_checkpointing": 2}),
    ("the same, every layer recomputed", {**COMPACT, "compile": True, "gradient_checkpointing": 1}),
]
"""Ours, each step named by what it sets in the recipe's [train]."""
QLORA: list[tuple[str, dict[str, Any]]] = [
    ("adapters on 4 bits, every layer recomputed", {"method": "qlora", "gradient_checkpointing": 1})
]
Way = tuple[str, dict[str, Any] | None]
FAILED: list[str] = []
"""What went wrong; the run then ends with status 1."""
PADDED: Way = ("padded, eager", None)
WAYS: dict[str, list[Way]] = {
    "tiny": [PADDED, *LADDER, *QLORA],
    "bloom-1b4-zh": [PADDED, *LADDER],
    "bloom-7b1-zh": [*QLORA],
    "bloom-2b6-zh": [PADDED, *LADDER[2:]],  # float32 weights once more would tell nothing new
}


@dataclass(frozen=True)
class Speed:
    """What a way reached."""

    tokens_per_s: float
    peak_bytes: int  # in tensors
    reserved_bytes: int  # held by torch's allocator
    flop_per_s: float


def make_batches(count: int, samples: int, vocab_size: int, longest: int) -> list[Batch]:
    """Packed batches of random samples."""
    random = np.random.default_rng(0)

    def sample() -> tuple[Any, Any]:
        length = int(np.clip(random.lognormal(np.log(110), 0.7), 16, longest))
        return random.integers(3, vocab_size, length), np.arange(length) >= int(0.45 * length)

    return [pack([sample() for _ in range(samples)]) for _ in range(count)]


def make_model(shape: dict[str, int], device: torch.device, dtype: torch.dtype) -> Bloom:
    """Our BLOOM with random weights as transformers would draw them."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Bloom(BloomShape.from_config(dict(shape)))
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(dtype).slopes = alibi_slopes(shape["n_head"]).to(
        device
    )  # float32 in any model, as when it is loaded
    return model


def make_in_four_bits(shape: dict[str, int], device: torch.device, section: TrainSection) -> Bloom:
    """The same with new adapters on a base in NF4, made part by part: in 16 bits there is never more than a layer."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Bloom(BloomShape.from_config(dict(shape)))
    model.slopes = alibi_slopes(shape["n_head"]).to(device)
    stem = model.transformer
    for part in (stem.word_embeddings, stem.word_embeddings_layernorm, *stem.h, stem.ln_f):
        part.to(torch.bfloat16).to_empty(device=device)
        for module in part.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        for parameter in part.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.02)
        quantize(part, device, bf16=True)
    attach(model, section, Path())
    return model


def padded_loss(model: Any, batch: Batch, device: torch.device) -> Tensor:
    """transformers' way: rows padded on the right, eager attention, logits at every position; the sum in nats."""
    lengths = torch.from_numpy(np.diff(batch.borders))
    flat, learned = torch.from_numpy(batch.input_ids), torch.zeros(len(batch.input_ids), dtype=torch.bool)
    learned[torch.from_numpy(batch.target_positions) + 1] = True

    def rows_of(values: Tensor, fill: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(torch.split(values, lengths.tolist())), True, fill).to(
            device
        )

    ids, labels = rows_of(flat, 0), rows_of(torch.where(learned, flat, -100), -100)
    attention = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long().to(device)
    logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def transformers_twin(model: Bloom, shape: dict[str, int]) -> Any:
    """transformers' BLOOM with the same weights."""
    from transformers import BloomConfig, BloomForCausalLM

    with torch.device(model.slopes.device):
        twin = BloomForCausalLM(BloomConfig(**shape)).to(model.head.dtype)
    state = model.state_dict()
    twin.load_state_dict({**state, "lm_head.weight": state["transformer.word_embeddings.weight"]})
    return twin.train()


def check(device: torch.device) -> dict[str, float]:
    """Errors of loss and gradient against float32, for our bf16 and the padded bf16 way: means over four batches.

    Stops with a sentence where float32 disagrees with transformers.
    """
    each = [_errors(device, CHECKED, batch) for batch in make_batches(4, 8, CHECKED["vocab_size"], 300)]
    found = {name: statistics.mean(one[name] for one in each) for name in each[0]}
    if found["float32_loss_error"] > 1e-4 or found["float32_gradient_error"] > 1e-3:
        raise SystemExit(f"float32 differs from transformers: {found}")
    return found


def _errors(device: torch.device, shape: dict[str, int], batch: Batch) -> dict[str, float]:
    """The errors of one batch; the gradient's is the mean over all parameters, each as a share of its norm."""
    count = len(batch.target_ids)
    exact = make_model(shape, device, torch.float32).train()
    twin = transformers_twin(exact, shape)

    def outcome(loss: Callable[[], Tensor], model: torch.nn.Module) -> tuple[float, dict[str, Tensor]]:
        total = loss() / count
        names = dict(model.named_parameters())
        gradients = torch.autograd.grad(total, list(names.values()))
        return float(total.detach()), {name: one.float() for name, one in zip(names, gradients, strict=True)}

    def ours(bf16: bool) -> Tensor:
        return batch_loss(exact, PackedInput.of(batch, device), bf16)[0]

    def theirs() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16):
            return padded_loss(twin, batch, device)

    loss, gradients = outcome(lambda: padded_loss(twin, batch, device), twin)
    found = {}
    for name, (value, got) in {
        "float32": outcome(lambda: ours(False), exact),
        "bf16": outcome(lambda: ours(True), exact),
        "padded_bf16": outcome(theirs, twin),
    }.items():
        found[f"{name}_loss_error"] = abs(value - loss)
        found[f"{name}_gradient_error"] = statistics.mean(
            float((got[one] - gradient).norm() / gradient.norm()) for one, gradient in gradients.items()
        )
    return found


def timed(
    step: Callable[[Batch], None], batches: list[Batch], device: torch.device, per_token: int, per_target: int
) -> Speed:
    """Time every step after two that warm up (compilation, allocator); the last two are operations."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for batch in batches[:2]:
        step(batch)
    durations = []
    for batch in batches[2:]:
        _wait(device)
        begin = time.perf_counter()
        step(batch)
        _wait(device)
        durations.append((time.perf_counter() - begin) / len(batch.input_ids))
    tokens_per_s = 1 / statistics.median(durations)
    tokens = sum(len(batch.input_ids) for batch in batches)
    learned = sum(len(batch.target_ids) for batch in batches)
    on_gpu = device.type == "cuda"
    return Speed(
        tokens_per_s,
        torch.cuda.max_memory_allocated() if on_gpu else 0,
        torch.cuda.max_memory_reserved() if on_gpu else 0,
        tokens_per_s * (per_token + per_target * learned / tokens),
    )


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def our_step(model: Bloom, section: TrainSection, device: torch.device) -> Callable[[Batch], None]:
    """One training step as the loop takes it, its wait for the loss and the norm included."""
    model.checkpoint_every = section.gradient_checkpointing
    compiled = section.compile and compile_layers(model, device)
    optimizer = make_optimizer(model.parameters(), section, compiled)
    parameters = list(model.train().parameters())

    def step(batch: Batch) -> None:
        loss, _ = batch_loss(model, PackedInput.of(batch, device), bf16=True)
        torch.autograd.backward(loss / len(batch.target_ids))
        norm = torch.nn.utils.clip_grad_norm_(parameters, section.max_grad_norm)
        if not math.isfinite(sum(torch.stack([loss.detach(), norm]).tolist())):
            raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def padded_step(model: Any, device: torch.device) -> Callable[[Batch], None]:
    """One training step as transformers' Trainer takes it in bf16: autocast over float32 weights, fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = padded_loss(model, batch, device)
        torch.autograd.backward(loss / len(batch.target_ids))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peak_flop_per_s(device: torch.device) -> float:
    """What large bf16 matrix products reach here."""
    size = 8192 if device.type == "cuda" else 256
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(5):
        _wait(device)
        begin = time.perf_counter()
        for _ in range(5):
            left @ right
        _wait(device)
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - begin))
    return best


def ladder(name: str, device: torch.device, steps: int, begun: float, peak: float) -> list[dict[str, Any]]:
    """Rows of one shape: the padded way, then ours. A way that fails, for want of memory perhaps, has no row."""
    batches = make_batches(steps + 2, 16, SHAPES[name]["vocab_size"], 100 if name == "tiny" else 512)
    found = []
    for label, options in WAYS[name]:
        if time.monotonic() - begun > BUDGET_S:
            print(f"{name}: no time left for '{label}' and what follows")
            break
        try:
            speed = measure(SHAPES[name], options, batches, device)
        except Exception as error:  # the other ways' figures are worth having all the same
            reason = " ".join(str(error).split())[:300]
            print(f"{name:14} {label:38} FAILED: {type(error).__name__}: {reason}", flush=True)
            if not isinstance(error, torch.OutOfMemoryError):
                FAILED.append(f"{name}: {label}")
            continue
        row = {
            "model": name,
            "way": label,
            "tokens_per_s": round(speed.tokens_per_s, 1),
            "mfu": round(speed.flop_per_s / peak, 4),
            "peak_gb": round(speed.peak_bytes / 1e9, 2),
            "reserved_gb": round(speed.reserved_bytes / 1e9, 2),
        }
        print(
            f"{name:14} {label:38} {row['tokens_per_s']:>10,.0f} tokens/s {row['mfu']:6.1%} {row['peak_gb']:6.2f} GB "
            f"({row['reserved_gb']:.2f} reserved)",
            flush=True,
        )
        found.append(row)
    return found


def measure(
    shape: dict[str, int], options: dict[str, Any] | None, batches: list[Batch], device: torch.device
) -> Speed:
    """Time one way. Its model and optimizer are gone when this returns, so that the next way has all the memory."""
    gc.collect()  # also what a failed way's traceback held
    if device.type == "cuda":
        torch.cuda.empty_cache()
    torch.compiler.reset()
    with torch.device("meta"):
        operations = training_flops(Bloom(BloomShape.from_config(dict(shape))))
    if options is None:
        twin = transformers_twin(make_model(shape, device, torch.float32), shape)
        return timed(padded_step(twin, device), batches, device, *operations)
    section = TrainSection(**options, warmup_steps=0)
    if section.method == "qlora":
        model = make_in_four_bits(shape, device, section)
        operations = training_flops(model)
    else:
        model = make_model(shape, device, torch.float32 if section.weights == "float32" else torch.bfloat16)
    return timed(our_step(model, section, device), batches, device, *operations)


def ratios(found: list[dict[str, Any]]) -> dict[str, float]:
    """Of each shape: ours over the padded way, the best MFU, the least memory, and how much of the best speed is left
    to the fastest way within `MEMORY_GB`."""
    made: dict[str, float] = {}
    for name in dict.fromkeys(row["model"] for row in found):
        ours = [row for row in found if row["model"] == name and row["way"] != "padded, eager"]
        theirs = [row for row in found if row["model"] == name and row["way"] == "padded, eager"]
        if not ours:
            continue
        best = max(ours, key=_speed)
        lean = [row for row in ours if row["peak_gb"] <= MEMORY_GB.get(name, math.inf)]
        key = name.replace("-", "_")
        if theirs:
            made[f"{key}_vs_padded"] = _speed(best) / _speed(theirs[0])
        made[f"{key}_mfu"] = best["mfu"]
        made[f"{key}_leanest_gb"] = min(row["peak_gb"] for row in ours)
        made[f"{key}_lean_vs_fastest"] = max(map(_speed, lean), default=0.0) / _speed(best)
    return made


def _speed(row: dict[str, Any]) -> float:
    return float(row["tokens_per_s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on the CPU too; writes no CSV")
    tiny = parser.parse_args().tiny
    quiet()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not tiny:
        print("There is no GPU here, so nothing was measured; --tiny tries the benchmark on the CPU.")
        rows.finish({})
        return
    begun = time.monotonic()
    errors = check(device)
    print("correct: " + ", ".join(f"{name} {value:.1e}" for name, value in errors.items()))
    if errors["bf16_gradient_error"] > errors["padded_bf16_gradient_error"]:
        FAILED.append("our bf16 is further from float32 than the padded way's")
    peak = peak_flop_per_s(device)
    print(f"matrix products reach {peak / 1e12:.1f} TFLOP/s")
    found = []
    for name in ("tiny",) if tiny else ("bloom-1b4-zh", "bloom-7b1-zh", "bloom-2b6-zh"):
        found += (made := ladder(name, device, 1 if tiny else 8, begun, peak))
        if made and not tiny:  # at once, whatever happens to the next shape
            print(f"appended to {rows.append('train_gpu', made).relative_to(rows.ROOT)}")
    rows.finish(ratios(found))
    if FAILED:
        raise SystemExit(f"failed: {'; '.join(FAILED)}")


if __name__ == "__main__":
    main()
