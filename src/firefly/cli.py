"""The command line: each verb turns its arguments into one call of `firefly.api` and prints the result.

Results go to stdout (`--json` for machines), progress and messages to stderr. What the user can mend is one
sentence and exit status 1; a usage error is 2; a run stopped by a signal is 128 plus its number, all saved.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from firefly import api, console
from firefly.errors import FireflyError, InputError, Interrupted, ProofError


class _Verbs(TyperGroup):
    """The verbs in the order of the pipeline; typer would list groups, such as `data`, last."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for name in super().list_commands(ctx) if name != "data"]
        names.insert(names.index("train"), "data")
        return names


app = typer.Typer(
    name="firefly",
    cls=_Verbs,
    help="Firefly(流萤): from a multilingual base model to a good Chinese conversational model.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _examples(*commands: str) -> str:
    """The end of a verb's help."""
    return "\n\n".join(["**Examples**", *(f"`{command}`" for command in commands)])


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no messages.")]
RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML), see recipes/.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the recipe's."),
]


def _keeps_what_is_done(verb: Callable[..., None]) -> Callable[..., None]:
    """Ctrl-C ends a verb with a word and a status that say what it was."""

    @functools.wraps(verb)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except KeyboardInterrupt:
            raise Interrupted(
                "interrupted; finished stages and checkpoints are kept, run the same command to go on.",
                signal.SIGINT,
            ) from None

    return guarded


def _show(result: Any, as_json: bool, lines: Callable[[Any], list[str]]) -> None:
    """Print a typed result: as JSON, or as lines for a person."""
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), ensure_ascii=False, indent=2))
    else:
        for line in lines(result):
            typer.echo(line)


def _stage_lines(result: Any) -> list[str]:
    rows = [
        f"{name:9} {'done before' if stage.skipped else f'{stage.wall_s:,.1f} s'}"
        for name, stage in result.stages.items()
    ]
    return [f"{result.name}: {result.output}", *rows]


