"""Where a base model lies: a directory here, the embedded one, or a hub name to download. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from firefly.errors import ModelError
from firefly.files import locate


def resolve(name: str, patterns: Sequence[str] = ("*.json", "*.safetensors", "*.jinja")) -> Path:
    """The local directory of a base model: a path, `demo:…`, or a hub name, whose files like `patterns` are fetched."""
    path = locate(name)
    if path.is_dir():
        return path
    if name.startswith(("demo:", ".", "/", "~")) or name.count("/") != 1:
        raise ModelError(
            f"The model directory {name} does not exist; give a directory, or a hub name like owner/model."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{name} is neither a directory here nor could it be fetched from the hub ({type(error).__name__}); "
            "check the spelling and the network, or download it and give its directory."
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and remarks off the screen while the block runs; our errors say what matters."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
