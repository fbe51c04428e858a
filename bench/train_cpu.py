"""Training throughput on the CPU: Firefly against transformers' Trainer with padding, in alternation.

    python bench/train_cpu.py [--quick]

Both train the same random-initialised BLOOM (hidden 256, 8 layers, vocabulary 46,145: 18M parameters) in float32
on the same samples with the article's length distribution (lognormal, median 110 tokens, at most 512), 16 a step,
loss on the target alone. Counted are real tokens, padding left out, over the time of the training steps. The peer
is the original Firefly's way: each batch padded to its longest sample, logits at every position.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import rows
from firefly.console import quiet
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.files import sha256_file, write_json
from firefly.recipe import Recipe
from firefly.train.loop import train

BATCH, LIMIT, VOCAB = 16, 512, 46_145


def make_model(folder: Path) -> Path:
    """A random BLOOM and a tokenizer that is never used to encode anything."""
    from tokenizers import Tokenizer, models
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=VOCAB, hidden_size=256, n_layer=8, n_head=8, bos_token_id=1, eos_token_id=2
    )
    BloomForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def make_tokens(folder: Path, model: Path, num_samples: int) -> Path:
    """A tokens directory of random samples with the article's lengths; two fifths of a sample are its prompt."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(110), 0.9, num_samples).astype(int), 8, LIMIT)
    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    ids = random.integers(3, VOCAB, borders[-1]).astype(np.uint16)
    mask = np.concatenate([np.arange(length) >= int(0.4 * length) for length in lengths]).astype(np.uint8)
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


def firefly_speed(model: Path, tokens: Path, steps: int, place: Path) -> float:
    """Real tokens a second of our training loop."""
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
                "logging_steps": steps,
                "precision": "float32",
                "report_to": [],
            },
        }
    )
    train(recipe, model, tokens, place / "run", place / "model")
    lines = (place / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return float(json.loads(lines[0])["tokens_per_s"])


def trainer_speed(model: Path, tokens: Path, steps: int, place: Path) -> float:
    """Real tokens a second of transformers' Trainer on the same samples, padded."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    data = Tokens.open(tokens, "train")
    samples = []
    for number in range(len(data)):
        sample = data.sample(number)
        ids = torch.from_numpy(sample.ids.astype(np.int64))
        samples.append(
            {"input_ids": ids, "labels": torch.where(torch.from_numpy(sample.mask > 0), ids, -100)}
        )
    real_tokens = [0]

    def collate(batch: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        def padded(name: str, value: int) -> torch.Tensor:
            return torch.nn.utils.rnn.pad_sequence([item[name] for item in batch], True, value)

        lengths = torch.tensor([len(item["input_ids"]) for item in batch])
        real_tokens[0] += int(lengths.sum())
        ids = padded("input_ids", 0)
        attention = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return {"input_ids": ids, "labels": padded("labels", -100), "attention_mask": attention}

    arguments = TrainingArguments(
        output_dir=str(place),
        per_device_train_batch_size=BATCH,
        max_steps=steps,
        learning_rate=3e-5,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        seed=42,
    )
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    done = Trainer(network, arguments, data_collator=collate, train_dataset=samples).train()
    return real_tokens[0] / float(done.metrics["train_runtime"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two short runs of each, for a look")
    quick = parser.parse_args().quick
    steps, repeats = (3, 2) if quick else (8, 3)
    quiet()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = make_model(place / "base")
        tokens = make_tokens(place / "tokens", model, steps * BATCH * 4)
        ours, peers = [], []
        for turn in range(repeats):  # alternating, so that a machine that slows down slows both
            ours.append(firefly_speed(model, tokens, steps, place / f"firefly-{turn}"))
            peers.append(trainer_speed(model, tokens, steps, place / f"trainer-{turn}"))
            print(
                f"run {turn + 1}: Firefly {ours[-1]:,.0f} tokens/s, Trainer padded {peers[-1]:,.0f} tokens/s"
            )
    ratios = [one / other for one, other in zip(ours, peers, strict=True)]
    row = {
        "model": "bloom-18M random",
        "steps": steps,
        "runs": repeats,
        "firefly_tokens_per_s": round(statistics.median(ours), 1),
        "trainer_padded_tokens_per_s": round(statistics.median(peers), 1),
        "ratio_median": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }
    print(f"appended to {rows.append('train_cpu', [row]).relative_to(rows.ROOT)}")
    rows.finish({"firefly_over_trainer_padded": statistics.median(ratios)})


if __name__ == "__main__":
    main()
