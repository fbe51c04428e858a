"""From records to packed tokens: Firefly against `datasets.map` and the original Firefly's per-item path, in turn.

    python bench/data.py [--quick] [--tokenizers DIR]

Records of six sources, nearly 200,000 different ones, so that nothing is gained by remembering whole records; lengths
much like the article's; Qwen3's tokenizer; ChatML; two processes for Firefly and for `datasets.map`. Firefly does all
of it: template → render → encode → mask → cut → write → pack, once with the `tokenizers` library alone (pieces that it
remembers are not encoded again) and once with the encoder that it would choose (kitoken for new pieces); both times
with proof and audits. `datasets.map` gets rendered examples and only renders the format, encodes and masks them. The
original's path runs per record, as its data loader does: two tokenizer calls, lists, and a collator that pads batches
of 16. Memory is the peak of the summed resident sizes of the whole process tree while Firefly encodes and packs
100,000 and 2,000,000 records.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import rows
from firefly.console import quiet
from firefly.data import tokens as encoding
from firefly.data.dataset import FILES
from firefly.data.engine import ordered_map
from firefly.data.example import Example
from firefly.data.pack import pack_rows
from firefly.data.tasks import load_tasks
from firefly.files import open_binary
from firefly.recipe import DataSection

LIMIT, PACK, WORKERS, BLOCK = 1024, 2048, 2, 2000
SOURCES: tuple[tuple[str, str, dict[str, str], float], ...] = (
    # kind, file of the development data, field → its name there, share
    ("Couplet", "couplet_duilian", {"first": "first", "second": "second"}, 0.1),
    ("ClassicalChinese", "classical_niutrans", {"classical": "classical", "modern": "modern"}, 0.25),
    ("SentimentAnalyze", "senti_shopping", {"review": "review", "label": "label"}, 0.25),
    ("", "inst_alpaca_zh_carbonz0", {"input": "instruction", "target": "output"}, 0.2),
    ("", "cot_alpaca_cot", {"input": "instruction", "target": "output"}, 0.14),
    ("", "mrc_cmrc2018", {"input": "context", "target": "question"}, 0.06),
)

Raw = tuple[str, dict[str, str]]


def read_raw(pack: Path, count: int) -> list[Raw]:
    """`count` records, (kind, fields), of the sources in their shares; an empty kind is an instruction as it is."""
    found: list[Raw] = []
    for kind, name, fields, share in SOURCES:
        with open_binary(pack / f"{name}.jsonl.zst") as stream:
            lines = bytes(stream.read()).decode("utf-8").split("\n")[: int(count * share)]
        for record in (json.loads(line) for line in lines if line):
            values = {field: str(record[theirs]) for field, theirs in fields.items()}
            if all(values.values()):
                found.append((kind, values))
    random.Random(1).shuffle(found)
    return found


def synthesise(raw: Sequence[Raw], count: int) -> Iterator[Raw]:
    """`count` records by repetition, each with some noise, so that no two are the same."""
    rng = random.Random(0)
    yield from raw[:count]
    for number in range(len(raw), count):
        kind, fields = rng.choice(raw)
        first = next(iter(fields))
        yield kind, fields | {first: f"{fields[first]}{number}"}


def blocks(records: Iterator[Raw]) -> Iterator[tuple[int, list[Raw]]]:
    """Numbered blocks for the template stage."""
    first, block = 0, []
    for record in records:
        block.append(record)
        if len(block) == BLOCK:
            yield first, block
            first, block = first + len(block), []
    if block:
        yield first, block


def templated(block: tuple[int, list[Raw]]) -> bytes:
    """The dataset's lines for one block: instruction templates filled in."""
    first, records = block
    tasks = cache(load_tasks)()
    lines = []
    for number, (kind, fields) in enumerate(records, start=first):
        if kind:
            example = tasks[kind].render(fields, source=str(number))
        else:
            example = Example.of("BELLE", fields["input"], fields["target"], str(number))
        lines.append(example.to_json() + "\n")
    return "".join(lines).encode()


