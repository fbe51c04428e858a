"""The demo: the whole pipeline on the embedded base and samples, and a summary that tells what happened."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from firefly.app.pipeline import RunResult, run_stages
from firefly.console import say
from firefly.data.tasks import load_tasks
from firefly.files import locate, sha256_file, write_json
from firefly.recipe import Recipe

RECIPE = "demo:demo.toml"
_SHOWN = ("Couplet", "AncientPoem", "ClassicalChinese", "SentimentAnalyze")
"""The tasks whose answers the summary shows."""


@dataclass(frozen=True)
class Answer:
    """A held-out question and what the trained model said."""

    kind: str
    question: str
    answer: str
    reference: str


@dataclass(frozen=True)
class DemoResult:
    """What `summary.json` holds. Losses in nats a token and bits per byte are on held-out examples, before and
    after training, per task and in `all`; `examples` counts training and held-out examples of each task. Of
    `num_answers` to held-out questions the pruned base gave `same_answers` just as the base did."""

    output: str
    proof_passed: bool
    params_before: int
    params_after: int
    vocab_before: int
    vocab_after: int
    num_answers: int
    same_answers: int
    examples: dict[str, int]
    train_tokens_per_s: float
    loss_before: dict[str, float]
    loss_after: dict[str, float]
    bits_per_byte_before: dict[str, float]
    bits_per_byte_after: dict[str, float]
    wall_s: dict[str, float]
    final_weights_sha256: str
    answers: list[Answer]


def run_demo(output_dir: str | None = None, overrides: Sequence[str] = ()) -> DemoResult:
    """Run the embedded recipe from end to end and write `summary.json`; finished stages are skipped."""
    place = [f"output_dir={json.dumps(output_dir)}"] if output_dir else []
    recipe = Recipe.load(locate(RECIPE), [*overrides, *place])
    result = summarise(recipe, run_stages(recipe))
    write_json(recipe.out / "summary.json", asdict(result))
    say("\n" + "\n".join(summary_lines(result)))
    return result


def summarise(recipe: Recipe, run: RunResult) -> DemoResult:
    """Gather the stages' results into one."""
    stages = {name: stage.result for name, stage in run.stages.items()}
    pruned, evaluated = stages["prune"], stages["evaluate"]
    before, after = (evaluated["models"][name]["held_out"] for name in ("base", "tuned"))
    first = {sample["kind"]: sample for sample in reversed(evaluated["samples"])}
    samples = [first[kind] for kind in _SHOWN if kind in first]
    counts = stages["dataset"]["kinds"]
    return DemoResult(
        output=run.output,
        # A proof that fails raises, and leaves no pruned model; what is here was checked document by document.
        proof_passed=pruned["proof"]["documents_checked"] > 0,
        params_before=pruned["params_before"],
        params_after=pruned["params_after"],
        vocab_before=pruned["vocab_before"],
        vocab_after=pruned["vocab_after"],
        num_answers=sum(evaluated["questions"].values()),
        same_answers=evaluated["same_answers"]["pruned"],
        examples={kind: sides["train"] + sides["validation"] for kind, sides in counts.items()},
        train_tokens_per_s=stages["train"]["tokens_per_s"],
        loss_before={kind: score["loss"] for kind, score in before.items()},
        loss_after={kind: score["loss"] for kind, score in after.items()},
        bits_per_byte_before={kind: score["bits_per_byte"] for kind, score in before.items()},
        bits_per_byte_after={kind: score["bits_per_byte"] for kind, score in after.items()},
        wall_s={name: stage.wall_s for name, stage in run.stages.items()},
        final_weights_sha256=sha256_file(recipe.out / "model" / "model.safetensors"),
        answers=[Answer(s["kind"], s["question"], s["answers"]["tuned"], s["reference"]) for s in samples],
    )


def summary_lines(result: DemoResult) -> list[str]:
    """The summary for a person."""
    tasks = load_tasks()
    out = Path(result.output)
    before, after = result.bits_per_byte_before, result.bits_per_byte_after
    lines = [
        "Firefly demo",
        f"  vocabulary   {result.vocab_before:,} → {result.vocab_after:,} tokens",
        f"  parameters   {result.params_before:,} → {result.params_after:,}"
        f" ({result.params_after / result.params_before:.1%})",
        f"  proof        {'passed' if result.proof_passed else 'FAILED'}",
        f"  unchanged    {result.same_answers} of {result.num_answers} answers, character for character",
        f"  training     {result.train_tokens_per_s:,.0f} tokens/s (no padding)",
        f"  held-out loss {result.loss_before['all']:.3f} → {result.loss_after['all']:.3f} nats a token",
        "",
        f"  {'task':24}{'examples':>9}{'bits/byte before':>19}{'after':>8}{'change':>9}",
    ]
    for kind in [*sorted(result.examples), "all"]:
        count = result.examples.get(kind, sum(result.examples.values()))
        if kind in before:
            change = f"{after[kind] / before[kind] - 1:+.0%}"
            lines.append(f"  {kind:24}{count:>9,}{before[kind]:>19.3f}{after[kind]:>8.3f}{change:>9}")
    for answer in result.answers:
        title = tasks[answer.kind].title_zh
        lines += [
            "",
            f"  【{title}】{_indented(answer.question)}",
            f"  流萤：{_indented(answer.answer) or '（没有回答）'}",
        ]
    total_s = sum(result.wall_s.values())
    stages = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in result.wall_s.items())
    return [
        *lines,
        "",
        f"  {total_s:.0f} s in all: {stages}",
        f"  report   {out / 'evaluation' / 'report.html'}",
        f"  summary  {out / 'summary.json'}",
        f"  talk     firefly chat {out}",
    ]


def _indented(text: str) -> str:
    return text.strip().replace("\n", "\n        ")
