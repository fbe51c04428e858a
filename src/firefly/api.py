"""The verbs of the command line as Python functions: same names, same meaning, typed results.

    from firefly import api

    api.prune("bigscience/bloom-1b7", "out/bloom-1b4-zh", corpus=["zh.txt", "en.txt"], vocab_size=46145)
    result = api.run("recipes/firefly-1b4.toml", ["train.learning_rate=2e-5"])

A recipe is a path, with `section.key=value` overrides, or a `Recipe`. What the user can mend raises a
`FireflyError`; `Interrupted` means that a signal came and everything is saved.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from firefly.errors import InputError
from firefly.recipe import Engine, GenerationSection, Recipe

if TYPE_CHECKING:  # the functions import what they need, so that `firefly --help` is instant
    from firefly.app.chat import ChatResult
    from firefly.app.demo import DemoResult
    from firefly.app.pipeline import RunResult
    from firefly.app.runs import RunsResult
    from firefly.app.verse import VerseResult
    from firefly.data.peek import PeekedSample
    from firefly.data.survey import StatsResult
    from firefly.evaluate.harness import HarnessResult
    from firefly.evaluate.result import EvaluateResult
    from firefly.evaluate.rhyme import Book
    from firefly.model.adapters import MergeResult
    from firefly.prune.layout import SizeTable
    from firefly.prune.prune import PruneResult
    from firefly.prune.remap import RemapResult
    from firefly.prune.verify import VerifyResult
    from firefly.train.plan import Plan

__all__ = [
    "VersionResult",
    "chat",
    "data",
    "data_peek",
    "data_stats",
    "demo",
    "evaluate",
    "evaluate_benchmarks",
    "launch",
    "merge",
    "plan",
    "prune",
    "prune_remap",
    "prune_sizes",
    "prune_verify",
    "run",
    "runs",
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
    chart: str | Path | None = None,
    engine: Engine = "local",
) -> PruneResult:
    """Prune a model's vocabulary to the tokens that a corpus uses, and prove that nothing else changed.

    Exactly one of `vocab_size`, `coverage` (a share of the corpus' tokens) and `tokenizer` (a directory whose
    tokens to keep) says how much stays; `tokenizer_only` prunes a directory without its weights. `chart` is a
    PNG file to draw: coverage against vocabulary size. `engine` "ray" counts the corpus on a Ray cluster.
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
        chart=Path(chart) if chart else None,
        engine=engine,
    )


def prune_sizes(
    model: str | Path,
    *,
    vocab_size: int,
    pad_to_multiple: int = 1,
    corpus: Sequence[str | Path] = (),
    chart: str | Path | None = None,
) -> SizeTable:
    """Tell what pruning to `vocab_size` tokens would make of a model's size; a config.json alone is enough.

    With a `corpus` (and a tokenizer) also what these tokens would cover of it; `chart` is a PNG file to draw.
    """
    from firefly.model.hub import resolve
    from firefly.prune.chart import coverage_beforehand
    from firefly.prune.layout import dry_run

    base = resolve(str(model))
    table = dry_run(base, vocab_size, pad_to_multiple)
    if not corpus and chart is None:
        return table
    paths, picture = [Path(path) for path in corpus], Path(chart) if chart else None
    share, sizes = coverage_beforehand(base, paths, table.vocab_after, picture)
    return replace(table, coverage=share, coverage_sizes=sizes)


def prune_remap(
    model: str | Path, what: str | Path, output: str | Path, *, pruned: str | Path, drop_outside: bool = False
) -> RemapResult:
    """Carry a tokens directory or a LoRA adapter of `model` over to the model pruned from it.

    `drop_outside` leaves out what the pruned vocabulary cannot hold, and lists it.
    """
    from firefly.model.hub import resolve
    from firefly.prune.remap import remap

    return remap(resolve(str(model)), Path(what), Path(output), Path(pruned), drop_outside=drop_outside)


