"""`firefly merge`: an adapter, or a run that trained one, as a plain model directory."""

from __future__ import annotations

from pathlib import Path

from firefly.errors import ModelError, OutputError
from firefly.files import exclusive_beside, locate
from firefly.model.adapters import CONFIG, MergeResult, adapter_base, merge_adapter, require_method
from firefly.model.hub import resolve


def merge(run_or_adapter: Path, out: Path, base: str | None = None) -> MergeResult:
    """Fold an adapter into its base model and write the result to `out`, which must be empty or not there.

    Args:
        run_or_adapter: an adapter in peft's layout, or the output directory of a run with adapters.
        base: the base model, a directory or a hub name; None: the one that the adapter names.

    Raises `ModelError` when adapter and base do not fit, `ProofError` when the merged logits differ.
    """
    place = locate(str(run_or_adapter))
    adapter = place if (place / CONFIG).is_file() else place / "adapter"
    if not (adapter / CONFIG).is_file():
        why = (
            "is a run without a finished adapter (only lora, dora and qlora make one)"
            if (place / "recipe.toml").is_file()
            else f"is neither a run nor an adapter (no {CONFIG})"
        )
        raise ModelError(f"{run_or_adapter} {why}; check the path, or train first.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"The output {out} is not empty; choose another place or empty it.")
    require_method("lora")
    with exclusive_beside(out, "firefly merge"):
        return merge_adapter(resolve(base or adapter_base(adapter)), adapter, out)