@app.command(
    epilog=_examples(
        "firefly demo",
        "firefly demo --output out/again train.learning_rate=1e-3",
    )
)
@_keeps_what_is_done
def demo(
    overrides: Overrides = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Output directory (out/demo).")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run the whole pipeline, offline, on the embedded base model."""
    console.quiet(quiet)
    result = api.demo(output, overrides or [])
    _show(result, as_json, lambda done: [f"summary: {done.output}/summary.json"])


def _size_lines(table: Any) -> list[str]:
    counts = [
        ("", "before", "after", "", "LLMPruner's count"),
        ("tokens", f"{table.vocab_before:,}", f"{table.vocab_after:,}", "", ""),
        (
            "parameters",
            f"{table.params_before:,}",
            f"{table.params_after:,}",
            f"{table.percent:.2f} %",
            f"{table.llmpruner_params_after:,} = {table.llmpruner_percent:.2f} %",
        ),
        ("bytes", f"{table.bytes_before:,}", f"{table.bytes_after:,}", "", ""),
    ]
    lines = [
        f"{name:10} {old:>16} {new:>16} {share:>8}  {peer}".rstrip() for name, old, new, share, peer in counts
    ]
    if table.coverage is not None:
        needed = ", ".join(f"{mark} by {size:,}" for mark, size in table.coverage_sizes.items())
        lines.append(f"{table.coverage:.3%} of the corpus' tokens would be kept ({needed})")
    return lines


_MOST_SCRIPTS = 12


def _prune_lines(result: Any) -> list[str]:
    """The sizes, and what is dropped, by script."""
    parameters = (
        f"{result.params_before:,} → {result.params_after:,} parameters; " if result.params_before else ""
    )
    dropped = sorted(
        ((before - after, name) for name, (before, after) in result.scripts.items() if after < before),
        reverse=True,
    )
    rows = [f"{'script':12} {'before':>9} {'kept':>9} {'dropped':>9}  dropped, for example"]
    for amount, name in dropped[:_MOST_SCRIPTS]:
        before, after = result.scripts[name]
        examples = " ".join(repr(text) for text in result.dropped_examples[name])
        rows.append(f"{name:12} {before:9,} {after:9,} {amount:9,}  {examples}")
    if rest := dropped[_MOST_SCRIPTS:]:
        rows.append(f"{f'{len(rest)} others':32} {sum(amount for amount, _ in rest):9,}")
    return [
        f"{result.output}: {result.vocab_before:,} → {result.vocab_after:,} tokens, {parameters}proof in prune.json",
        *(rows if dropped else []),
    ]


def _verify_lines(result: Any) -> list[str]:
    return [f"{check.status:8} {check.name:12} {check.detail}" for check in result.checks]


def _remap_lines(result: Any) -> list[str]:
    lines = [
        f"{result.output}: {result.carried:,} {result.unit} carried over, {result.changed:,} of them changed"
    ]
    return lines + [f"dropped  {what}" for what in result.dropped]


class _Engine(StrEnum):
    LOCAL = "local"
    RAY = "ray"


@app.command(
    epilog=_examples(
        "firefly prune bigscience/bloom-1b7 out/bloom-1b4-zh --corpus zh.txt --corpus en.txt --vocab-size 46145",
        "firefly prune demo:base out/small --corpus poems.jsonl --vocab-size 8000 --pad-to-multiple 64",
        "firefly prune bigscience/bloom-1b7 --dry-run --vocab-size 46145",
        "firefly prune google/gemma-3-1b-it out/gemma-zh --corpus texts/ --coverage 0.9999 --keep-script Digits",
        "firefly prune bigscience/bloom-1b7 --verify out/bloom-1b4-zh",
        "firefly prune bigscience/bloom-1b7 out/adapter-zh --remap my/lora-adapter --pruned out/bloom-1b4-zh",
    )
)
@_keeps_what_is_done
def prune(
    model: Annotated[str, typer.Argument(help="A model directory, a hub name, or demo:base.")],
    output: Annotated[Path | None, typer.Argument(help="The directory to write.", show_default=False)] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus", "-c", help="Text, JSON (Lines), CSV or Parquet, file or folder; may be repeated."
        ),
    ] = None,
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", "-n", help="Exact size of the new vocabulary.")
    ] = None,
    coverage: Annotated[
        float | None, typer.Option(help="Or: keep this share of the corpus' tokens, such as 0.9999.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Or: keep the tokens of the tokenizer in this directory.")
    ] = None,
    pad_to_multiple: Annotated[int, typer.Option(min=1, help="Make the size a multiple of this.")] = 1,
    keep_file: Annotated[Path | None, typer.Option(help="Further tokens to keep, one a line.")] = None,
    keep_script: Annotated[
        str, typer.Option(help="Keep every token in these scripts, such as Han,Latin,Digits.")
    ] = "",
    tokenizer_only: Annotated[
        bool, typer.Option("--tokenizer-only", help="Leave weights alone; the model may lack them.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only tell the sizes for --vocab-size (config.json is enough), and what it covers of --corpus.",
        ),
    ] = False,
    skip_logits_proof: Annotated[
        bool,
        typer.Option("--skip-logits-proof", help="Leave out the part of the proof that runs both models."),
    ] = False,
    chart: Annotated[
        Path | None, typer.Option(help="Draw coverage against vocabulary size into this PNG file.")
    ] = None,
    engine: Annotated[
        _Engine, typer.Option(help="Where the corpus is counted: here, or on a Ray cluster.")
    ] = _Engine.LOCAL,
    verify: Annotated[
        Path | None,
        typer.Option(help="Instead: prove that this directory is MODEL, pruned by Firefly or LLMPruner."),
    ] = None,
    remap: Annotated[
        Path | None,
        typer.Option(help="Instead: carry this tokens directory or LoRA adapter of MODEL over to --pruned."),
    ] = None,
    pruned: Annotated[Path | None, typer.Option(help="With --remap: the model pruned from MODEL.")] = None,
    drop_outside: Annotated[
        bool,
        typer.Option("--drop-outside", help="With --remap: leave out what cannot be carried, and list it."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Prune a vocabulary to the tokens a corpus uses, exactly, and prove it."""
    console.quiet(quiet)
    if dry_run:
        if vocab_size is None:
            raise typer.BadParameter("--dry-run needs --vocab-size.")
        table = api.prune_sizes(
            model, vocab_size=vocab_size, pad_to_multiple=pad_to_multiple, corpus=corpus or [], chart=chart
        )
        _show(table, as_json, _size_lines)
        return
    if verify is not None:
        proven = api.prune_verify(model, verify, corpus=corpus or [], prove_logits=not skip_logits_proof)
        _show(proven, as_json, _verify_lines)
        if proven.failed:
            raise ProofError(f"{verify} is not {model} with fewer tokens: {', '.join(proven.failed)} failed.")
        return
    if output is None:
        raise typer.BadParameter("Missing argument 'OUTPUT', the directory to write.")
    if remap is not None:
        if pruned is None:
            raise typer.BadParameter("--remap needs --pruned, the model pruned from MODEL.")
        carried = api.prune_remap(model, remap, output, pruned=pruned, drop_outside=drop_outside)
        _show(carried, as_json, _remap_lines)
        return
    result = api.prune(
        model,
        output,
        corpus=corpus or [],
        vocab_size=vocab_size,
        coverage=coverage,
        tokenizer=tokenizer,
        pad_to_multiple=pad_to_multiple,
        keep_file=keep_file,
        keep_script=[name for name in keep_script.split(",") if name.strip()],
        tokenizer_only=tokenizer_only,
        prove_logits=not skip_logits_proof,
        chart=chart,
        engine=engine.value,
    )
    _show(result, as_json, _prune_lines)


class _BuildByDefault(TyperGroup):
    """`firefly data RECIPE` means `firefly data build RECIPE`; a recipe named like a verb is `./stats`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["build", *args]
        return super().parse_args(ctx, args)


data_app = typer.Typer(
    cls=_BuildByDefault,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    epilog=_examples(
        "firefly data recipes/firefly-1b4.toml",
        "firefly data stats recipes/firefly-1b4.toml --json",
        "firefly data peek recipes/firefly-1b4.toml --kind Couplet",
    ),
)
app.add_typer(
    data_app,
    name="data",
    help="Build the dataset of a recipe, look at its figures (stats) and its samples (peek).",
)
DataPlace = Annotated[
    Path, typer.Argument(metavar="DIR|RECIPE", help="A recipe, a run, a dataset or a tokens directory.")
]
DataModel = Annotated[
    str | None,
    typer.Option(help="The model whose tokenizer made the tokens, where no recipe lies beside them."),
]


@data_app.command(
    epilog=_examples(
        "firefly data recipes/firefly-1b4.toml",
        "firefly data recipes/firefly-1b4.toml --engine ray",
    )
)
@_keeps_what_is_done
def build(
    recipe: RecipeFile,
    overrides: Overrides = None,
    engine: Annotated[
        str | None, typer.Option(help="Where the work runs: local processes, or a ray cluster (data.engine).")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the dataset of a recipe: import, template, clean, split, encode (the word `build` may be left out)."""
    console.quiet(quiet)
    chosen = [f"data.engine={engine}"] if engine else []
    _show(api.data(recipe, [*(overrides or []), *chosen]), as_json, _stage_lines)


@data_app.command(
    epilog=_examples(
        "firefly data stats recipes/firefly-1b4.toml",
        "firefly data stats out/firefly-1b4/dataset --json",
    )
)
@_keeps_what_is_done
def stats(
    place: DataPlace,
    overrides: Overrides = None,
    model: DataModel = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write, if not into the directory.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Count, measure and draw a dataset: lengths, what a limit would cut, drops; cards, charts and a page."""
    console.quiet(quiet)
    result = api.data_stats(place, overrides or [], model=model, output=output)
    if as_json:
        _show(result, True, lambda _: [])
        return
    console.show(*(table.rich() for table in result.tables()))
    typer.echo(f"{result.output}: stats.json, report.html, tasks.png, lengths.png")


@data_app.command(
    epilog=_examples(
        "firefly data peek recipes/firefly-1b4.toml --num 3",
        "firefly data peek out/demo --kind Couplet --seed 7 --html samples.html",
    )
)
@_keeps_what_is_done
def peek(
    place: DataPlace,
    overrides: Overrides = None,
    kind: Annotated[str | None, typer.Option(help="Samples of this task alone.")] = None,
    num: Annotated[int, typer.Option(min=1, help="How many samples.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Another seed draws others.")] = 0,
    model: DataModel = None,
    html: Annotated[Path | None, typer.Option(help="Write the samples to this page, too.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show samples as training reads them: what is learned in colour, or in [[…]] where there is none."""
    console.quiet(quiet)
    samples = api.data_peek(place, overrides or [], kind=kind, num=num, seed=seed, model=model, html=html)
    if as_json:
        typer.echo(
            json.dumps([dataclasses.asdict(sample) for sample in samples], ensure_ascii=False, indent=2)
        )
    elif console.has_colours():
        console.show(*(sample.coloured() for sample in samples))
    else:
        for sample in samples:
            typer.echo(sample.plain())


@app.command(
    epilog=_examples(
        "firefly plan recipes/firefly-1b4.toml --gpu 24GB",
        "firefly plan recipes/firefly-2b6.toml --gpu H200 train.per_device_train_batch_size=32",
        "firefly plan recipes/firefly-2b6.toml --gpu H100 --gpus 64 --interconnect NDR parallel.zero=3",
    )
)
@_keeps_what_is_done
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            help="A GPU's name, such as H200 or 4090, or its memory, such as 24GB; this machine's otherwise."
        ),
    ] = None,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Plan for so many of them, and compare layouts and numbers.")
    ] = None,
    interconnect: Annotated[
        str,
        typer.Option(
            help="The network between nodes: NDR, HDR … (InfiniBand, an adapter a GPU), 100GbE … (one a node), or GB/s "
            "a GPU in one direction."
        ),
    ] = "NDR",
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs in one node.")] = 8,
    batch: Annotated[
        int | None,
        typer.Option(
            min=1, help="Samples a step that all GPUs share; otherwise each has the recipe's batch."
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what training will take: memory, hours and disk, whether it fits, and what to change if not."""
    from firefly.app.planned import describe

    console.quiet(quiet)
    result = api.plan(
        recipe,
        overrides or [],
        gpu=gpu,
        gpus=gpus,
        interconnect=interconnect,
        gpus_per_node=gpus_per_node,
        samples_per_step=batch,
    )
    _show(result, as_json, describe)


@app.command(
    epilog=_examples(
        "firefly train recipes/firefly-1b4.toml",
        "firefly train recipes/firefly-1b4.toml train.learning_rate=2e-5",
        "firefly train --gpus all recipes/firefly-2b6.toml parallel.zero=2",
        "torchrun --nproc-per-node 8 -m firefly train recipes/firefly-2b6.toml parallel.zero=2",
    )
)
@_keeps_what_is_done
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="all|N", help="Start one process a GPU of this machine, as torchrun does."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Start so many processes, also where there are no GPUs.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the model of a recipe; goes on from the last checkpoint."""
    console.quiet(quiet)
    if gpus is not None or processes is not None:
        if gpus is not None and processes is not None:
            raise typer.BadParameter("--gpus and --processes say the same; give one of them.")
        flags = ["--json"] * as_json + ["--quiet"] * quiet
        raise typer.Exit(api.launch(["train", str(recipe), *(overrides or []), *flags], gpus, processes))
    _show(api.train(recipe, overrides or []), as_json, _stage_lines)


@app.command(
    epilog=_examples(
        "firefly run recipes/demo.toml",
        "firefly run recipes/firefly-2b6.toml output_dir=out/mine",
    )
)
@_keeps_what_is_done
def run(recipe: RecipeFile, overrides: Overrides = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Run every stage of a recipe, each skipped when it is already done."""
    console.quiet(quiet)
    _show(api.run(recipe, overrides or []), as_json, _stage_lines)


@app.command(
    epilog=_examples(
        "firefly runs",
        "firefly runs out --json",
        "firefly runs out/mine out/again --png curves.png",
    )
)
@_keeps_what_is_done
def runs(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[DIR]...", help="Folders to look in; or two or more runs, to compare them."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the runs' curves over each other here.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List runs with their state, losses and speed, or compare two or more: options that differ, curves."""
    console.quiet(quiet)
    result = api.runs(*places or [], png=png)
    if as_json:
        _show(result, True, lambda _: [])
    else:
        console.show(*(table.rich() for table in result.tables()))


@app.command(
    epilog=_examples(
        "firefly evaluate out/demo",
        "firefly evaluate demo:base out/demo --tasks Couplet,AncientPoem evaluate.generations_per_kind=200",
        "firefly evaluate before=out/first after=out/second --data questions.jsonl generation.do_sample=false",
        "firefly evaluate out/firefly-1b4 --harness ceval,cmmlu --harness-data benchmarks",
    )
)
@_keeps_what_is_done
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL... [SECTION.KEY=VALUE]...",
            help="Model directories, runs' output directories or hub names, as NAME=MODEL to name them in the report; "
            "or one recipe or run alone, to compare its base, pruned and tuned model. Then values that replace the "
            "recipe's.",
        ),
    ],
    tasks: Annotated[str | None, typer.Option(help="Only these tasks, with commas between.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="A dataset directory, or a file of questions; by default what a run held out."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the report goes (out/evaluation).")
    ] = None,
    chat_format: Annotated[
        str | None, typer.Option(help="How to ask, such as firefly or chatml; by default as the model says.")
    ] = None,
    harness: Annotated[
        str | None,
        typer.Option(help="Benchmarks of lm-evaluation-harness instead: ceval, cmmlu, or both with a comma."),
    ] = None,
    harness_data: Annotated[
        Path | None, typer.Option(help="The folder with the benchmarks' files; see docs/evaluate.md.")
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, max=5, help="Answered questions before each one of a benchmark.")
    ] = 5,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure models side by side on held-out data; goes on where it was stopped."""
    from firefly.evaluate.report import text_table

    console.quiet(quiet)
    overrides = [text for text in models if re.match(r"\w+(\.\w+)+=", text)]
    models = [text for text in models if text not in overrides]
    if not models:
        raise InputError("No model is named; give a model directory or a run's output directory.")
    if harness is not None:
        if harness_data is None:
            raise InputError("--harness needs --harness-data DIR, the folder with the benchmarks' files.")
        scores = api.evaluate_benchmarks(
            *models,
            benchmarks=_listed(harness),
            data=harness_data,
            num_shots=shots,
            overrides=overrides,
            output=output,
        )
        _show(scores, as_json, lambda found: found.lines())
        return
    result = api.evaluate(
        *models,
        overrides=overrides,
        tasks=_listed(tasks),
        data=data,
        output=output,
        chat_format=chat_format,
    )
    _show(result, as_json, lambda found: [text_table(found), f"report: {found.report}"])


def _listed(text: str | None) -> list[str]:
    """The members of an option such as `--tasks Couplet,AncientPoem`."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _merge_lines(result: Any) -> list[str]:
    return [
        f"{result.output}: {result.merged_layers} adapted layers folded into {result.base}, stored as {result.dtype}",
        f"logits, of {result.largest_logit:.3g} at most, moved by {result.merge_difference:.2g} in merging and "
        f"{result.rounding_difference:.2g} in storing",
    ]


@app.command(
    epilog=_examples(
        "firefly merge out/firefly-1b4-lora out/merged",
        "firefly merge my/lora-adapter out/merged --base bigscience/bloom-560m",
    )
)
@_keeps_what_is_done
def merge(
    run_or_adapter: Annotated[
        Path,
        typer.Argument(metavar="RUN|ADAPTER", help="A run that trained an adapter, or an adapter of peft's."),
    ],
    output: Annotated[Path, typer.Argument(help="The model directory to write.")],
    base: Annotated[
        str | None, typer.Option(help="The base model, if not the one that the adapter names.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fold an adapter into its base model: a plain model directory, its logits compared before and after."""
    console.quiet(quiet)
    _show(api.merge(run_or_adapter, output, base=base), as_json, _merge_lines)


@app.command(
    epilog=_examples(
        "firefly chat out/demo",
        'firefly chat out/demo --prompt "对下联：白日依山尽" --temperature 0.7',
    )
)
@_keeps_what_is_done
def chat(
    model: Annotated[str, typer.Argument(help="A model directory, or the output directory of a run.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Answer this one prompt and end.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 picks the likeliest token.", min=0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.01, max=1)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=1)] = None,
    penalize_prompt: Annotated[
        bool | None,
        typer.Option(help="Whether the words of the question count as repeated."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Talk with a model; /reset, /system TEXT and /exit work inside, Ctrl-C stops an answer.

    It samples as the recipe of its run says, and else with temperature 0.35, top_p 0.85 and repetition penalty 1.2.
    """
    console.quiet(quiet)
    given = {
        "max_new_tokens": max_new_tokens,
        "do_sample": None if temperature is None else temperature > 0,
        "temperature": temperature or None,
        "top_p": top_p,
        "repetition_penalty": repetition_penalty,
        "penalize_prompt": penalize_prompt,
        "seed": seed,
    }
    options = {name: value for name, value in given.items() if value is not None}
    result = api.chat(
        model, prompt=prompt, system=system, options=options, out=sys.stderr if as_json else None
    )
    if as_json:
        _show(result, True, lambda _: [])


class _Kind(StrEnum):
    POEM = "poem"
    COUPLET = "couplet"


class _Book(StrEnum):
    PINGSHUI = "pingshui"
    XINYUN = "xinyun"


@app.command(
    epilog=_examples(
        'firefly verse "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"',
        'firefly verse "无边落木萧萧下，不尽长江滚滚来"',
        'firefly verse "常记溪亭日暮，沉醉不知归路。……" --tune 如梦令',
    )
)
@_keeps_what_is_done
def verse(
    text: Annotated[str, typer.Argument(help="A poem, a couplet or a lyric, with its punctuation.")],
    kind: Annotated[
        _Kind | None,
        typer.Option("--as", help="What it is, when its shape leaves that open.", show_default=False),
    ] = None,
    book: Annotated[
        _Book, typer.Option(help="平水韵, of classical verse, or 中华新韵, of modern Mandarin.")
    ] = _Book.PINGSHUI,
    tune: Annotated[str | None, typer.Option(help="Judge a lyric (词) by this tune, such as 浣溪沙.")] = None,
    acrostic: Annotated[
        str | None, typer.Option(help="Characters that should head the lines (藏头).")
    ] = None,
    parallel: Annotated[
        bool, typer.Option("--parallel", help="Add how alike the parts of speech are (needs jieba).")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge Chinese verse: tones, rhyme, form, and each character that breaks the rules."""
    from firefly.app.verse import describe

    console.quiet(quiet)
    result = api.verse(
        text,
        kind=kind.value if kind else None,
        book=book.value,
        tune=tune,
        hidden=acrostic,
        parallel=parallel,
    )
    _show(result, as_json, describe)


@app.command(
    epilog=_examples(
        "firefly version --json",
    )
)
@_keeps_what_is_done
def version(as_json: Json = False, quiet: Quiet = False) -> None:
    """Versions of Firefly and of what decides about its results."""
    console.quiet(quiet)
    _show(
        api.version(), as_json, lambda v: [f"{name} {value}" for name, value in dataclasses.asdict(v).items()]
    )


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; a `FireflyError` becomes one sentence on stderr and exit status 1."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # How long a thread spins before it sleeps: the usual 300,000 turns make a busy machine several times slower,
        # none makes a quiet one a third slower; this many cost neither (measured with the demo's training).
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show Chinese shows ?
    try:
        app(arguments)
    except FireflyError as error:
        _fail(f"error: {error}", 1)
    except Interrupted as stop:
        _fail(str(stop), 128 + stop.signal_number)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:
        _fail(f"error: the system refused: {error}; free the disk, or check the path's rights.", 1)


def _fail(message: str, status: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
