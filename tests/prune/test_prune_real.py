"""Real tokenizers, where the checkout has them beside it: same tokens for every text inside the keep-set."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from firefly.errors import ModelError
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.proof import PROBES, made_up_texts, prove_stages, prove_texts, prove_tokens
from firefly.prune.tokenizer import guarded, load, merge_pairs, merged, read, rebuild, referenced_ids
from firefly.prune.vocabulary import base_symbols, choose, closure

SHARED = Path(__file__).parents[2].parent / "shared"
CORPUS = ["zh_modern_misc", "en_modern", "zh_wikipedia_passages", "other_languages"]
FAST = ["llama3", "gpt2", "t5_small", "bert_base_cased"]
SLOW = [
    "qwen3",
    "gemma3",
    "llama2",
    "mistral03",
    "deepseek_v3",
    "gptoss",
    "clip_base",
    "barthez",
    "nmt_unigram_zh",
]


def sample(name: str, start: int, count: int) -> list[str]:
    path = SHARED / "data" / "text" / f"{name}.jsonl.zst"
    if not path.is_file():
        pytest.skip(f"the corpus {path} is not beside this checkout")
    return list(itertools.islice(corpus_texts([path]), start, start + count))


def check(name: str, num_counted: int, num_held_out: int, num_made_up: int) -> None:
    """Keep what a corpus uses and no more, then prove on it, on held-out and made-up text, and other languages."""
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"the tokenizer {path} is not beside this checkout")
    counted = [text for source in CORPUS[:2] for text in sample(source, 0, num_counted)]
    held_out = [text for source in CORPUS for text in sample(source, num_counted, num_held_out)]
    content = read(path)
    original = load(content)
    counts = count_tokens(original, counted)
    needs = closure(content)
    always = base_symbols(content) | referenced_ids(content)
    needed = {part for token in always | set(np.flatnonzero(counts).tolist()) for part in needs(token)}
    keep = choose(content, counts, coverage=1.0)
    assert set(keep.new_to_old.tolist()) == needed and keep.num_filled == 0
    new = rebuild(content, keep.new_to_old)
    pruned = load(new)
    prove_stages(content, new, keep.new_to_old)
    assert prove_tokens(original, pruned, keep.new_to_old)["tokens_rederived"] > 0.7 * len(keep.new_to_old)
    inside = prove_texts(original, pruned, keep.new_to_old, counted)
    assert inside["documents_inside"] == inside["documents_checked"] == len(counted)
    outside = prove_texts(original, pruned, keep.new_to_old, [*held_out, *PROBES])
    assert outside["documents_inside"] < outside["documents_checked"] == len(held_out) + len(PROBES)
    made_up = num_inside = 0
    while num_inside < num_made_up:
        texts = made_up_texts(original, keep.new_to_old, num_made_up, seed=made_up)
        num_inside += prove_texts(original, pruned, keep.new_to_old, texts)["documents_inside"]
        made_up += num_made_up
    assert made_up <= 4 * num_made_up


@pytest.mark.parametrize("name", FAST)
def test_real_tokenizers_keep_their_tokens(name: str) -> None:
    check(name, 200, 50, 2000)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_real_tokenizers_keep_their_tokens_on_more_text(name: str) -> None:
    check(name, 5000, 2000, 100_000)


@pytest.mark.nightly
@pytest.mark.parametrize(("name", "canonical", "all_merges"), [("gemma3", 1.15, 1.25), ("llama3", 1.12, 1.2)])
def test_the_closure_is_far_smaller_than_that_of_all_merges(
    name: str, canonical: float, all_merges: float
) -> None:
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"the tokenizer {path} is not beside this checkout")
    content = read(path)
    model, vocab = content["model"], content["model"]["vocab"]
    texts = [text for source in CORPUS[:2] for text in sample(source, 0, 30_000)]
    seen = set(np.flatnonzero(count_tokens(load(content), texts)).tolist()) | base_symbols(content)
    parts: dict[int, list[int]] = {}
    for left, right in merge_pairs(model):
        parts.setdefault(vocab[merged(model, left, right)], []).extend((vocab[left], vocab[right]))
    every, waiting = set(seen), list(seen)
    while waiting:
        new = set(parts.get(waiting.pop(), ())) - every
        every |= new
        waiting += new
    needs = closure(content)
    closed = {part for token in seen for part in needs(token)}
    assert len(closed) < canonical * len(seen) and len(every) > all_merges * len(seen)
    assert closed <= every


def test_a_rust_panic_becomes_a_sentence() -> None:
    """pyo3's PanicException derives from BaseException, so `except Exception` would miss it."""

    class PanicException(BaseException):
        pass

    with pytest.raises(ModelError, match="broke while loading x: index out of bounds"), guarded("loading x"):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), guarded("loading x"):
        raise KeyboardInterrupt