def firefly(records: Iterator[Raw], model: Path, folder: Path, fast: bool) -> dict[str, float]:
    """Raw records to packed rows; returns seconds by stage, tokens, and the rows' efficiency."""
    encoders = encoding._ENCODERS
    start_s = time.perf_counter()
    dataset = folder / "dataset"
    dataset.mkdir(parents=True)
    with (dataset / FILES["train"]).open("wb") as handle:
        for lines in ordered_map(templated, blocks(records), num_workers=WORKERS):
            handle.write(lines)
    (dataset / FILES["validation"]).touch()
    templates_s = time.perf_counter() - start_s
    section = DataSection.model_validate(
        {
            "sources": [{"path": "none"}],
            "chat_format": "chatml",
            "max_seq_length": LIMIT,
            "allow_lost_targets": True,
            "num_workers": WORKERS,
        }
    )
    if not fast:
        encoding._ENCODERS = ("pieces",)
    try:
        result = encoding.encode_dataset(dataset, model, section, folder / "tokens")
    finally:
        encoding._ENCODERS = encoders
    packed = pack_rows(np.diff(np.load(folder / "tokens" / "train" / "borders.npy")), PACK, (0, 0, 1))
    return {
        "wall_s": time.perf_counter() - start_s,
        "templates_s": templates_s,
        "tokens": result.tokens["train"],
        "efficiency": packed.efficiency,
    }


