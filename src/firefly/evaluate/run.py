"""`firefly evaluate`: several models answer the same held-out examples, and one report sets them side by side.

    for each model:  losses of the reference answers → bits per byte of every task
                     answers of its own              → every task's metric                 (both from `measure`)
    all together     → results.json, answers.jsonl, report.html, PNG plots, journal/

results.json holds no times or dates: the same models and data give the same bytes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.example import Example
from firefly.data.tasks import load_tasks
from firefly.evaluate.measure import Measured, Settings, askable
from firefly.evaluate.metrics import Answered, Intervals, Scores, bootstrap, judge
from firefly.evaluate.questions import Questions
from firefly.evaluate.report import write_report
from firefly.evaluate.result import EvaluateResult, ModelScores, Sample
from firefly.files import directory_atomic, write_atomic, write_json
from firefly.model.score import mean_loss

SHOWN = 8  # samples of each kind in the report; answers.jsonl has all


def evaluate(
    models: Mapping[str, Path], questions: Questions, settings: Settings, out: Path
) -> EvaluateResult:
    """Measure `models`, in order ("base" before "tuned"), and write the report into the directory `out`.

    What is found out is kept in `out`/journal as it comes; called again, it goes on from there.
    Raises `ModelError` for a model that cannot be used, before any is measured.
    """
    measured = [Measured(name, path, settings, out / "journal") for name, path in models.items()]
    scored, answers = {}, {}
    for model in measured:
        losses, answers[model.name] = model.losses(questions), model.answers(questions)
        scored[model.name] = _scores(questions, losses, answers[model.name])
        model.__dict__.pop("generator", None)  # one model in memory at a time
    asked = {kind: askable(questions[kind], settings.evaluate) for kind in answers[measured[0].name]}
    samples = {
        kind: [
            Sample(
                kind, example.input, example.target, {name: answers[name][kind][number] for name in models}
            )
            for number, example in enumerate(group)
        ]
        for kind, group in asked.items()
    }
    every = [sample for group in samples.values() for sample in group]
    names = list(models)
    result = EvaluateResult(
        models=scored,
        questions={kind: len(group) for kind, group in samples.items()},
        same_answers={
            after: sum(sample.answers[before] == sample.answers[after] for sample in every)
            for before, after in pairwise(names)
        },
        samples=[sample for group in samples.values() for sample in group[:SHOWN]],
        report=str(out / "report.html"),
    )
    with directory_atomic(out) as place:
        write_report(result, place)
        lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in every]
        write_atomic(place / "answers.jsonl", "".join(lines))
        write_json(place / "results.json", asdict(result) | {"report": "report.html"})
        shutil.copytree(out / "journal", place / "journal")
    return result


def _scores(
    questions: Questions, losses: Mapping[str, NDArray[Any]], answers: Mapping[str, Sequence[str]]
) -> ModelScores:
    """Losses and answers as numbers with confidence intervals."""
    held_out: dict[str, Scores] = {}
    found: dict[str, Intervals] = {}
    for kind, rows in {**losses, "all": np.concatenate(list(losses.values()))}.items():
        held_out[kind] = mean_loss(*rows.sum(axis=0).tolist())
        bounds = bootstrap(rows, lambda total: mean_loss(*total.tolist()))
        found[kind] = {name: bounds[name] for name in ("bits_per_byte",) if name in bounds}
    judged: dict[str, Scores] = {}
    for kind, texts in answers.items():
        judged[kind], bounds = judge_answers(kind, questions[kind], texts)
        found[kind] |= bounds
    return ModelScores(held_out, judged, found)


def judge_answers(kind: str, examples: Sequence[Example], answers: Sequence[str]) -> tuple[Scores, Intervals]:
    """Score the answers to the first examples that ask by the task's metric; a kind without a task file by chrF."""
    task = load_tasks().get(kind)
    asking = [example for example in examples if not example.is_plain]
    pairs = zip(asking, answers, strict=False)
    answered = [Answered(example.input, example.target, answer) for example, answer in pairs]
    return judge(task.metric if task else "chrf", answered)
