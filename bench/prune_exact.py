"""Prune every tokenizer of a folder on real text and prove it: the table of docs/pruning.md.

    python bench/prune_exact.py [--quick] [--tokenizers ../shared/tokenizers] [--text ../shared/data/text]

Every ninth document of the Chinese and English text is counted, and everything that it uses is kept with its
closure, or 30,000 tokens if that is more. All of that text must keep its tokens, so must made-up texts that lie
inside the keep-set, and other texts (another ninth, other languages, `PROBES`) must decode as before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from firefly.console import quiet
from firefly.prune import companions
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.proof import PROBES, made_up_texts, prove_stages, prove_texts, prove_tokens
from firefly.prune.tokenizer import added_tokens, load, model_type, read, rebuild, referenced_ids, vocabulary
from firefly.prune.vocabulary import base_symbols, choose
from rows import ROOT, append

LEAST = 30_000


def check(folder: Path, counted: list[str], others: list[str], num_made_up: int) -> dict[str, Any]:
    """Prune one tokenizer to what `counted` uses and prove it; raises `ProofError` at the first difference."""
    start_s = time.perf_counter()
    path = folder / "tokenizer.json"
    content = read(path)
    original = load(content)
    counts = count_tokens(original, counted)
    wanted = companions.required_ids(
        folder, vocabulary(content), {token["content"] for token in added_tokens(content)}
    )
    closed = choose(content, counts, coverage=1.0, wanted=wanted)
    keep = closed
    if len(closed.new_to_old) < LEAST < len(vocabulary(content)):
        keep = choose(content, counts, LEAST, wanted)
    new = rebuild(content, keep.new_to_old)
    pruned = load(json.loads(json.dumps(new)))
    pruned_s = time.perf_counter() - start_s

    prove_stages(content, new, keep.new_to_old)
    tokens = prove_tokens(original, pruned, keep.new_to_old)
    inside = prove_texts(original, pruned, keep.new_to_old, counted)
    assert inside["documents_inside"] == len(counted)
    outside = prove_texts(original, pruned, keep.new_to_old, [*others, *PROBES])
    made = num_inside = 0
    while num_inside < num_made_up:  # each round brings new texts
        texts = list(made_up_texts(original, keep.new_to_old, num_made_up, seed=made))
        num_inside += prove_texts(original, pruned, keep.new_to_old, texts)["documents_inside"]
        made += len(texts)
    seen = set(np.flatnonzero(counts).tolist()) | base_symbols(content) | referenced_ids(content) | wanted
    return {
        "tokenizer": folder.name,
        "model": model_type(content),
        "tokens": len(vocabulary(content)),
        "seen_and_base": len(seen),
        "closed": len(closed.new_to_old),
        "kept": len(keep.new_to_old),
        "rederived": tokens["tokens_rederived"],
        "dropped_added": len(keep.dropped_added),
        "texts_identical": len(counted),
        "made_up_identical": num_inside,
        "made_up": made,
        "other_texts": outside["documents_checked"],
        "unknown_before_too": outside["documents_outside_unknown_before_too"],
        "characters": sum(map(len, counted)),
        "prune_s": round(pruned_s, 1),
        "proof_s": round(time.perf_counter() - start_s - pruned_s, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="an eleventh of the text")
    parser.add_argument("--tokenizers", type=Path, default=ROOT.parent / "shared" / "tokenizers")
    parser.add_argument("--text", type=Path, default=ROOT.parent / "shared" / "data" / "text")
    parser.add_argument("--only", nargs="*", default=[], help="names of tokenizers")
    arguments = parser.parse_args()
    quiet()

    step = 100 if arguments.quick else 9
    files = sorted(arguments.text.glob("*.jsonl.zst"))
    target = [path for path in files if path.name.startswith(("zh_", "en_"))]
    counted = list(itertools.islice(corpus_texts(target), 0, None, step))
    held_out = itertools.islice(corpus_texts(target), 1, None, step)
    foreign = itertools.islice(
        corpus_texts([path for path in files if path not in target]), 0, None, step // 9
    )
    others = [*held_out, *foreign]
    rows = []
    for folder in sorted(path.parent for path in arguments.tokenizers.glob("*/tokenizer.json")):
        if not arguments.only or folder.name in arguments.only:
            rows.append(check(folder, counted, others, 1_000 if arguments.quick else 100_000))
            print(json.dumps(rows[-1]), flush=True)
    append("prune_exact", rows)
    print(json.dumps({row["tokenizer"]: round(row["kept"] / row["tokens"], 4) for row in rows}))


if __name__ == "__main__":
    main()