def prune_verify(
    model: str | Path, pruned: str | Path, *, corpus: Sequence[str | Path] = (), prove_logits: bool = True
) -> VerifyResult:
    """Prove again that the directory `pruned`, made by Firefly or LLMPruner, is `model` with fewer tokens."""
    from firefly.model.hub import resolve
    from firefly.prune.verify import verify

    paths = [Path(path) for path in corpus]
    return verify(resolve(str(model)), Path(pruned), corpus=paths, logits=prove_logits)


def data(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Build the dataset and the tokens directory of a recipe (and prune the base, if the recipe says so)."""
    from firefly.app.pipeline import run_stages

    return run_stages(_recipe(recipe, overrides), until="tokens")


def data_stats(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    model: str | None = None,
    output: str | Path | None = None,
) -> StatsResult:
    """Figures, charts and cards of a dataset or tokens directory, or of both that a recipe or a run made.

    They are written into the directory, or else to `output`; `model` has the tokenizer, where a run does not tell.
    """
    from firefly.app.places import find_places
    from firefly.data.survey import dataset_stats, tokens_stats

    places, out = find_places(path, overrides), Path(output) if output else None
    if places.tokens is None:
        assert places.dataset is not None
        return dataset_stats(places.dataset, out)
    if places.dataset and out is None:
        dataset_stats(places.dataset)
    return tokens_stats(
        places.tokens,
        out,
        dataset=places.dataset,
        tokenizer=places.tokenizer_at_hand(model),
        data=places.recipe.data if places.recipe else None,
    )


def data_peek(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    kind: str | None = None,
    num: int = 5,
    seed: int = 0,
    model: str | None = None,
    html: str | Path | None = None,
) -> list[PeekedSample]:
    """Draw training samples of a tokens directory, of a recipe or of a run; `html` writes them as a page, too.

    Raises `InputError` when there are no tokens yet.
    """
    from firefly.app.places import find_places
    from firefly.data.peek import peek, peek_page
    from firefly.files import write_atomic

    places = find_places(path, overrides)
    if places.tokens is None:
        raise InputError(f"{path} has no tokens directory yet; run `firefly data` with its recipe first.")
    samples = peek(
        places.tokens, places.tokenizer(model), dataset=places.dataset, kind=kind, num=num, seed=seed
    )
    if html is not None:
        write_atomic(Path(html), peek_page(samples))
    return samples


def plan(
    recipe: RecipeLike,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    gpus: int | None = None,
    interconnect: str = "NDR",
    gpus_per_node: int = 8,
    samples_per_step: int | None = None,
) -> Plan:
    """Say what training a recipe takes (memory, time, disk), whether it fits, and what to change if not.

    Nothing is loaded: config.json is enough. `gpu` is a name such as "H200" or a memory size such as "24GB"; without
    it, this machine's device. Lengths are those of the recipe's tokens directory, or else the article's. With `gpus`,
    the plan is for so many of them, and `scaling` compares layouts and numbers of GPUs; `interconnect` between nodes is
    a name such as "NDR" or "100GbE", or GB/s a GPU in one direction. `samples_per_step` are then shared by all;
    without, each rank has the recipe's batch.
    """
    from firefly.model.hub import resolve
    from firefly.train.gpus import find_gpu, this_device, with_measured_rates
    from firefly.train.plan import estimate_from, make_plan, planned_config
    from firefly.train.scaling import Cluster

    made = _recipe(recipe, overrides)
    device = find_gpu(gpu) if gpu else with_measured_rates(this_device())
    config = planned_config(made, resolve(made.model.base, ["config.json"]))
    cluster = Cluster.of(device, gpus_per_node, interconnect) if gpus else None
    estimate = estimate_from(made.out / "tokens")
    return make_plan(made, config, estimate, device, cluster, gpus or 1, samples_per_step)


def train(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Train a recipe's model, going on from the last checkpoint; earlier stages run if they have not."""
    from firefly.app.pipeline import run_stages
    from firefly.train.team import joined

    with joined() as team:
        return run_stages(_recipe(recipe, overrides), until="train", team=team)


def launch(arguments: Sequence[str], gpus: str | None = None, processes: int | None = None) -> int:
    """Run `firefly ARGUMENTS` once for each GPU of this machine ("all", or how many), or in so many `processes`.

    Returns the exit status; the processes say themselves what happens. Raises `LaunchError`.
    """
    from firefly.app.launch import launch as start
    from firefly.app.launch import num_gpus

    return start(arguments, processes or num_gpus(gpus or "all"))


def run(recipe: RecipeLike, overrides: Sequence[str] = ()) -> RunResult:
    """Run every stage of a recipe, each skipped when it is already done."""
    from firefly.app.pipeline import run_stages
    from firefly.train.team import joined

    with joined() as team:
        return run_stages(_recipe(recipe, overrides), team=team)


def runs(*places: str | Path, png: str | Path | None = None) -> RunsResult:
    """List the runs under folders (the current one by default), or compare two or more runs that are named.

    A comparison tells the options that differ; `png` is a picture to draw, the runs' curves over each other.
    Raises `InputError` when there is no run.
    """
    from firefly.app.runs import list_runs

    return list_runs([Path(place) for place in places], Path(png) if png else None)


def evaluate(
    *models: RecipeLike,
    overrides: Sequence[str] = (),
    tasks: Sequence[str] = (),
    data: str | Path | None = None,
    output: str | Path | None = None,
    chat_format: str | None = None,
) -> EvaluateResult:
    """Measure models side by side on held-out data: bits per byte, and each task's metric on generated answers.

    A model is a directory, a run's output directory, a hub name, or "NAME=DIR". `data` is a dataset directory or a
    file of questions; without it, the held-out side of a run's dataset. A single recipe or run, and no option, means
    the run's own stage: base, pruned and tuned. Called again, it goes on where it was.
    """
    from firefly.app.evaluation import OUTPUT, evaluate_models, evaluate_run, is_run

    alone = len(models) == 1 and not (tasks or data or output or chat_format)
    if alone and (isinstance(models[0], Recipe) or is_run(models[0])):
        return evaluate_run(models[0], overrides)
    return evaluate_models(
        [str(model) for model in models],
        overrides,
        tasks=tasks,
        data=data,
        output=Path(output) if output else OUTPUT,
        chat_format=chat_format,
    )


def evaluate_benchmarks(
    *models: str | Path,
    benchmarks: Sequence[str],
    data: str | Path,
    num_shots: int = 5,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
) -> HarnessResult:
    """Accuracy of models on C-Eval ("ceval") and CMMLU ("cmmlu"), through lm-evaluation-harness and local files.

    `data` is the folder with the files, see docs/evaluate.md; a model is what it is for `evaluate`.
    """
    from firefly.app.evaluation import OUTPUT
    from firefly.app.evaluation import evaluate_benchmarks as run_benchmarks

    return run_benchmarks(
        [str(model) for model in models],
        overrides,
        benchmarks=benchmarks,
        data=Path(data),
        num_shots=num_shots,
        output=Path(output) if output else OUTPUT,
    )


def merge(run_or_adapter: str | Path, output: str | Path, *, base: str | Path | None = None) -> MergeResult:
    """Fold an adapter, or that of a run, into its base: a plain model directory, its logits compared before and after.

    `base` is the base model, where it is not the one that the adapter names.
    """
    from firefly.app.merge import merge as fold_in

    return fold_in(Path(run_or_adapter), Path(output), str(base) if base else None)


def chat(
    model: str | Path,
    *,
    prompt: str | None = None,
    system: str | None = None,
    options: GenerationSection | Mapping[str, Any] | None = None,
    out: TextIO | None = None,
) -> ChatResult:
    """Talk with a model in the terminal, or answer one prompt; the answers stream to `out`, or else to stdout.

    A model of a run samples as the run's recipe says; `options` may be a mapping that changes some of that.
    """
    from firefly.app.chat import chat as talk
    from firefly.app.chat import model_directory, sampling_of
    from firefly.model.hub import resolve

    directory = model_directory(resolve(str(model)))
    if not isinstance(options, GenerationSection):
        options = GenerationSection.model_validate(sampling_of(directory).model_dump() | dict(options or {}))
    return talk(directory, options, prompt=prompt, system=system, out=out)


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
