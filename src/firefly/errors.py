"""What the user can mend is a `FireflyError`; everything else is our own mistake.

    FireflyError                 one clear sentence: what is wrong, where, how to mend it
    ├── RecipeError              a recipe or an override: unknown key, bad value
    ├── InputError               a corpus, dataset or text file: missing, empty, bad line or field
    ├── ModelError               a model directory: missing weights, unsupported family, wrong tokenizer
    ├── ProofError               an exactness proof failed; nothing was written
    ├── OutputError              a place to write to: not writable
    │   └── DiskFullError        no space left there; earlier results are untouched
    ├── CheckpointError          a checkpoint: corrupted, or from another run
    ├── LaunchError              several processes that do not make one run: one is missing, another recipe
    └── TrainingError            training cannot go on: loss not finite

The command line prints the sentence and exits with status 1; the Python API raises it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FireflyError(ValueError):
    """Something the user can mend; `str(error)` says what is wrong, where, and how to mend it."""


class RecipeError(FireflyError):
    """A recipe file or a `section.key=value` override is wrong."""


class InputError(FireflyError):
    """An input file is missing, empty, or has a bad line or field."""


class ModelError(FireflyError):
    """A model directory cannot be used as it is."""


class ProofError(FireflyError):
    """An exactness proof failed, so nothing was written; `what` is the disagreement alone."""

    what: str = ""


class OutputError(FireflyError):
    """A result cannot be written where it should go."""


class DiskFullError(OutputError):
    """There is no space left where a result should go."""


class CheckpointError(FireflyError):
    """A checkpoint is corrupted or belongs to another run."""


class LaunchError(FireflyError):
    """The processes of a run did not start alike, or one of them ended."""


class TrainingError(FireflyError):
    """Training stopped before it could do harm."""


class Interrupted(Exception):
    """A signal asked for a stop and everything is saved; `signal_number` is the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def choices(wrong: str, known: Iterable[str]) -> str:
    """The end of an error sentence for an unknown name: the nearest match first, then every choice."""
    names = sorted(known)
    near = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return f"{hint}choices: {', '.join(names)}"
