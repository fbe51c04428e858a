"""Which dataset, tokens and model directories a path means: a recipe, a run's output directory, or one of its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import FireflyError, InputError
from firefly.model.hub import resolve
from firefly.recipe import Recipe


@dataclass(frozen=True)
class Places:
    """What was found; `recipe` is the one that the directories were made with."""

    dataset: Path | None = None
    tokens: Path | None = None
    recipe: Recipe | None = None

    def tokenizer(self, model: str | None = None) -> ModelTokenizer:
        """The tokenizer of `model`, or else the one that the run's tokens were made with.

        Raises `InputError` when neither is known, `ModelError` when it cannot be opened.
        """
        if model is not None:
            return ModelTokenizer.load(resolve(model))
        if self.recipe is None:
            raise InputError(
                f"No recipe.toml lies beside {self.tokens}, so its tokenizer is unknown; name it with --model DIR."
            )
        if self.recipe.prune:
            return ModelTokenizer.load(self.recipe.out / "pruned")
        return ModelTokenizer.load(resolve(self.recipe.model.base))

    def tokenizer_at_hand(self, model: str | None = None) -> ModelTokenizer | None:
        """`tokenizer`, or None where a run's own cannot be opened; a `model` that was named must open."""
        try:
            return self.tokenizer(model)
        except FireflyError:
            if model is not None:
                raise
            return None


def find_places(path: str | Path, overrides: Sequence[str] = ()) -> Places:
    """Find out what `path` is: a recipe, a run, a dataset directory (card.json) or a tokens one (index.json).

    Raises `InputError` when it is none of them, or the recipe's data was not built yet.
    """
    place = Path(path)
    if not place.exists():
        raise InputError(f"{place} does not exist; give a recipe, a run, a dataset or a tokens directory.")
    if place.is_file():
        return _run(Recipe.load(place, overrides))
    if overrides:
        raise InputError(f"Overrides ({', '.join(overrides)}) go with a recipe; {place} is a directory.")
    if (place / "recipe.toml").is_file():
        return _run(_recipe_of(place))
    if (place / "index.json").is_file():
        run = place.absolute().parent
        beside = _run(_recipe_of(run)) if (run / "recipe.toml").is_file() else Places()
        return Places(beside.dataset, place, beside.recipe)
    if (place / "card.json").is_file():
        return Places(dataset=place)
    raise InputError(
        f"{place} is no run, dataset or tokens directory (no recipe.toml, card.json or index.json in it); "
        "check the path, or build it with `firefly data`."
    )


def _recipe_of(run: Path) -> Recipe:
    """The recipe frozen in a run's directory, which may have been moved since."""
    return Recipe.load(run / "recipe.toml").model_copy(update={"output_dir": str(run)})


def _run(recipe: Recipe) -> Places:
    dataset, tokens = recipe.out / "dataset", recipe.out / "tokens"
    if not (dataset / "card.json").is_file():
        raise InputError(f"{recipe.out} has no dataset yet; run `firefly data` with this recipe first.")
    return Places(dataset, tokens if (tokens / "index.json").is_file() else None, recipe)
