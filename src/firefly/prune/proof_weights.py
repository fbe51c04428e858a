"""The model's part of the proof: plain transformers opens it, every byte of the weights follows, logits agree.

`proof.py` runs these checks after the tokenizer's; the first disagreement raises `ProofError`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress
from firefly.errors import ModelError, ProofError
from firefly.prune.tokenizer import guarded, read, vocabulary
from firefly.prune.weights import Tensor, quiet_transformers, read_header, read_range, shards

_LOGIT_ROWS, _LOGIT_TOKENS = 4, 32


def failed(what: str) -> ProofError:
    """The error of a failed check."""
    return ProofError(
        f"The proof failed, and no model was written: {what}. Please report it with this base model."
    )


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
            raise failed(f"AutoTokenizer finds {len(opened)} tokens, not {len(new_to_old)}")
        for text in texts:
            expected = [
                old_to_new.get(old, -1) for old in original(text, add_special_tokens=True)["input_ids"]
            ]
            if -1 not in expected and expected != opened(text, add_special_tokens=True)["input_ids"]:
                raise failed(f"AutoTokenizer reads the text {text[:200]!r} differently")
    return {"auto_tokenizer_documents": len(texts)}


def prove_weights(
    base: Path, pruned: Path, new_to_old: NDArray[np.int64], names: frozenset[str]
) -> dict[str, Any]:
    """Kept rows of the tensors `names`, and all other tensors, equal the original's byte for byte."""
    old_files, new_files = shards(base), shards(pruned)
    if [path.name for path in old_files] != [path.name for path in new_files]:
        raise failed("the weight files are not those of the original")
    num_same = num_selected = 0
    with progress("prove weights", sum(path.stat().st_size for path in new_files) / 2**20, "MiB") as bar:
        for old_file, new_file in zip(old_files, new_files, strict=True):
            old_tensors, new_tensors = read_header(old_file)[0], read_header(new_file)[0]
            if old_tensors.keys() != new_tensors.keys():
                raise failed(f"{new_file.name} does not hold the original's tensors")
            with old_file.open("rb", buffering=0) as old, new_file.open("rb", buffering=0) as new:
                for name, tensor in new_tensors.items():
                    before = old_tensors[name]
                    rows = new_to_old if name in names else None
                    shape = before.shape if rows is None else (len(rows), *before.shape[1:])
                    if (tensor.dtype, tensor.shape) != (before.dtype, shape):
                        raise failed(
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
            raise failed(f"the tensor {before.name} is not the original's")
        return
    width = before.row_bytes
    for new_row, old_row in enumerate(rows.tolist()):
        left = b"".join(read_range(old, before.start + old_row * width, before.start + (old_row + 1) * width))
        right = b"".join(read_range(new, after.start + new_row * width, after.start + (new_row + 1) * width))
        if left != right:
            raise failed(f"row {new_row} of {before.name} is not the original's row {old_row}")


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
        raise failed("the pruned model's output embeddings are not built as the original's")
    if torch.equal(before, after):
        return {"logits": "bit-equal", "logits_max_difference": 0.0}
    exact = logits(base, new_to_old[inputs], torch.float64)[0][..., keep]
    own_error = float((before.double() - exact).abs().max())
    error = float((after.double() - exact).abs().max())
    if not error <= 2 * own_error:
        raise failed(f"logits differ by {error:.3g} where float32 itself errs by {own_error:.3g}")
    return {"logits": "within float32 error", "logits_max_difference": float((before - after).abs().max())}
