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
from firefly.errors import ModelError, ProofError
from firefly.prune.counting import batches
from firefly.prune.tokenizer import Json, guarded, load, merge_pairs, merged, read, vocabulary
from firefly.prune.weights import Tensor, quiet_transformers, read_header, read_range, shards

_LOGIT_ROWS, _LOGIT_TOKENS = 4, 32
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


def _fail(what: str) -> ProofError:
    return ProofError(
        f"The proof failed, and no model was written: {what}. Please report it with this base model."
    )


def prove_stages(old: Json, new: Json, new_to_old: NDArray[np.int64]) -> None:
    """The kept tokens have their new ids, the kept merges their order, and the other stages are unchanged."""
    by_id = {token_id: token for token, token_id in vocabulary(old).items()}
    expected = {by_id[int(old_id)]: new_id for new_id, old_id in enumerate(new_to_old)}
    if vocabulary(new) != expected:
        wrong = next(t for t in expected | vocabulary(new) if expected.get(t) != vocabulary(new).get(t))
        raise _fail(f"the token {wrong!r} has id {vocabulary(new).get(wrong)}, not {expected.get(wrong)}")
    for stage in ("normalizer", "pre_tokenizer", "decoder", "truncation"):
        if old.get(stage) != new.get(stage):
            raise _fail(f"the tokenizer's {stage} has changed")
    model, kept = old["model"], new["model"]["vocab"]
    wanted = (
        pair
        for pair in merge_pairs(model)
        if pair[0] in kept and pair[1] in kept and merged(model, *pair) in kept
    )
    for place, (left, right) in enumerate(zip_longest(wanted, merge_pairs(new["model"]))):
        if left != right:
            raise _fail(f"merge {place} of the pruned tokenizer is {right}, not {left}")


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
                raise _fail(f"the token {string!r} now splits into {names}")
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
                    raise _fail(
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
                    raise _fail(
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


def prove_opening(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], texts: list[str]
) -> dict[str, Any]:
    """`AutoTokenizer` opens the pruned directory and agrees with the original's on texts inside K.

    Some of transformers' tokenizer classes rebuild stages from code instead of tokenizer.json, hence this.
    """
    from transformers import AutoTokenizer

    old_to_new = {int(old): new for new, old in enumerate(new_to_old)}
    with guarded("opening it with AutoTokenizer"), quiet_transformers():
        original, opened = (
            AutoTokenizer.from_pretrained(path, local_files_only=True) for path in (base, pruned)
        )
        added_by_class = len(original) - len(vocabulary(read(base / "tokenizer.json")))
        if len(opened) != len(new_to_old) + added_by_class:
            raise _fail(f"AutoTokenizer finds {len(opened)} tokens, not {len(new_to_old)}")
        for text in texts:
            expected = [
                old_to_new.get(old, -1) for old in original(text, add_special_tokens=True)["input_ids"]
            ]
            if -1 not in expected and expected != opened(text, add_special_tokens=True)["input_ids"]:
                raise _fail(f"AutoTokenizer reads the text {text[:200]!r} differently")
    return {"auto_tokenizer_documents": len(texts)}


def prove_weights(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], names: frozenset[str]
) -> dict[str, Any]:
    """Kept rows of the tensors `names`, and all other tensors, equal the original's byte for byte."""
    old_files, new_files = shards(base), shards(pruned)
    if [path.name for path in old_files] != [path.name for path in new_files]:
        raise _fail("the weight files are not those of the original")
    num_same = num_selected = 0
    with progress("prove weights", sum(path.stat().st_size for path in new_files) / 2**20, "MiB") as bar:
        for old_file, new_file in zip(old_files, new_files, strict=True):
            old_tensors, new_tensors = read_header(old_file)[0], read_header(new_file)[0]
            if old_tensors.keys() != new_tensors.keys():
                raise _fail(f"{new_file.name} does not hold the original's tensors")
            with old_file.open("rb", buffering=0) as old, new_file.open("rb", buffering=0) as new:
                for name, tensor in new_tensors.items():
                    before = old_tensors[name]
                    rows = new_to_old if name in names else None
                    shape = before.shape if rows is None else (len(rows), *before.shape[1:])
                    if (tensor.dtype, tensor.shape) != (before.dtype, shape):
                        raise _fail(
                            f"{name} changes from {before.dtype} {before.shape} to {tensor.dtype} {tensor.shape}"
                        )
                    _compare(old, new, before, tensor, rows)
                    num_same += rows is None
                    num_selected += rows is not None
                    bar.advance((tensor.end - tensor.start) / 2**20)
    return {"tensors_identical": num_same, "tensors_row_selected": num_selected}


def _compare(old: Any, new: Any, before: Tensor, after: Tensor, rows: NDArray[np.int64] | None) -> None:
    """Raise unless `after` holds the bytes of `before`, or of its `rows`."""
    if rows is None:
        pairs = zip(
            read_range(old, before.start, before.end), read_range(new, after.start, after.end), strict=True
        )
        if any(left != right for left, right in pairs):
            raise _fail(f"the tensor {before.name} is not the original's")
        return
    width = before.row_bytes
    for new_row, old_row in enumerate(rows.tolist()):
        left = b"".join(read_range(old, before.start + old_row * width, before.start + (old_row + 1) * width))
        right = b"".join(read_range(new, after.start + new_row * width, after.start + (new_row + 1) * width))
        if left != right:
            raise _fail(f"row {new_row} of {before.name} is not the original's row {old_row}")


def prove_logits(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> dict[str, Any]:
    """On random in-K inputs, plain transformers in float32 gives the original's logits on K.

    Either bit for bit, or no further from the original in float64 than twice the original's own float32
    error (a matrix of another width may be multiplied in another order).
    """
    import torch

    rng = np.random.default_rng(0)
    inputs = rng.integers(0, len(new_to_old), size=(_LOGIT_ROWS, _LOGIT_TOKENS))

    def logits(directory: Path, ids: NDArray[np.int64], dtype: torch.dtype) -> tuple[torch.Tensor, bool]:
        from transformers import AutoModelForCausalLM

        try:
            with quiet_transformers():
                model = AutoModelForCausalLM.from_pretrained(
                    directory, dtype=dtype, local_files_only=True
                ).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"{directory} does not open with AutoModelForCausalLM: {error}") from error
        limit = getattr(model.config, "max_position_embeddings", None) or _LOGIT_TOKENS
        with torch.no_grad():
            result = model(input_ids=torch.from_numpy(ids[:, :limit]), use_cache=False).logits
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return result, tied

    keep = torch.from_numpy(new_to_old)
    before, was_tied = logits(base, new_to_old[inputs], torch.float32)
    before = before[..., keep]
    after, is_tied = logits(pruned, inputs, torch.float32)
    if was_tied != is_tied or before.shape != after.shape:
        raise _fail("the pruned model's output embeddings are not built as the original's")
    if torch.equal(before, after):
        return {"logits": "bit-equal", "logits_max_difference": 0.0}
    exact = logits(base, new_to_old[inputs], torch.float64)[0][..., keep]
    own_error = float((before.double() - exact).abs().max())
    error = float((after.double() - exact).abs().max())
    if not error <= 2 * own_error:
        raise _fail(f"logits differ by {error:.3g} where float32 itself errs by {own_error:.3g}")
    return {"logits": "within float32 error", "logits_max_difference": float((before - after).abs().max())}
