"""Vocabulary pruning against LLMPruner, `cp`, trimbed and a bare `encode_batch`, in alternation.

    python bench/prune.py [--quick] [--shape 7b1] [--llmpruner DIR] [--trimbed PYTHON] [--tokenizers DIR] [--texts DIR]

The model has BLOOM-1b7's shape (hidden 2,048, 24 layers, 250,880 rows, 1.72G parameters) with random bf16 weights
and a made-up byte-level tokenizer of 250,680 tokens; --shape 7b1 takes BLOOM-7b1's, 14 GB in three shards,
--quick 4 layers. Whole commands in fresh processes:
Firefly with the proof of the tokenizer and of every byte of the weights (without running the model, which LLMPruner
does not do either) and with everything on the disk; LLMPruner from a clone of yangjianxin1/LLMPruner that you name, as
it is and with `sync`; `cp` of the original with `sync`. `rss_mb` is the most memory that Firefly's processes hold
together, pages that they share counted once. trimbed needs a Python of its own that has it; a peer that is not
named is left out with a word. `count_vs_encode_batch` is the time of counting over that of the tokenizers library's
`encode_batch` on the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rows

VOCAB_ROWS, VOCAB, KEPT = 250_880, 250_680, 46_145
_LLMPRUNER = """
import sys
sys.path.insert(0, sys.argv[1])
from pruners.vocabulary_pruner import BloomVocabularyPruner
BloomVocabularyPruner().prune(*sys.argv[2:])
"""
_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
_SHAPES = {"1b7": (2048, 24, 16), "7b1": (4096, 30, 32)}  # hidden size, layers, heads
_DTYPE_BYTES = 2
_SHARD_BYTES = 5 << 30


def tensor_shapes(hidden: int, layers: int) -> dict[str, tuple[int, ...]]:
    """BLOOM's tensors as the hub's files name them."""
    shapes: dict[str, tuple[int, ...]] = {"word_embeddings.weight": (VOCAB_ROWS, hidden)}
    norms = ["word_embeddings_layernorm", "ln_f"]
    for layer in range(layers):
        norms += [f"h.{layer}.input_layernorm", f"h.{layer}.post_attention_layernorm"]
        for name, out, width in (
            ("self_attention.query_key_value", 3 * hidden, hidden),
            ("self_attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", 4 * hidden, hidden),
            ("mlp.dense_4h_to_h", hidden, 4 * hidden),
        ):
            shapes |= {f"h.{layer}.{name}.weight": (out, width), f"h.{layer}.{name}.bias": (out,)}
    return shapes | {f"{norm}.{part}": (hidden,) for norm in norms for part in ("weight", "bias")}


def make_model(folder: Path, hidden: int, layers: int, heads: int) -> Path:
    """A model directory of BLOOM's shape; weights are random bytes that are small bf16 numbers."""
    folder.mkdir(parents=True)
    config = {
        "architectures": ["BloomForCausalLM"],
        "model_type": "bloom",
        "hidden_size": hidden,
        "n_layer": layers,
        "n_head": heads,
        "vocab_size": VOCAB_ROWS,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensor_shapes(hidden, layers).items():
        size = int(np.prod(shape)) * _DTYPE_BYTES
        if parts[-1] and filled + size > _SHARD_BYTES:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    generator, weight_map = np.random.default_rng(0), {}
    for number, part in enumerate(parts, 1):
        single = len(parts) == 1
        file = "model.safetensors" if single else f"model-{number:05}-of-{len(parts):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in part.items():
            size = int(np.prod(shape)) * _DTYPE_BYTES
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
            weight_map[name] = file
        text = json.dumps(header).encode()
        with (folder / file).open("wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            for left in range(offset // _DTYPE_BYTES, 0, -(1 << 22)):
                bits = generator.integers(0, 1 << 16, min(left, 1 << 22), dtype=np.uint16)
                handle.write((bits & np.uint16(0x80FF) | np.uint16(0x3C00)).tobytes())  # ±0.008 … 0.03
    if len(parts) > 1:
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def make_tokenizer(folder: Path, size: int) -> None:
    """A byte-level BPE of random merges: later tokens are made of earlier ones."""
    from tokenizers import pre_tokenizers

    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    parts, merges = list(alphabet), []
    seen = set(alphabet)
    while len(parts) + len(_SPECIAL) < size:
        left, right = (parts[int(len(parts) * draw.random() ** 3)] for _ in range(2))
        if left + right not in seen and len(left + right) <= 16:
            seen.add(left + right)
            parts.append(left + right)
            merges.append([left, right])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    stage = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": place, "content": token, **flags} for place, token in enumerate(_SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": stage,
        "post_processor": None,
        "decoder": stage,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {token: place for place, token in enumerate(_SPECIAL + parts)},
            "merges": merges,
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    names = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), _SPECIAL, strict=True))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}), "utf-8"
    )


