"""What an evaluation finds out: scores by model and task, and sample answers side by side."""

from __future__ import annotations

from dataclasses import dataclass

from firefly.evaluate.metrics import Scores


@dataclass(frozen=True)
class Sample:
    """One held-out question, its reference, and the answer of each model by name."""

    kind: str
    question: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class ModelScores:
    """What one model reached on held-out data.

    `held_out`: kind (and `all`) → `loss` in nats a token, `bits_per_byte` of the learned text.
    `answers`: kind → numbers that judge its generated answers, the task's headline first.
    """

    held_out: dict[str, dict[str, float]]
    answers: dict[str, Scores]


@dataclass(frozen=True)
class EvaluateResult:
    """What was measured, by model; JSON-able. `report` is the HTML page."""

    models: dict[str, ModelScores]
    samples: list[Sample]
    report: str
