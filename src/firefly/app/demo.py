"""The demo: the whole pipeline on the embedded base and samples, and a summary that tells what happened."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from firefly.app.pipeline import RunResult, run_stages
from firefly.console import say
from firefly.files import locate, sha256_file, write_json
from firefly.recipe import Recipe

RECIPE = "demo:demo.toml"


@dataclass(frozen=True)
class DemoResult:
    """What `summary.json` holds; bits per byte are on held-out examples, per task and in `all`."""

    output: str
    proof_passed: bool
    params_before: int
    params_after: int
    vocab_before: int
    vocab_after: int
    examples: dict[str, dict[str, int]]
    train_tokens_per_s: float
    loss_before: float
    loss_after: float
    bits_per_byte_before: dict[str, float]
    bits_per_byte_after: dict[str, float]
    wall_s: dict[str, float]
    final_weights_sha256: str
    answers: list[dict[str, str]]


def run_demo(output_dir: str | None = None, overrides: tuple[str, ...] = ()) -> DemoResult:
    """Run the embedded recipe from end to end and write `summary.json`; finished stages are skipped."""
    place = (f"output_dir={json.dumps(output_dir)}",) if output_dir else ()
    recipe = Recipe.load(locate(RECIPE), (*overrides, *place))
    run = run_stages(recipe)
    result = summarise(recipe, run)
    write_json(recipe.out / "summary.json", asdict(result))
    _tell(result, recipe.out)
    return result


def summarise(recipe: Recipe, run: RunResult) -> DemoResult:
    """Gather the stages' results into one."""
    stages = {name: stage.result for name, stage in run.stages.items()}
    pruned, scores = stages["prune"], stages["evaluate"]["models"]
    before, after = scores["base"]["held_out"], scores["tuned"]["held_out"]
    return DemoResult(
        output=run.output,
        proof_passed=_passed(pruned["proof"]),
        params_before=pruned["params_before"],
        params_after=pruned["params_after"],
        vocab_before=pruned["vocab_before"],
        vocab_after=pruned["vocab_after"],
        examples=stages["dataset"]["kinds"],
        train_tokens_per_s=stages["train"]["tokens_per_s"],
        loss_before=before["all"]["loss"],
        loss_after=after["all"]["loss"],
        bits_per_byte_before={kind: score["bits_per_byte"] for kind, score in before.items()},
        bits_per_byte_after={kind: score["bits_per_byte"] for kind, score in after.items()},
        wall_s={name: stage.wall_s for name, stage in run.stages.items()},
        final_weights_sha256=sha256_file(recipe.out / "model" / "model.safetensors"),
        answers=[],
    )


def _passed(proof: dict[str, Any]) -> bool:
    return bool(proof)


def _tell(result: DemoResult, out: Path) -> None:
    say("")
    for line in summary_lines(result, out):
        say(line)


def summary_lines(result: DemoResult, out: Path) -> list[str]:
    """The summary for a person."""
    return [str(result), str(out)]
