"""The proof that a pruned model is the original restricted to K; it runs before anything takes its final name.

Five claims, each checked on the files as written: the tokenizer's stages and merges are the original's;
every kept token is derived again; corpus texts inside K keep their tokens and others still round-trip;
every kept row and every other tensor is the original's byte for byte; logits on K agree. The first
disagreement raises `ProofError` naming the token, text or tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import progress
from firefly.prune.counting import batches
from firefly.prune.proof_weights import failed, prove_logits, prove_opening, prove_weights
from firefly.prune.tokenizer import Json, guarded, load, merge_pairs, merged, read, vocabulary

_AUTO_TEXTS = 200


def prove(
    base: Path,
    pruned: Path,
    new_to_old: NDArray[np.int64],
    names: frozenset[str],
    texts: list[str],
    logits: bool = True,
) -> dict[str, Any]:
    """Run every check on the model directories `base` and `pruned`; returns what was proven, JSON-able.

    Args:
        new_to_old: old id of each new id, [K].
        names: the tensors with vocabulary rows, as the weight files spell them.
        texts: a sample of the corpus.
        logits: also run both models in float32 (memory: four bytes a parameter, one model at a time).
    """
    old, new = read(base / "tokenizer.json"), read(pruned / "tokenizer.json")
    prove_stages(old, new, new_to_old)
    original, restricted = load(old), load(new)
    return {
        **prove_tokens(original, restricted, new_to_old),
        **prove_texts(original, restricted, new_to_old, texts),
        **prove_opening(base, pruned, new_to_old, texts[:_AUTO_TEXTS]),
        **prove_weights(base, pruned, new_to_old, names),
        **(prove_logits(base, pruned, new_to_old) if logits else {"logits": "skipped"}),
    }


def prove_stages(old: Json, new: Json, new_to_old: NDArray[np.int64]) -> None:
    """The kept tokens have their new ids, the kept merges their order, and the other stages are unchanged."""
    by_id = {token_id: token for token, token_id in vocabulary(old).items()}
    expected = {by_id[int(old_id)]: new_id for new_id, old_id in enumerate(new_to_old)}
    if vocabulary(new) != expected:
        wrong = next(t for t in expected | vocabulary(new) if expected.get(t) != vocabulary(new).get(t))
        raise failed(f"the token {wrong!r} has id {vocabulary(new).get(wrong)}, not {expected.get(wrong)}")
    for stage in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
        if old.get(stage) != new.get(stage):
            raise failed(f"the tokenizer's {stage} has changed")
    model, kept = old["model"], new["model"]["vocab"]
    wanted = (
        pair
        for pair in merge_pairs(model)
        if pair[0] in kept and pair[1] in kept and merged(model, *pair) in kept
    )
    for place, (left, right) in enumerate(zip_longest(wanted, merge_pairs(new["model"]))):
        if left != right:
            raise failed(f"merge {place} of the pruned tokenizer is {right}, not {left}")


def prove_tokens(original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64]) -> dict[str, Any]:
    """Every kept token, tokenized by itself: same tokens wherever the original stays inside K.

    A token found by whole-word lookup (`ignore_merges`) is derived by its merges as well.
    """
    models = original.model, pruned.model
    suffix = getattr(models[0], "end_of_word_suffix", None) or ""
    old_to_new = {int(old_id): new_id for new_id, old_id in enumerate(new_to_old)}
    tokens = (models[0].id_to_token(int(old_id)) for old_id in new_to_old)  # None: an added token outside
    strings = [token.removesuffix(suffix) for token in tokens if token is not None]
    lookup = bool(getattr(models[0], "ignore_merges", False))
    derived: set[str] = set()
    for ignore_merges in [True, False] if lookup else [False]:
        for model in models if lookup else ():
            model.ignore_merges = ignore_merges
        for string in strings:
            with guarded(f"tokenizing {string!r}"):
                before, after = ([token.id for token in model.tokenize(string)] for model in models)
            inside = [old_to_new.get(token_id, -1) for token_id in before]
            if -1 in inside:
                continue  # no text reaches this token through its own string
            if inside != after:
                names = [models[1].id_to_token(token_id) for token_id in after]
                raise failed(f"the token {string!r} now splits into {names}")
            derived.add(string)
    for model in models if lookup else ():
        model.ignore_merges = True
    return {"tokens_kept": len(new_to_old), "tokens_rederived": len(derived)}


def prove_texts(
    original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64], texts: Iterable[str]
) -> dict[str, Any]:
    """Texts whose original encoding lies in K keep their tokens; the others round-trip where they did."""
    old_to_new = np.full(max(original.get_vocab().values()) + 1, -1, dtype=np.int64)
    old_to_new[new_to_old] = np.arange(len(new_to_old))
    num_texts = num_inside = num_lossless = num_lossy = 0
    total = len(texts) if isinstance(texts, list) else None
    with progress("prove texts", total, "documents") as bar:
        for batch in batches(texts):
            with guarded("tokenizing the corpus again"):
                before = [
                    encoding.ids for encoding in original.encode_batch_fast(batch, add_special_tokens=False)
                ]
                after = [
                    encoding.ids for encoding in pruned.encode_batch_fast(batch, add_special_tokens=False)
                ]
            outside: list[int] = []
            for place, (old_ids, new_ids) in enumerate(zip(before, after, strict=True)):
                expected = old_to_new[np.asarray(old_ids, dtype=np.int64)]
                if (expected < 0).any():
                    outside.append(place)
                elif expected.tolist() != new_ids:
                    raise failed(
                        f"the text {batch[place][:200]!r} (sample {num_texts + place}) changes its tokens"
                    )
            decoded = zip(
                outside,
                original.decode_batch([before[place] for place in outside], skip_special_tokens=False),
                pruned.decode_batch([after[place] for place in outside], skip_special_tokens=False),
                strict=True,
            )
            for place, old_text, new_text in decoded:
                if new_text == old_text:
                    num_lossless += 1
                elif old_text == batch[place]:
                    raise failed(
                        f"the text {batch[place][:200]!r} (sample {num_texts + place}) no longer round-trips"
                    )
                else:
                    num_lossy += 1
            num_texts += len(batch)
            num_inside += len(batch) - len(outside)
            bar.advance(len(batch))
    return {
        "documents_checked": num_texts,
        "documents_inside": num_inside,
        "documents_outside_same_text": num_lossless,
        "documents_outside_lossy_before_too": num_lossy,
    }