def datasets_map(pairs: Any, model: Path) -> float:
    """Seconds that `datasets.map` takes to render, encode and mask rendered examples."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def work(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        asked = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in batch["input"]]
        heads = tokenizer(asked, add_special_tokens=False)["input_ids"]
        tails = tokenizer([f"{text}<|im_end|>\n" for text in batch["target"]], add_special_tokens=False)[
            "input_ids"
        ]
        joined = list(zip(heads, tails, strict=True))
        return {
            "input_ids": [(head + tail)[:LIMIT] for head, tail in joined],
            "mask": [([0] * len(head) + [1] * (len(tail) - 1) + [0])[:LIMIT] for head, tail in joined],
        }

    start_s = time.perf_counter()
    pairs.map(
        work, batched=True, num_proc=WORKERS, load_from_cache_file=False, remove_columns=["input", "target"]
    )
    return time.perf_counter() - start_s


def firefly_item(pairs: Sequence[tuple[str, str]], model: Path) -> float:
    """Seconds of the original Firefly's way: each record on its own, every epoch anew, then a padding collator."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    start_s = time.perf_counter()
    batch: list[tuple[list[int], list[int]]] = []
    for question, answer in pairs:
        head = tokenizer(question, add_special_tokens=False)["input_ids"]
        tail = tokenizer(answer, add_special_tokens=False)["input_ids"]
        ids = [tokenizer.eos_token_id, *head, tokenizer.eos_token_id, tokenizer.eos_token_id, *tail]
        ids.append(tokenizer.eos_token_id)
        batch.append((ids[:LIMIT], ([0] * (len(head) + 3) + [1] * (len(tail) + 1))[:LIMIT]))
        if len(batch) == 16:
            width = max(len(ids) for ids, _ in batch)
            np.asarray([ids + [0] * (width - len(ids)) for ids, _ in batch])
            np.asarray([mask + [0] * (width - len(mask)) for _, mask in batch])
            np.asarray([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
            batch = []
    return time.perf_counter() - start_s


def peak_bytes(command: list[str]) -> int:
    """The peak of the summed resident sizes of a command and all its children."""
    import psutil

    process = subprocess.Popen(command)
    root, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        total = 0
        for one in [root, *_children(root)]:
            try:
                total += one.memory_info().rss
            except psutil.Error:  # ended meanwhile
                continue
        peak = max(peak, total)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return peak


def _children(root: Any) -> list[Any]:
    import psutil

    try:
        return list(root.children(recursive=True))
    except psutil.Error:
        return []


def characters(pairs: Sequence[tuple[str, str]]) -> int:
    return sum(len(question) + len(answer) for question, answer in pairs)


def main() -> None:
    shared = rows.ROOT.parent / "shared"
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer records, for a look")
    parser.add_argument("--records", type=int, help="how many records a run has (200,000)")
    parser.add_argument("--runs", type=int, help="how often all are run in turn (3)")
    parser.add_argument("--tokenizers", type=Path, default=shared / "tokenizers", help="where qwen3/ lies")
    parser.add_argument(
        "--pack", type=Path, default=shared / "data" / "pack", help="where the raw records lie"
    )
    parser.add_argument(
        "--memory", type=int, help=argparse.SUPPRESS
    )  # one memory run, in a process of its own
    options = parser.parse_args()
    quiet()
    model = options.tokenizers / "qwen3"
    raw = read_raw(options.pack, 320_000)
    if options.memory:
        with tempfile.TemporaryDirectory() as folder:
            firefly(synthesise(raw, options.memory), model, Path(folder), fast=True)
        return

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    count, repeats, small, large = (
        (50_000, 1, 20_000, 100_000) if options.quick else (200_000, 3, 100_000, 2_000_000)
    )
    count, repeats = options.records or count, options.runs or repeats
    examples = [
        Example.from_record(json.loads(line), Path("bench"), 0)
        for block in blocks(synthesise(raw, count))
        for line in templated(block).splitlines()
    ]
    pairs = [(example.input, example.target) for example in examples]
    size = characters(pairs)
    seconds: dict[str, list[float]] = {name: [] for name in ("standard", "fast", "datasets_map", "item")}
    made: dict[str, float] = {}
    for turn in range(repeats):  # alternating, so that a machine that slows down slows all
        with tempfile.TemporaryDirectory() as folder:
            for name in ("standard", "fast"):
                made = firefly(synthesise(raw, count), model, Path(folder) / name, name == "fast")
                seconds[name].append(made["wall_s"])
            questions, answers = zip(*pairs, strict=True)
            table = datasets.Dataset.from_dict({"input": questions, "target": answers})
            table.save_to_disk(f"{folder}/pairs")
            seconds["datasets_map"].append(datasets_map(datasets.load_from_disk(f"{folder}/pairs"), model))
        some = pairs[: count // 10]
        seconds["item"].append(firefly_item(some, model) * size / characters(some))
        rates = ", ".join(f"{name} {count / taken[-1]:,.0f}" for name, taken in seconds.items())
        print(f"run {turn + 1}, records/s: {rates}", flush=True)

    def ratio(peer: str, ours: str) -> list[float]:
        return [slow / quick for slow, quick in zip(seconds[peer], seconds[ours], strict=True)]

    script = [sys.executable, str(Path(__file__).resolve()), "--tokenizers", str(options.tokenizers)]
    script += ["--pack", str(options.pack), "--memory"]
    peaks = [peak_bytes([*script, str(number)]) for number in (small, large)]
    print(f"peak memory: {peaks[0] >> 20:,} MiB at {small:,} records, {peaks[1] >> 20:,} MiB at {large:,}")
    new_rows: list[dict[str, Any]] = []
    for name, ours, peer in (
        ("vs_datasets_map", "standard", "datasets_map"),
        ("vs_datasets_map_fast", "fast", "datasets_map"),
        ("vs_firefly_item", "fast", "item"),
    ):
        ours_s, peer_s, ratios = (
            statistics.median(seconds[ours]),
            statistics.median(seconds[peer]),
            ratio(peer, ours),
        )
        new_rows.append(
            {
                "what": name,
                "records": count,
                "runs": repeats,
                "firefly_records_per_s": round(count / ours_s),
                "firefly_characters_per_s": round(size / ours_s),
                "peer_records_per_s": round(count / peer_s),
                "peer_characters_per_s": round(size / peer_s),
                "ratio_median": round(statistics.median(ratios), 3),
                "ratio_min": round(min(ratios), 3),
                "ratio_max": round(max(ratios), 3),
                "tokens_per_record": round(made["tokens"] / count, 1),
                "packing_efficiency": round(made["efficiency"], 5),
                "peak_mib_small": peaks[0] >> 20,
                "peak_mib_large": peaks[1] >> 20,
                "records_small_large": f"{small} {large}",
            }
        )
    print(f"appended to {rows.append('data', new_rows).relative_to(rows.ROOT)}")
    medians = {str(row["what"]): float(row["ratio_median"]) for row in new_rows}
    rows.finish(medians | {"rss_growth": peaks[1] / peaks[0]})


if __name__ == "__main__":
    main()
