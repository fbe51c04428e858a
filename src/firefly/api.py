"""The verbs of the command line as Python functions: same names, same meaning, typed results.

    from firefly import api

    api.prune("bigscience/bloom-1b7", "out/bloom-1b4-zh", corpus=["zh.txt", "en.txt"], vocab_size=46145)
    result = api.run("recipes/firefly-1b4.toml", ["train.learning_rate=2e-5"])

A recipe is a path, with `section.key=value` overrides, or a `Recipe`. What the user can mend raises a
`FireflyError`; `Interrupted` means that a signal came and everything is saved.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from firefly.errors import ModelError
from firefly.recipe import GenerationSection, Recipe

if TYPE_CHECKING:  # the functions import what they need, so that `firefly --help` is instant
    from firefly.app.chat import ChatResult
    from firefly.app.demo import DemoResult
    from firefly.app.pipeline import RunResult
    from firefly.app.verse import VerseResult
    from firefly.evaluate.rhyme import Book
    from firefly.prune.layout import SizeTable
    from firefly.prune.prune import PruneResult

__all__ = [
    "VersionResult",
    "chat",
    "data",
    "demo",
    "evaluate",
    "prune",
    "prune_sizes",
    "run",
    "train",
    "verse",
    "version",
]

RecipeLike = Recipe | str | Path


def demo(output_dir: str | None = None, overrides: Sequence[str] = ()) -> DemoResult:
    """Run the whole pipeline, offline, on the embedded base model."""
    from firefly.app.demo import run_demo

    return run_demo(output_dir, overrides)


def prune(
    model: str | Path,
    output: str | Path,
    *,
    corpus: Sequence[str | Path] = (),
    vocab_size: int | None = None,
    coverage: float | None = None,
    tokenizer: str | Path | None = None,
    pad_to_multiple: int = 1,
    keep_file: str | Path | None = None,
    keep_script: Sequence[str] = (),
    tokenizer_only: bool = False,
    prove_logits: bool = True,
) -> PruneResult:
    """Prune a model's vocabulary to the tokens that a corpus uses, and prove that nothing else changed.

    Exactly one of `vocab_size`, `coverage` (a share of the corpus' tokens) and `tokenizer` (a directory whose
    tokens to keep) says how much stays; `tokenizer_only` prunes a directory without its weights.
    """
    from firefly.model.hub import resolve
    from firefly.prune.prune import prune_model

    return prune_model(
        resolve(str(model)),
        Path(output),
        vocab_size=vocab_size,
        coverage=coverage,
        tokenizer=Path(tokenizer) if tokenizer else None,
        corpus=[Path(path) for path in corpus],
        pad_to_multiple=pad_to_multiple,
        keep_file=Path(keep_file) if keep_file else None,
        keep_script=keep_script,
        tokenizer_only=tokenizer_only,
        prove_logits=prove_logits,
    )


def prune_sizes(model: str | Path, *, vocab_size: int, pad_to_multiple: int = 1) -> SizeTable:
    """Tell what pruning to `vocab_size` tokens would make of a model's size; a config.json alone is enough."""
    from firefly.model.hub import resolve
    from firefly.prune.layout import dry_run

    return dry_run(resolve(str(model)), vocab_size, pad_to_multiple)


def data(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Build the dataset and the tokens directory of a recipe (and prune the base, if the recipe says so)."""
    from firefly.app.pipeline import run_stages

    return run_stages(_recipe(recipe, overrides), until="tokens")


def train(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Train a recipe's model, going on from the last checkpoint; earlier stages run if they have not."""
    from firefly.app.pipeline import run_stages

    return run_stages(_recipe(recipe, overrides), until="train")


def run(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Run every stage of a recipe, each skipped when it is already done."""
    from firefly.app.pipeline import run_stages

    return run_stages(_recipe(recipe, overrides))


def evaluate(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Evaluate a trained model on held-out data, before against after; give the recipe or its output directory.

    Raises `ModelError` when nothing was trained yet.
    """
    from firefly.app.pipeline import run_stages

    if not isinstance(recipe, Recipe) and Path(recipe).is_dir():
        place = Path(recipe)
        if not (place / "recipe.toml").is_file():
            raise ModelError(
                f"{place} is not a run's output directory (no recipe.toml in it); check the path."
            )
        recipe, overrides = place / "recipe.toml", [*overrides, f"output_dir={json.dumps(str(place))}"]
    made = _recipe(recipe, overrides)
    if not (made.out / "model").is_dir():
        raise ModelError(f"{made.out} has no trained model yet; run `firefly train` with this recipe first.")
    return run_stages(made)


def chat(
    model: str | Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    options: GenerationSection | None = None,
    out: TextIO | None = None,
) -> ChatResult:
    """Talk with a model in the terminal, or answer one prompt; the answers stream to `out`, or else to stdout."""
    from firefly.app.chat import chat as talk
    from firefly.app.chat import model_directory
    from firefly.model.hub import resolve

    directory = model_directory(resolve(str(model)))
    return talk(directory, options or GenerationSection(), prompt=prompt, system=system, out=out)


def verse(
    text: str,
    *,
    kind: Literal["poem", "couplet"] | None = None,
    book: Book = "pingshui",
    tune: str | None = None,
    hidden: str | None = None,
    parallel: bool = False,
) -> VerseResult:
    """Judge a poem, a couplet, or the lyric of a `tune` (词牌): tones, rhyme, form, and what breaks the rules.

    Without `kind` a text of two lines, or of two halves of the same shape, is a couplet. `hidden` are the characters
    that should head the lines (藏头); `parallel` adds how alike the parts of speech are (needs jieba).
    """
    from firefly.app.verse import analyse

    return analyse(text, kind=kind, book=book, tune=tune, hidden=hidden, parallel=parallel)


@dataclass(frozen=True)
class VersionResult:
    """Versions of Firefly and of what it stands on."""

    firefly: str
    python: str
    torch: str
    transformers: str
    tokenizers: str
    safetensors: str


def version() -> VersionResult:
    """Versions of Firefly, Python and the libraries that decide about results."""
    import firefly

    libraries = {
        name: installed_version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")
    }
    return VersionResult(firefly=firefly.__version__, python=platform.python_version(), **libraries)


def _recipe(recipe: RecipeLike, overrides: Sequence[str]) -> Recipe:
    if isinstance(recipe, Recipe):
        if overrides:
            raise TypeError("overrides go with a recipe's path; a Recipe object is complete as it is")
        return recipe
    return Recipe.load(recipe, overrides)
