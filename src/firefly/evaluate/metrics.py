"""How answers are judged: a metric takes a task's answers and returns named numbers, higher is better first.

A task's TOML file names its metric; a new metric is one function decorated with `@metric`. The first number a
metric returns is its headline. chrF and BLEU run from 0 to 100 as everywhere, all others from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from firefly.data.tasks import load_tasks
from firefly.errors import InputError, choices
from firefly.evaluate import forms

Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out question with its reference and a model's answer."""

    question: str
    reference: str
    answer: str


Metric = Callable[[Sequence[Answered]], Scores]
METRICS: dict[str, Metric] = {}


def metric(function: Metric) -> Metric:
    """Put a metric into the table under its function's name."""
    METRICS[function.__name__] = function
    return function


def score(name: str, answered: Sequence[Answered]) -> Scores:
    """Judge the answers of one task by its metric, and always by chrF and BLEU; the headline comes first.

    Raises `InputError` with the choices for an unknown metric.
    """
    if name not in METRICS:
        raise InputError(f"Unknown metric '{name}': {choices(name, METRICS)}.")
    return METRICS[name](answered) | chrf(answered) | bleu(answered)


@metric
def chrf(answered: Sequence[Answered]) -> Scores:
    """Character n-gram F-score of the whole set, 0 to 100 (Popović 2015, as sacrebleu computes it)."""
    from sacrebleu import corpus_chrf

    return {"chrf": corpus_chrf(*_columns(answered)).score}


@metric
def bleu(answered: Sequence[Answered]) -> Scores:
    """BLEU of the whole set, 0 to 100, each Chinese character a word (sacrebleu, `tokenize="zh"`)."""
    from sacrebleu import corpus_bleu

    return {"bleu": corpus_bleu(*_columns(answered), tokenize="zh", force=True).score}


@metric
def accuracy(answered: Sequence[Answered]) -> Scores:
    """Share of answers that name the right label and no other.

    The labels are the references, and their rivals: the other answer words of the same direction of a task.
    """
    references = {item.reference.strip() for item in answered}
    ways = [way for task in load_tasks().values() for way in task.directions]
    tables = [set(table.values()) for way in ways for table in way.values.values()]
    labels = references.union(*(table for table in tables if table & references))
    pattern = re.compile("|".join(map(re.escape, sorted(labels, key=len, reverse=True))))
    right = [set(pattern.findall(item.answer)) == {item.reference.strip()} for item in answered]
    return {"accuracy": sum(right) / len(right)}


@metric
def distinct(answered: Sequence[Answered]) -> Scores:
    """Distinct n-grams of characters over all n-grams, for n = 2 and 1 (Li et al. 2016): low when it repeats."""
    texts = ["".join(item.answer.split()) for item in answered]
    shares = {}
    for n in (2, 1):
        grams = [text[start : start + n] for text in texts for start in range(len(text) - n + 1)]
        shares[f"distinct_{n}"] = len(set(grams)) / max(len(grams), 1)
    return shares


@metric
def couplet(answered: Sequence[Answered]) -> Scores:
    """Mean of `forms.couplet` over the questions whose given line is found; nothing when it never is."""
    lines = [(forms.given_line(item.question, item.reference), item.answer) for item in answered]
    return _mean([forms.couplet(given, answer) for given, answer in lines if given is not None])


@metric
def poem(answered: Sequence[Answered]) -> Scores:
    """Mean of `forms.poem` over the questions whose reference has lines; nothing when none has."""
    judged = [item for item in answered if forms.line_lengths(item.reference)]
    return _mean([forms.poem(item.reference, item.answer) for item in judged])


def _mean(rows: Sequence[Scores]) -> Scores:
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


def _columns(answered: Sequence[Answered]) -> tuple[list[str], list[list[str]]]:
    """Answers, and one list of references, as sacrebleu wants them."""
    return [item.answer for item in answered], [[item.reference for item in answered]]
