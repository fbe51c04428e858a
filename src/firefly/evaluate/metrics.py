"""How answers are judged: a metric takes a task's answers and returns named numbers, the headline first.

A task's TOML file names its metric. A metric counts each answer into one row of numbers, and a formula turns the sum of
the rows into scores: so a whole set is scored, and resampled rows give its confidence interval. A new metric is one
`_count_…` function and its formula in `METRICS`. chrF and BLEU run from 0 to 100 as everywhere, all others from 0 to 1.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.tasks import load_tasks
from firefly.errors import InputError, choices
from firefly.evaluate import answers, forms
from firefly.evaluate.verse import judge_couplet, judge_poem

Scores = dict[str, float]
Intervals = dict[str, tuple[float, float]]
"""The 95 % confidence interval of each number, from low to high."""
Rows = Sequence[Sequence[float]] | NDArray[Any]
CHRF_ORDER, CHRF_BETA = 6, 2
BLEU_ORDER = 4
REPEATED = 4


@dataclass(frozen=True, slots=True)
class Answered:
    """One held-out question with its reference and a model's answer."""

    question: str
    reference: str
    answer: str


@dataclass(frozen=True, slots=True)
class Metric:
    """`count`: answers → one row of numbers each. `scores`: the sum of rows → named numbers, {} when nothing counts."""

    count: Callable[[Sequence[Answered]], Rows]
    scores: Callable[[NDArray[Any]], Scores]


def score(name: str, answered: Sequence[Answered]) -> Scores:
    """Judge the answers of one task by its metric, and always by chrF and BLEU; the headline comes first.

    Free writing, judged by `distinct`, is also judged by `repetition`. Raises `InputError` with the choices for an
    unknown metric, and when there is nothing to judge.
    """
    return judge(name, answered, num_resamples=0)[0]


def judge(name: str, answered: Sequence[Answered], num_resamples: int = 1000) -> tuple[Scores, Intervals]:
    """`score`, and the confidence interval of each number."""
    scores: Scores = {}
    found: Intervals = {}
    for one in dict.fromkeys((name, *(["repetition"] if name == "distinct" else []), "chrf", "bleu")):
        rows = _rows(metric(one), answered)
        scores |= metric(one).scores(rows.sum(axis=0))
        found |= bootstrap(rows, metric(one).scores, num_resamples)
    return scores, found


def metric(name: str) -> Metric:
    """The metric of that name; raises `InputError` with the choices for an unknown one."""
    if name not in METRICS:
        raise InputError(f"Unknown metric '{name}': {choices(name, METRICS)}.")
    return METRICS[name]


