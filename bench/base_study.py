"""Learning rate and size of the embedded base: three of each, every run with the same arithmetic.

    firefly data src/firefly/demo/pretrain.toml                  # once, after make_corpus.py and make_base.py
    python bench/base_study.py [--quick] [--data out/base]

A run reads as many tokens as its size can within a budget of operations (6 · parameters · tokens), with the settings
of `src/firefly/demo/pretrain.toml`. A row gives the held-out bits per byte of every kind of text, and the speed. Short
runs favour small models and high rates; `src/firefly/demo/README.md` says what was concluded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import rows
from firefly.recipe import Recipe
from firefly.train.loop import TrainResult, train

PRETRAIN = rows.ROOT / "src" / "firefly" / "demo" / "pretrain.toml"
SIZES = {"192x6": (192, 6, 6), "256x4": (256, 4, 8), "320x5": (320, 5, 10)}  # hidden, layers, heads
RATES = (1e-3, 2.5e-3, 6e-3)
WARMUP_SHARE = 0.1


def run(size: str, rate: float, operations: float, data: Path, place: Path) -> TrainResult:
    """Train one size at one rate for as many steps as the operations last."""
    seed = place / f"seed-{size}"
    if not seed.is_dir():
        hidden, layers, heads = map(str, SIZES[size])
        options = ["--hidden-size", hidden, "--layers", layers, "--heads", heads]
        command = [sys.executable, str(rows.ROOT / "tools" / "make_base.py"), *options]
        like = ["--tokenizer", str(rows.ROOT / "out" / "seed"), "--out", str(seed)]
        subprocess.run([*command, *like], check=True, capture_output=True)
    num_parameters = (seed / "model.safetensors").stat().st_size / 2  # bf16
    plain = Recipe.load(PRETRAIN)
    assert plain.data.pack_length is not None
    step_tokens = plain.train.per_device_train_batch_size * plain.data.pack_length
    steps = max(2, round(operations / (6 * num_parameters * step_tokens)))
    settings = {
        "learning_rate": rate,
        "max_steps": steps,
        "warmup_steps": max(1, round(WARMUP_SHARE * steps)),
        "eval_steps": steps,
    }
    recipe = Recipe.load(PRETRAIN, [f"train.{name}={value}" for name, value in settings.items()])
    at = place / f"{size}-{rate}"
    return train(recipe, seed, data / "tokens", at / "run", at / "model")


def main() -> None:
    """Train every size at every rate, and append a row for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--data", type=Path, default=rows.ROOT / "out" / "base", help="the output of firefly data"
    )
    parser.add_argument("--operations", type=float, default=1.1e13, help="of one run")
    parser.add_argument("--quick", action="store_true", help="a hundredth of them")
    options = parser.parse_args()
    operations = options.operations / (100 if options.quick else 1)
    losses = {}
    with tempfile.TemporaryDirectory() as place:
        for size in SIZES:
            for rate in RATES:
                result = run(size, rate, operations, options.data, Path(place))
                bits = {kind: round(score["bits_per_byte"], 4) for kind, score in result.validation.items()}
                row = {
                    "size": size,
                    "parameters": result.parameters,
                    "learning_rate": rate,
                    "operations": operations,
                    "tokens": result.trained_tokens,
                    "tokens_per_s": result.tokens_per_s,
                    **{f"bits_per_byte_{kind}": bits[kind] for kind in sorted(bits)},
                }
                rows.append("base_study", [row])
                losses[size, rate] = bits["all"]
    best = min(losses, key=lambda key: losses[key])
    print(f"best: {best[0]} at {best[1]}")
    rows.finish({"worst_over_best": max(losses.values()) / losses[best]})


if __name__ == "__main__":
    main()
