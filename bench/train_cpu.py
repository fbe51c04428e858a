"""Training throughput and memory on the CPU: Firefly against what people use, in alternation.

    python bench/train_cpu.py [--quick]      the ratios
    python bench/train_cpu.py --check        50 losses of Firefly and of the padded Trainer, side by side

Random-initialised models (hidden 256, 8 layers, vocabulary 46,145; a BLOOM and a Qwen3 shape) train in float32 on the
same samples: 2,000 with lognormal lengths (median 110, σ 0.7, 16 … 512), 45 % of each a prompt without loss, 16 a step.
Every run takes the first steps · 16 of them once, in a process of its own, which tells its peak memory too:

    firefly      our loop
    padded       transformers' Trainer, each batch padded to its longest, as the original Firefly does
    trl          TRL's SFTTrainer, completion-only loss, otherwise its defaults (but float32, no recomputing)
    trl_grouped  the same with batches of like lengths: the best correct peer

Counted are real tokens, padding left out, over the time of the training steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import rows
from firefly.console import quiet
from firefly.data.loader import TrainingStream
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.files import sha256_file, write_json
from firefly.recipe import Recipe
from firefly.train.loop import train

BATCH, LIMIT, VOCAB, NUM_SAMPLES, SEED = 16, 512, 46_145, 2_000, 42
LEARNING_RATE = 3e-4
WAYS = ("firefly", "padded", "trl", "trl_grouped")
SHAPES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 8, "n_head": 8},
    "qwen3": {
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 768,
        "tie_word_embeddings": True,
    },
}


def make_model(folder: Path, family: str) -> Path:
    """A random model and a tokenizer that is never used to encode anything."""
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = {"vocab_size": VOCAB, "hidden_size": 256, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(family, **common, **SHAPES[family])
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(vocabulary))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", settings | {"unk_token": "<unk>", "pad_token": "<unk>"})
    return folder


def make_tokens(folder: Path, model: Path, num_samples: int) -> Path:
    """A tokens directory of the first `num_samples` random samples."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(110), 0.7, NUM_SAMPLES).astype(int), 16, LIMIT)[:num_samples]
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    # By Zipf's law, so that there is something to learn.
    ids = (2 + (VOCAB - 2) ** random.random(borders[-1])).astype(np.uint16)
    mask = np.concatenate([np.arange(length) >= int(0.45 * length) for length in lengths]).astype(np.uint8)
    for split, count in (("train", num_samples), ("validation", 1)):
        place = folder / split
        place.mkdir(parents=True)
        ids[: borders[count]].tofile(place / "tokens.bin")
        mask[: borders[count]].tofile(place / "mask.bin")
        np.save(place / "borders.npy", borders[: count + 1])
        np.save(place / "kinds.npy", np.zeros(count, np.uint16))
        np.save(place / "bytes.npy", lengths[:count].astype(np.int64))
        np.save(place / "origins.npy", np.arange(count, dtype=np.int64))
    index = {
        "tokens": {"train": int(borders[-1]), "validation": int(borders[1])},
        "kinds": ["Random"],
        "dtype": "uint16",
        "max_seq_length": LIMIT,
        "tokenizer_sha256": ModelTokenizer.load(model).sha256,
        "sha256": {
            p.relative_to(folder).as_posix(): sha256_file(p) for p in folder.rglob("*") if p.is_file()
        },
    }
    write_json(folder / "index.json", index)
    return folder