def bootstrap(
    rows: NDArray[Any],
    scores: Callable[[NDArray[Any]], Scores],
    num_resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Confidence intervals of what `scores` makes of the rows' sum: percentiles over resampled rows (Efron 1979).

    Empty for a single row, such as that of `distinct`: a resample repeats answers, and repetition is what that counts.
    """
    if len(rows) < 2 or not num_resamples:
        return {}
    shares = np.full(len(rows), 1 / len(rows))
    draws = np.random.default_rng(seed).multinomial(len(rows), shares, num_resamples)
    resampled = [scores(total) for total in draws @ rows]
    ends = [50 * (1 - level), 50 * (1 + level)]
    found = {}
    for key in scores(rows.sum(axis=0)):
        low, high = np.percentile([one[key] for one in resampled if key in one], ends)
        found[key] = (float(low), float(high))
    return found


def _rows(judge: Metric, answered: Sequence[Answered]) -> NDArray[Any]:
    if not answered:
        raise InputError("There are no answers to judge.")
    for item in answered:
        if not item.reference.strip():
            raise InputError(
                f"The question {item.question!r} has no reference answer to judge by; give it one."
            )
    return np.asarray(judge.count(answered), dtype=np.float64)


# Labels and sets ------------------------------------------------------------------------------------------------------


def _count_labels(answered: Sequence[Answered]) -> Rows:
    """[right, 1, then for each label: right, predicted, true]; an answer predicts the one label that it names.

    The labels are the references, and their rivals: the other answer words of the same direction of a task.
    """
    references = {item.reference.strip() for item in answered}
    ways = [way for task in load_tasks().values() for way in task.directions]
    tables = [set(table.values()) for way in ways for table in way.values.values()]
    labels = sorted(
        references.union(*(table for table in tables if table & references)), key=len, reverse=True
    )
    pattern = re.compile("|".join(map(re.escape, labels)))
    rows = []
    for item in answered:
        named, true = set(pattern.findall(item.answer)), item.reference.strip()
        predicted = next(iter(named)) if len(named) == 1 else None
        each = [(label == predicted == true, label == predicted, label == true) for label in labels]
        rows.append([float(predicted == true), 1.0, *(float(flag) for flags in each for flag in flags)])
    return rows


def _accuracy(total: NDArray[Any]) -> Scores:
    """Accuracy, and F1 averaged over the labels that references have (macro)."""
    right, predicted, true = total[2:].reshape(-1, 3).T
    per_label = 2 * right / np.maximum(predicted + true, 1)
    return {"accuracy": float(total[0] / total[1]), "macro_f1": float(per_label[true > 0].mean())}


def _sets(parse: Callable[[Answered], tuple[set[Any], set[Any]]]) -> Callable[[Sequence[Answered]], Rows]:
    """[right, given, wanted, exactly right, 1, F1 of this answer] for the sets (wanted, given) of each answer."""

    def count(answered: Sequence[Answered]) -> Rows:
        rows = []
        for wanted, given in map(parse, answered):
            right = len(wanted & given)
            alone = 2 * right / (len(wanted) + len(given)) if wanted or given else 1.0
            rows.append([right, len(given), len(wanted), wanted == given, 1, alone])
        return rows

    return count


def _micro_f1(name: str) -> Callable[[NDArray[Any]], Scores]:
    """F1, precision and recall over all members of all sets."""

    def scores(total: NDArray[Any]) -> Scores:
        right, given, wanted, exact, number, _ = map(float, total)
        return {
            name: 2 * right / (given + wanted) if given + wanted else 1.0,
            "precision": right / given if given else 0.0,
            "recall": right / wanted if wanted else 0.0,
            "exact_match": exact / number,
        }

    return scores


def _keyword_f1(total: NDArray[Any]) -> Scores:
    """F1 averaged over the texts."""
    return {"keyword_f1": float(total[5] / total[4]), "exact_match": float(total[3] / total[4])}


def _count_spans(answered: Sequence[Answered]) -> Rows:
    """[F1 of characters, exactly equal, 1]: as SQuAD's (Rajpurkar et al. 2016), a character a word.

    Where the reference is a choice's letter, an answer is right when that is the one capital letter that it has.
    """
    rows: list[list[float]] = []
    for item in answered:
        if re.fullmatch("[A-Z]", item.reference.strip()):
            exact = set(re.findall("[A-Z]", item.answer)) == {item.reference.strip()}
            rows.append([exact, exact, 1])
        else:
            wanted, given = answers.words(item.reference), answers.words(item.answer)
            rows.append([_overlap_f1(Counter(wanted), Counter(given)), wanted == given, 1])
    return rows


def _span_f1(total: NDArray[Any]) -> Scores:
    return {"span_f1": float(total[0] / total[2]), "exact_match": float(total[1] / total[2])}


# Overlap of n-grams ---------------------------------------------------------------------------------------------------


def _count_chrf(answered: Sequence[Answered]) -> Rows:
    """[n-grams of the answer, of the reference, in both] for n = 1 … 6, white space left out."""
    rows = []
    for item in answered:
        answer, reference = "".join(item.answer.split()), "".join(item.reference.split())
        row: list[float] = []
        for n in range(1, CHRF_ORDER + 1):
            given, wanted = _ngrams(answer, n), _ngrams(reference, n)
            # As sacrebleu: a reference too short for any n-gram takes no precision from the rest.
            row += [given.total() if wanted else 0, wanted.total(), (given & wanted).total()]
        rows.append(row)
    return rows


def _chrf(total: NDArray[Any]) -> Scores:
    """Character n-gram F-score with β = 2, 0 to 100 (Popović 2015, as sacrebleu computes it)."""
    given, wanted, both = total.reshape(-1, 3).T
    there = (given > 0) & (wanted > 0)
    if not there.any():
        return {"chrf": 0.0}
    precision, recall = (both[there] / given[there]).mean(), (both[there] / wanted[there]).mean()
    weight = CHRF_BETA**2
    below = weight * precision + recall
    return {"chrf": float(100 * (1 + weight) * precision * recall / below) if below else 0.0}


def _count_bleu(answered: Sequence[Answered]) -> Rows:
    """sacrebleu's counts with each Chinese character a word: [right, all] by n-gram, length, reference's length."""
    from sacrebleu import BLEU

    judge = BLEU(tokenize="zh", effective_order=True)
    rows = []
    for item in answered:
        found = judge.sentence_score(item.answer, [item.reference])
        rows.append([*found.counts, *found.totals, found.sys_len, found.ref_len])
    return rows


def _bleu(total: NDArray[Any]) -> Scores:
    """BLEU of the whole set, 0 to 100; short answers are judged by the n-grams that they have (effective order)."""
    from sacrebleu import BLEU

    counts = [round(value) for value in total]
    right, given, (length, wanted) = counts[:BLEU_ORDER], counts[BLEU_ORDER:-2], counts[-2:]
    return {"bleu": BLEU.compute_bleu(right, given, length, wanted, "exp", effective_order=True).score}


def _count_rouge(answered: Sequence[Answered]) -> Rows:
    """[ROUGE-L, ROUGE-1, ROUGE-2, 1]: F1 of the longest common subsequence, of characters, of pairs (Lin 2004)."""
    rows: list[list[float]] = []
    for item in answered:
        wanted, given = "".join(item.reference.split()), "".join(item.answer.split())
        both = len(wanted) + len(given)
        longest = 2 * _common_subsequence(wanted, given) / both if both else 1.0
        grams = [_overlap_f1(_ngrams(wanted, n), _ngrams(given, n)) for n in (1, 2)]
        rows.append([longest, *grams, 1])
    return rows


def _rouge(total: NDArray[Any]) -> Scores:
    *values, number = map(float, total)
    return {
        name: value / number for name, value in zip(("rouge_l", "rouge_1", "rouge_2"), values, strict=True)
    }


def _count_distinct(answered: Sequence[Answered]) -> Rows:
    """One row for all answers together: [different pairs, pairs, different characters, characters]."""
    texts = ["".join(item.answer.split()) for item in answered]
    row = []
    for n in (2, 1):
        grams: Counter[str] = Counter()
        for text in texts:
            grams.update(_ngrams(text, n))
        row += [len(grams), grams.total()]
    return [row]


def _distinct(total: NDArray[Any]) -> Scores:
    """Distinct n-grams of characters over all n-grams, for n = 2 and 1 (Li et al. 2016): low when it repeats."""
    pairs, all_pairs, singles, all_singles = total
    return {
        "distinct_2": float(pairs / max(all_pairs, 1)),
        "distinct_1": float(singles / max(all_singles, 1)),
    }


def _count_repetition(answered: Sequence[Answered]) -> Rows:
    """[n-grams that stand earlier in the same answer, n-grams] of `REPEATED` characters."""
    texts = ["".join(item.answer.split()) for item in answered]
    grams = [_ngrams(text, REPEATED) for text in texts]
    return [[each.total() - len(each), each.total()] for each in grams]


def _repetition(total: NDArray[Any]) -> Scores:
    """The share of n-grams that repeat one of the same answer (Welleck et al. 2020): high when it goes in circles."""
    return {"repetition": float(total[0] / max(total[1], 1))}


def _ngrams(text: Sequence[str], n: int) -> Counter[Any]:
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def _overlap_f1(wanted: Counter[Any], given: Counter[Any]) -> float:
    both = wanted.total() + given.total()
    return 2 * (wanted & given).total() / both if both else 1.0


def _common_subsequence(one: str, other: str) -> int:
    """Length of the longest common subsequence; a bit a character of `one` (Hyyrö 2004)."""
    places: dict[str, int] = {}
    for number, char in enumerate(one):
        places[char] = places.get(char, 0) | 1 << number
    everything = (1 << len(one)) - 1
    free = everything
    for char in other:
        matched = free & places.get(char, 0)
        free = (free + matched | free - matched) & everything
    return len(one) - free.bit_count()


# Verse ----------------------------------------------------------------------------------------------------------------

_COUPLET_CHECKS = ("same_length", "no_shared_character", "mirrored", "closing_tones")


def _count_couplets(answered: Sequence[Answered]) -> Rows:
    """[well formed, the checks, even positions opposed, even positions, 1]; zeros where no given line is found."""
    rows = []
    for item in answered:
        line = answers.given_line(item.question, forms.line_lengths(item.reference))
        if line is None:
            rows.append([0.0] * (len(_COUPLET_CHECKS) + 4))
            continue
        given, is_second = line
        found = judge_couplet(given, item.answer)
        if is_second:  # the rule of the closing tones tells the lines apart; all others are mutual
            found = replace(found, closing_tones=judge_couplet(item.answer, given).closing_tones)
        checks = [found.well_formed, *(getattr(found, name) for name in _COUPLET_CHECKS)]
        rows.append([*map(float, checks), sum(found.opposed), len(found.opposed), 1])
    return rows


def _couplet(total: NDArray[Any]) -> Scores:
    """Shares of couplets that pass `verse.judge_couplet`'s checks, and of even positions with opposite tones."""
    *checks, opposed, places, number = map(float, total)
    if not number:
        return {}
    names = ("well_formed", *_COUPLET_CHECKS)
    shares = {name: value / number for name, value in zip(names, checks, strict=True)}
    return shares | {"opposed_tones": opposed / places if places else 0.0}


_POEM_CHECKS = ("well_formed", "num_lines", "line_lengths", "equal_lengths", "no_repeated_line")


def _count_poems(answered: Sequence[Answered]) -> Rows:
    """[checks of `forms.poem`, repeated characters, 1], then where a regulated form is asked [rhymed, regulated, 1].

    Zeros where the reference has no lines.
    """
    rows = []
    for item in answered:
        asked, lengths = forms.line_lengths(item.reference), forms.line_lengths(item.answer)
        shape = forms.poem(item.reference, item.answer)
        row = [shape[name] for name in (*_POEM_CHECKS, "repeated_characters")] + [1.0]
        if asked not in forms.FORMS:
            row += [0.0, 0.0, 0.0]
        elif lengths != asked:
            row += [0.0, 0.0, 1.0]
        else:
            found = judge_poem(item.answer)
            row += [float(found.rhymed), float(found.regulated), 1.0]
        rows.append(row if asked else [0.0] * len(row))
    return rows


def _poem(total: NDArray[Any]) -> Scores:
    """Shares of poems with the asked shape; of those asked for in a regulated form, that rhyme, that keep its tones."""
    *checks, number, rhymed, regulated, num_regulated = map(float, total)
    if not number:
        return {}
    names = (*_POEM_CHECKS, "repeated_characters")
    scores = {name: value / number for name, value in zip(names, checks, strict=True)}
    tonal = (
        {"rhymed": rhymed / num_regulated, "regulated": regulated / num_regulated} if num_regulated else {}
    )
    return {"well_formed": scores.pop("well_formed"), **tonal, **scores}


# The table ------------------------------------------------------------------------------------------------------------


def _pairs(parse: Callable[[str], set[Any]]) -> Callable[[Answered], tuple[set[Any], set[Any]]]:
    """What the reference and the answer parse to."""
    return lambda item: (parse(item.reference), parse(item.answer))


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_count_labels, _accuracy),
    "entity_f1": Metric(_sets(_pairs(answers.entities)), _micro_f1("entity_f1")),
    "keyword_f1": Metric(_sets(_pairs(answers.keywords)), _keyword_f1),
    "span_f1": Metric(_count_spans, _span_f1),
    "correction_f1": Metric(
        _sets(lambda item: answers.corrections(item.question, item.reference, item.answer)),
        _micro_f1("correction_f1"),
    ),
    "bleu": Metric(_count_bleu, _bleu),
    "chrf": Metric(_count_chrf, _chrf),
    "rouge": Metric(_count_rouge, _rouge),
    "couplet": Metric(_count_couplets, _couplet),
    "poem": Metric(_count_poems, _poem),
    "distinct": Metric(_count_distinct, _distinct),
    "repetition": Metric(_count_repetition, _repetition),
}
