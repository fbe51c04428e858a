"""Real tokenizers, where the checkout has them beside it: same tokens for every text inside the keep-set."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from firefly.errors import ModelError
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.proof import prove_stages, prove_texts, prove_tokens
from firefly.prune.tokenizer import guarded, load, read, rebuild, referenced_ids
from firefly.prune.vocabulary import BpeDerivation, base_symbols, choose

SHARED = Path(__file__).parents[2].parent / "shared"
CORPUS = ["zh_modern_misc", "en_modern", "zh_wikipedia_passages", "other_languages"]
FAST = ["qwen3", "llama3", "gpt2"]
SLOW = ["gemma3", "llama2", "mistral03", "deepseek_v3", "gptoss", "clip_base", "barthez"]


def sample(name: str, start: int, count: int) -> list[str]:
    path = SHARED / "data" / "text" / f"{name}.jsonl.zst"
    if not path.is_file():
        pytest.skip(f"the corpus {path} is not beside this checkout")
    return list(itertools.islice(corpus_texts([path]), start, start + count))


def check(name: str, num_counted: int, num_held_out: int) -> None:
    """Keep what a corpus uses and no more, then prove on it, on held-out text, and on other languages."""
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"the tokenizer {path} is not beside this checkout")
    counted = [text for source in CORPUS[:2] for text in sample(source, 0, num_counted)]
    held_out = [text for source in CORPUS for text in sample(source, num_counted, num_held_out)]
    content, original = read(path), load(path)
    counts = count_tokens(original, counted)
    always = base_symbols(content) | referenced_ids(content)
    # The size that holds every counted token with its closure and nothing else: the counted texts lie inside.
    derivation = BpeDerivation(content["model"])
    needed = {
        part for token in always | set(np.flatnonzero(counts).tolist()) for part in derivation.closure(token)
    }
    keep = choose(content, counts, len(needed))
    assert set(keep.new_to_old.tolist()) == needed and keep.num_filled == 0
    new = rebuild(content, keep.new_to_old)
    pruned = load(new)
    prove_stages(content, new, keep.new_to_old)
    assert prove_tokens(original, pruned, keep.new_to_old)["tokens_rederived"] > 0.8 * len(keep.new_to_old)
    inside = prove_texts(original, pruned, keep.new_to_old, counted)
    assert inside["documents_inside"] == inside["documents_checked"] == len(counted)
    outside = prove_texts(original, pruned, keep.new_to_old, held_out)
    assert outside["documents_inside"] < outside["documents_checked"] == len(held_out)


@pytest.mark.parametrize("name", FAST)
def test_real_tokenizers_keep_their_tokens(name: str) -> None:
    check(name, 300, 100)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*FAST, *SLOW])
def test_real_tokenizers_keep_their_tokens_on_more_text(name: str) -> None:
    check(name, 5000, 2000)


@pytest.mark.parametrize(("name", "kind"), [("t5_small", "Unigram"), ("bert_base_cased", "WordPiece")])
def test_other_model_types_are_refused_with_a_sentence(name: str, kind: str) -> None:
    path = SHARED / "tokenizers" / name / "tokenizer.json"
    if not path.is_file():
        pytest.skip(f"the tokenizer {path} is not beside this checkout")
    with pytest.raises(ModelError, match=f"is a {kind} tokenizer"):
        read(path)


def test_a_rust_panic_becomes_a_sentence() -> None:
    """pyo3's PanicException derives from BaseException, so `except Exception` would miss it."""

    class PanicException(BaseException):
        pass

    with pytest.raises(ModelError, match="broke while loading x: index out of bounds"), guarded("loading x"):
        raise PanicException("index out of bounds")
    with pytest.raises(KeyboardInterrupt), guarded("loading x"):
        raise KeyboardInterrupt