def run_firefly(model: Path, tokens: Path, steps: int, place: Path) -> dict[str, Any]:
    """Our training loop."""
    recipe = Recipe.from_table(
        {
            "name": "bench",
            "output_dir": str(place),
            "model": {"base": str(model)},
            "data": {"sources": [{"path": "none"}]},
            "train": {
                "per_device_train_batch_size": BATCH,
                "max_steps": steps,
                "warmup_steps": 0,
                "lr_scheduler_type": "constant",
                "learning_rate": LEARNING_RATE,
                "logging_steps": 1,
                "precision": "float32",
                "report_to": [],
                "seed": SEED,
            },
        }
    )
    done = train(recipe, model, tokens, place / "run", place / "model")
    lines = map(json.loads, (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines())
    return {"tokens_per_s": done.tokens_per_s, "losses": [row["loss"] for row in lines if "loss" in row]}


def run_peer(way: str, model: Path, tokens: Path, steps: int, place: Path) -> dict[str, Any]:
    """A peer's trainer on the same samples; the padded one takes them in Firefly's order."""
    data = Tokens.open(tokens, "train")
    stream = TrainingStream(data, BATCH, SEED)
    samples = [data.sample(number) for step in range(steps) for number in stream.batch(step).sample_ids]
    common: dict[str, Any] = {
        "output_dir": str(place),
        "per_device_train_batch_size": BATCH,
        "max_steps": steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": SEED,
        "bf16": False,
    }
    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    losses: list[float] = []
    if way == "padded":
        arguments = transformers.TrainingArguments(
            **common, remove_unused_columns=False, train_sampling_strategy="sequential"
        )
        items = [
            {"input_ids": ids, "labels": torch.where(torch.from_numpy(sample.mask > 0), ids, -100)}
            for sample in samples
            for ids in [torch.from_numpy(sample.ids.astype(np.int64))]
        ]

        class Recording(transformers.Trainer):  # type: ignore[misc]
            """Keeps each step's loss, as the logs round it."""

            def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
                loss = super().compute_loss(*args, **kwargs)
                losses.append(float(loss))
                return loss

        trainer: Any = Recording(network, arguments, data_collator=_padded, train_dataset=items)
    else:
        import datasets
        import trl

        strategy = "group_by_length" if way == "trl_grouped" else "random"
        settings = trl.SFTConfig(
            **common,
            completion_only_loss=True,
            gradient_checkpointing=False,
            train_sampling_strategy=strategy,
        )
        columns = {
            "input_ids": [sample.ids.astype(int).tolist() for sample in samples],
            "completion_mask": [sample.mask.astype(int).tolist() for sample in samples],
        }
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(model)
        trainer = trl.SFTTrainer(
            network, settings, train_dataset=datasets.Dataset.from_dict(columns), processing_class=tokenizer
        )
    done = trainer.train()
    num_tokens = sum(len(sample.ids) for sample in samples)
    return {"tokens_per_s": num_tokens / float(done.metrics["train_runtime"]), "losses": losses}


def _padded(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch padded on the right to its longest sample."""

    def padded(name: str, value: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([item[name] for item in batch], True, value)

    lengths = torch.tensor([len(item["input_ids"]) for item in batch])
    ids = padded("input_ids", 0)
    attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": attention}


def measure_here(way: str, model: Path, tokens: Path, steps: int, place: Path) -> None:
    """One run, in this process; the last line printed is its result."""
    quiet()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    if way == "firefly":
        result = run_firefly(model, tokens, steps, place)
    else:
        result = run_peer(way, model, tokens, steps, place)
    result["rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(result))


def measure(way: str, model: Path, tokens: Path, steps: int, place: Path) -> dict[str, Any]:
    """One run, in a process of its own."""
    command = [sys.executable, __file__, "--one", way, str(model), str(tokens), str(steps), str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(family: str, steps: int, repeats: int, place: Path) -> dict[str, Any]:
    """One result row: medians over alternating runs, and the largest difference of the losses."""
    model = make_model(place / family, family)
    tokens = make_tokens(place / f"{family}-tokens", model, steps * BATCH)
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for turn in range(repeats):  # alternating, so that a machine that slows down slows all
        for way in WAYS:
            runs[way].append(measure(way, model, tokens, steps, place / f"{family}-{way}-{turn}"))
        speeds = ", ".join(f"{way} {runs[way][-1]['tokens_per_s']:,.0f}" for way in WAYS)
        print(f"{family}, run {turn + 1}, tokens/s: {speeds}", flush=True)
    row: dict[str, Any] = {"model": family, "steps": steps, "runs": repeats}
    for way in WAYS:
        row[f"{way}_tokens_per_s"] = round(statistics.median(r["tokens_per_s"] for r in runs[way]), 1)
    for way in WAYS:
        row[f"{way}_rss_gb"] = round(statistics.median(r["rss_bytes"] for r in runs[way]) / 1e9, 2)
    pairs = zip(runs["firefly"][0]["losses"], runs["padded"][0]["losses"], strict=True)
    row["loss_difference"] = max(abs(ours - theirs) for ours, theirs in pairs)
    return row


def check(steps: int, place: Path) -> None:
    """Compare `steps` losses with the padded Trainer's; exits with 1 where they differ by more than 1e-3."""
    worst = 0.0
    for family in SHAPES:
        model = make_model(place / family, family)
        tokens = make_tokens(place / f"{family}-tokens", model, steps * BATCH)
        ours, theirs = (
            measure(way, model, tokens, steps, place / f"{family}-{way}")["losses"]
            for way in ("firefly", "padded")
        )
        difference = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
        print(f"{family}: {ours[0]:.4f} → {ours[-1]:.4f} in {steps} steps, difference ≤ {difference:.1e}")
        worst = max(worst, difference)
    rows.finish({"largest_loss_difference": worst})
    if worst > 1e-3:
        raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short runs of each, for a look")
    parser.add_argument("--check", action="store_true", help="compare losses instead of speed")
    parser.add_argument("--steps", type=int, help="steps a run (default: 8, quick: 3, check: 50)")
    parser.add_argument("--one", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        way, model, tokens, steps, place = options.one
        measure_here(way, Path(model), Path(tokens), int(steps), Path(place))
        return
    quiet()
    with tempfile.TemporaryDirectory() as folder:
        if options.check:
            check(options.steps or 50, Path(folder))
            return
        steps, repeats = (3, 2) if options.quick else (8, 3)
        found = {name: compare(name, options.steps or steps, repeats, Path(folder)) for name in SHAPES}
    print(f"appended to {rows.append('train_cpu', list(found.values())).relative_to(rows.ROOT)}")
    ratios = {}
    for name, row in found.items():
        ours = row["firefly_tokens_per_s"]
        ratios[f"{name}_vs_padded"] = ours / row["padded_tokens_per_s"]
        ratios[f"{name}_vs_best_peer"] = ours / max(row[f"{way}_tokens_per_s"] for way in WAYS[1:])
    ratios["rss_vs_padded"] = max(row["firefly_rss_gb"] / row["padded_rss_gb"] for row in found.values())
    rows.finish(ratios)


if __name__ == "__main__":
    main()
