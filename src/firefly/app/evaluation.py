"""`firefly evaluate`: which models a command line means, on what data, in which format, and where the report goes.

evaluate_models(["demo:base", "out/demo"], tasks=["Couplet"])      two models on what the run held out
evaluate_run("out/demo")                                           the run's own stage: base, pruned, tuned
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from firefly.app.chat import context_tokens
from firefly.app.pipeline import run_stages
from firefly.data.chatformat import FORMATS
from firefly.errors import InputError, ModelError, OutputError, choices
from firefly.evaluate.harness import HarnessResult, run_harness
from firefly.evaluate.measure import Settings
from firefly.evaluate.questions import read_questions
from firefly.evaluate.result import EvaluateResult
from firefly.evaluate.run import evaluate
from firefly.files import exclusive_beside, write_json
from firefly.model.hub import resolve
from firefly.recipe import Recipe

OUTPUT = Path("out/evaluation")


@dataclass(frozen=True)
class Subject:
    """A model to evaluate; `run` is the output directory of the run that it belongs to."""

    name: str
    directory: Path
    run: Path | None


def is_run(target: str | Path) -> bool:
    """Whether `target` is a recipe or a run's output directory, rather than a model."""
    path = Path(target)
    return path.suffix == ".toml" or (path / "recipe.toml").is_file()


def evaluate_run(recipe: Recipe | str | Path, overrides: Sequence[str] = ()) -> EvaluateResult:
    """The evaluation stage of a run, given by its recipe or output directory; skipped when it is already done.

    Raises `ModelError` when nothing was trained yet.
    """
    if not isinstance(recipe, Recipe):
        place = Path(recipe)
        if place.is_dir():
            recipe, overrides = place / "recipe.toml", [*overrides, f"output_dir={json.dumps(str(place))}"]
        recipe = Recipe.load(recipe, overrides)
    if not (recipe.out / "model").is_dir():
        raise ModelError(
            f"{recipe.out} has no trained model yet; run `firefly train` with this recipe first."
        )
    result = EvaluateResult.from_json(run_stages(recipe).stages["evaluate"].result)
    return replace(result, report=str(recipe.out / "evaluation" / "report.html"))  # a run may have been moved


def evaluate_models(
    models: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    output: Path = OUTPUT,
    chat_format: str | None = None,
) -> EvaluateResult:
    """Evaluate models side by side, on `data` or else on the held-out data of the run that one of them belongs to.

    That run's recipe also says how answers are drawn, and in which format a model without a chat template is asked;
    `overrides` such as `generation.do_sample=false` go before it. Raises a `FireflyError` for what the user can mend.
    """
    if chat_format is not None and chat_format not in FORMATS:
        raise InputError(f"Unknown chat format '{chat_format}': {choices(chat_format, FORMATS)}.")
    subjects = find_subjects(models)
    run = next((subject.run for subject in subjects if subject.run), None)
    if data is None and run is None:
        raise InputError(
            "There is no data to evaluate on: none of the models belongs to a run; name a dataset directory or a file "
            "of questions with --data."
        )
    settings = _settings(run, overrides, chat_format)
    questions = read_questions(Path(data) if data else run / "dataset", tasks)  # type: ignore[operator] # one is given
    _refuse_to_replace(output)
    with exclusive_beside(output, "an evaluation"):
        return evaluate({one.name: one.directory for one in subjects}, questions, settings, output)


def evaluate_benchmarks(
    models: Sequence[str],
    overrides: Sequence[str] = (),
    *,
    benchmarks: Sequence[str],
    data: Path,
    num_shots: int = 5,
    output: Path = OUTPUT,
) -> HarnessResult:
    """Score models on benchmarks whose files lie in `data`, and write `output`/benchmarks.json."""
    subjects = find_subjects(models)
    bf16 = _settings(None, overrides, None).evaluate.precision == "bf16"
    places = {one.name: (one.directory, context_tokens(one.directory)) for one in subjects}
    result = run_harness(places, benchmarks, data, num_shots, bf16)
    write_json(output / "benchmarks.json", asdict(result))
    return result


def find_subjects(models: Sequence[str]) -> list[Subject]:
    """The models that arguments mean: DIR, a run's output directory, a hub name, or NAME=DIR.

    Raises `ModelError` for what is no model, `InputError` when two would have one name.
    """
    subjects: list[Subject] = []
    for argument in models:
        name, given, path = argument.partition("=")
        if not given:
            name, path = "", argument
        place = Path(path)
        if is_run(path):
            run: Path | None = place
            directory, found = place / "model", place.absolute().name
            if not directory.is_dir():
                raise ModelError(
                    f"{path} has no trained model yet; run `firefly train` with its recipe first."
                )
        else:
            directory = resolve(path)
            if not (directory / "config.json").is_file():
                raise ModelError(
                    f"{path} is neither a model directory (no config.json) nor a run's output directory (no "
                    "recipe.toml); check the path."
                )
            run = directory.parent if is_run(directory.parent) else None
            found = directory.absolute().name
        name = name or found
        if not re.fullmatch(r"[\w.+-]+", name):
            raise InputError(f"'{name}' cannot name a model: use letters, digits, '.', '_' and '-'.")
        if name in (subject.name for subject in subjects):
            raise InputError(
                f"Two models would be called '{name}'; give them names of your own, as in first={path}."
            )
        subjects.append(Subject(name, directory, run))
    return subjects


def _settings(run: Path | None, overrides: Sequence[str], chat_format: str | None) -> Settings:
    """Those of the run's recipe, or the defaults; in a run a model without a chat template is asked in its format."""
    if run is not None:
        recipe = Recipe.load(run / "recipe.toml", overrides)
        return replace(Settings.of(recipe), chat_format=chat_format, spare_format=recipe.data.chat_format)
    table = {
        "name": "evaluation",
        "output_dir": "none",
        "model": {"base": "none"},
        "data": {"sources": [{"path": "none"}], "max_seq_length": 2048},
    }
    return replace(Settings.of(Recipe.from_table(table, overrides=overrides)), chat_format=chat_format)


def _refuse_to_replace(output: Path) -> None:
    """The report takes the place of the whole directory, so nothing but an earlier report may lie there."""
    if output.is_dir() and any(output.iterdir()) and not (output / "journal").is_dir():
        raise OutputError(
            f"{output} holds other files, which a report would replace; choose another --output."
        )