def timed(command: Sequence[str | Path]) -> tuple[float, float]:
    """Wall seconds, and the peak of the resident MB of the command and its children together."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, resident_mb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, complaint = process.communicate()
    wall_s = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{command[:4]} failed:\n{complaint[-2000:]}")
    return wall_s, peak


def resident_mb(root: int) -> float:
    """Memory of a process and its descendants, shared pages divided among those that share (Linux; 0 elsewhere)."""
    total_kb, waiting = 0, [root]
    while waiting:
        place = Path(f"/proc/{waiting.pop()}")
        try:
            lines = (place / "smaps_rollup").read_text().splitlines()
            total_kb += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            for task in (place / "task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except (OSError, StopIteration):
            continue
    return total_kb / 1024


def whole_commands(
    place: Path, llmpruner: Path | None, shape: tuple[int, int, int], repeats: int
) -> dict[str, Any]:
    """Firefly, LLMPruner and cp on the same directory."""
    base, small, out = place / "base", place / "small", place / "out"
    hidden, layers, heads = shape
    print(f"making a model of {layers} layers …", flush=True)
    make_model(base, hidden, layers, heads)
    make_tokenizer(base, VOCAB)
    make_tokenizer(small, KEPT)
    firefly: list[str | Path] = [
        sys.executable,
        "-m",
        "firefly",
        "prune",
        base,
        out,
        "--tokenizer",
        small,
        "--skip-logits-proof",
        "-q",
    ]
    peer: list[str | Path] = [sys.executable, "-c", _LLMPRUNER, llmpruner or "", base, small, out]
    ours, rss, theirs, theirs_synced, copies = [], [], [], [], []
    for turn in range(repeats):
        wall_s, peak_mb = timed(firefly)
        ours.append(wall_s)
        rss.append(peak_mb)
        shutil.rmtree(out)
        (place / "copy").mkdir()
        copies.append(timed(["sh", "-c", f"cp {base}/*.safetensors {place}/copy && sync {place}/copy/*"])[0])
        shutil.rmtree(place / "copy")
        line = f"run {turn + 1}: Firefly {ours[-1]:.2f} s, {rss[-1]:.0f} MB; cp + sync {copies[-1]:.2f} s"
        if llmpruner:
            wall_s, peak_mb = timed(peer)
            theirs.append(wall_s)
            theirs_synced.append(wall_s + timed(["sh", "-c", f"sync {out}/*"])[0])
            shutil.rmtree(out)
            line += f"; LLMPruner {theirs[-1]:.2f} s ({theirs_synced[-1]:.2f} with sync), {peak_mb:.0f} MB"
        print(line, flush=True)
    if not llmpruner:
        print("LLMPruner is left out: clone yangjianxin1/LLMPruner and give --llmpruner DIR")

    def ratio(above: list[float], below: list[float]) -> float | None:
        pairs = [one / other for one, other in zip(above, below, strict=False)]
        return round(statistics.median(pairs), 3) if pairs else None

    return {
        "firefly_s": round(statistics.median(ours), 2),
        "cp_sync_s": round(statistics.median(copies), 2),
        "llmpruner_s": round(statistics.median(theirs), 2) if theirs else None,
        "vs_llmpruner": ratio(theirs, ours),
        "vs_llmpruner_synced": ratio(theirs_synced, ours),
        "vs_cp": ratio(ours, copies),
        "rss_mb": round(max(rss)),
    }


def read_texts(folder: Path, most_bytes: int) -> list[str]:
    """Chinese and English documents of the shared text, file by file in turn, up to so many bytes."""
    from firefly.prune.counting import corpus_texts

    streams = [corpus_texts([path]) for path in sorted([*folder.glob("zh_*"), *folder.glob("en_*")])]
    texts: list[str] = []
    while streams and most_bytes > 0:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                texts.append(text)
                most_bytes -= len(text.encode())
    return texts


def against_trimbed(python: Path, tokenizer: Path, texts: list[str], place: Path) -> float:
    """trimbed's time over Firefly's, pruning one tokenizer to all that the texts use, both checks included."""
    corpus = place / "corpus.jsonl"
    corpus.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), "utf-8"
    )
    source = f'{{"path": "json", "data_files": "{corpus}", "streaming": false}}'
    config = place / "trimbed.yaml"
    config.write_text(
        f'model: "{tokenizer}"\ncorpus: {{datasets: [{source}]}}\nselection: {{coverage: 1.0}}\n',
        "utf-8",
    )
    ours: list[str | Path] = [
        sys.executable,
        "-m",
        "firefly",
        "prune",
        tokenizer,
        place / "ours",
        "--tokenizer-only",
        "-q",
    ]
    ours_s, _ = timed([*ours, "--corpus", corpus, "--coverage", "1"])
    command: list[str | Path] = [
        python,
        "-m",
        "trimbed.cli",
        "trim",
        "--config",
        config,
        "--no-trim-model",
        "--overwrite",
    ]
    theirs_s, _ = timed([*command, "--model", tokenizer, "--output-dir", place / "theirs"])
    print(f"{tokenizer.name}: Firefly {ours_s:.1f} s, trimbed {theirs_s:.1f} s", flush=True)
    return theirs_s / ours_s


def counting(tokenizer_file: Path, texts: list[str], repeats: int) -> float:
    """Time of `count_tokens` over that of `encode_batch`, each on a freshly loaded tokenizer (they cache words)."""
    from firefly.console import quiet
    from firefly.prune.counting import count_tokens
    from firefly.prune.tokenizer import load

    quiet()
    ratios = []
    for turn in range(repeats):
        spent = {}
        for name in ("count", "encode") if turn % 2 else ("encode", "count"):
            tokenizer = load(tokenizer_file)
            start = time.perf_counter()
            if name == "count":
                count_tokens(tokenizer, texts)
            else:
                tokenizer.encode_batch(texts, add_special_tokens=False)
            spent[name] = time.perf_counter() - start
        ratios.append(spent["count"] / spent["encode"])
    return statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="4 layers and one run of each, for a look")
    parser.add_argument("--shape", choices=list(_SHAPES), default="1b7", help="the BLOOM model to be like")
    parser.add_argument("--llmpruner", type=Path, help="a clone of yangjianxin1/LLMPruner")
    parser.add_argument("--trimbed", type=Path, help="a Python (3.12 or later) that has trimbed installed")
    parser.add_argument(
        "--tokenizers", type=Path, default=rows.ROOT.parent / "shared/tokenizers", help="real tokenizers"
    )
    parser.add_argument("--texts", type=Path, default=rows.ROOT.parent / "shared/data/text", help="real text")
    parser.add_argument(
        "--place", type=Path, help="where the big files go for a while (the temporary folder)"
    )
    options = parser.parse_args()
    # What runs is this checkout, whatever is installed.
    sys.path.insert(0, str(rows.ROOT / "src"))
    os.environ["PYTHONPATH"] = str(rows.ROOT / "src")
    hidden, layers, heads = _SHAPES[options.shape]
    layers, repeats = (4, 1) if options.quick else (layers, 3)
    texts = read_texts(options.texts, (2 if options.quick else 20) << 20) if options.texts.is_dir() else []
    tokenizer = options.tokenizers / "gemma3"
    real = bool(texts) and tokenizer.is_dir()
    row: dict[str, Any] = {"model": f"bloom-{options.shape} shape, {layers} layers, bf16", "runs": repeats}
    with tempfile.TemporaryDirectory(dir=options.place) as folder:
        row |= whole_commands(Path(folder), options.llmpruner, (hidden, layers, heads), repeats)
        row |= {"vs_trimbed": None, "count_vs_encode_batch": None}
        if options.trimbed and real:
            row["vs_trimbed"] = round(against_trimbed(options.trimbed, tokenizer, texts, Path(folder)), 3)
        else:
            print("trimbed is left out: install it for a Python 3.12 or later and give --trimbed PYTHON")
        if real:
            row["count_vs_encode_batch"] = round(
                counting(tokenizer / "tokenizer.json", texts, 2 * repeats), 3
            )
        else:
            print("counting is left out: give real tokenizers and text with --tokenizers and --texts")
    print(f"appended to {rows.append('prune', [row]).relative_to(rows.ROOT)}")
    keys = ("vs_llmpruner", "vs_cp", "rss_mb", "vs_trimbed", "count_vs_encode_batch")
    rows.finish({key: row[key] for key in keys if row[key] is not None})


if __name__ == "__main__":
    main()
