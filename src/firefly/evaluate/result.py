"""What an evaluation finds out: scores with their confidence intervals by model and task, and sample answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from firefly.evaluate.metrics import Intervals, Scores


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
    `intervals`: kind → the 95 % confidence interval of `bits_per_byte` and of the answers' numbers.
    """

    held_out: dict[str, Scores]
    answers: dict[str, Scores]
    intervals: dict[str, Intervals]


@dataclass(frozen=True)
class EvaluateResult:
    """What was measured, by model; JSON-able.

    `questions`: kind → how many were answered. `same_answers`: for each model but the first, how many answers equal
    those of the model before it. `samples`: the first few of each kind. `report` is the HTML page.
    """

    models: dict[str, ModelScores]
    questions: dict[str, int]
    same_answers: dict[str, int]
    samples: list[Sample]
    report: str

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EvaluateResult:
        """The result that `dataclasses.asdict` made `value` of."""
        models = {name: ModelScores(**scores) for name, scores in value["models"].items()}
        samples = [Sample(**sample) for sample in value["samples"]]
        return cls(**value | {"models": models, "samples": samples})
