"""Judge the verse in an evaluation, model by model: the table of the README.

    firefly demo
    firefly evaluate out/demo evaluate.generations_per_kind=500
    python tools/verse_table.py out/demo/evaluation

Couplets: the answer has as many characters as the line that was given; its tones are opposed at the even positions (all
of them are counted, so one wrong position costs one position); it closes in the tone opposite to the given line's.
Poems: the form is the one that the question names, or, where it names none, any 绝句 or 律诗 of five or seven
characters that goes on from the given first line and has as many lines as an acrostic asks for; no line comes twice.
A poem rhymes when its even lines share a rhyme of the classical book (平水韵), and so does a first line that closes
level; a poem of a wrong form never does. Tones are those of the same book. Where the first line was given, the poem
begins with it, every character of it.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from firefly.evaluate.answers import given_line
from firefly.evaluate.forms import FORMS, characters, line_lengths, verse_lines
from firefly.evaluate.rhyme import tones
from firefly.evaluate.verse import acrostic, judge_couplet, judge_poem

Counts = dict[str, list[int]]  # measure → [right, all]


def count_couplet(question: str, reference: str, answer: str, counts: Counts) -> None:
    """Add one couplet; an answer that breaks off early has its missing positions wrong."""
    found = given_line(question, line_lengths(reference))
    assert found is not None, question  # every template of the task holds the line
    given, _ = found
    judged = judge_couplet(given, answer)
    closing = characters(reference)[-1:]
    wanted = next(iter(tones(characters(given)[-1]) ^ {"平", "仄"}), None) or min(tones(closing))
    last = characters(answer)[-1:]
    _add(counts, "couplets: equal length", judged.same_length)
    _add(counts, "couplets: even positions with opposite tones", *judged.opposed)
    _add(counts, "couplets: right closing tone", bool(last) and wanted in tones(last))


def count_poem(question: str, reference: str, answer: str, counts: Counts) -> None:
    """Add one poem."""
    right = right_form(question, reference, answer)
    _add(counts, "poems: right form", right)
    judged = judge_poem(answer) if right else None
    _add(counts, "poems: rhyme", judged is not None and judged.rhymed)
    _add(counts, "poems: every tone by the book", judged is not None and judged.regulated)
    first = verse_lines(reference)[0]
    if first in question:
        _add(counts, "poems: the given first line, word for word", verse_lines(answer)[:1] == [first])


def right_form(question: str, reference: str, answer: str) -> bool:
    """Whether a poem has the form that was asked for."""
    lines = verse_lines(answer)
    lengths = tuple(map(len, lines))
    named = [form for form in FORMS.values() if form in question]
    heads, first = acrostic(reference), verse_lines(reference)[0]
    return (
        lengths in FORMS
        and (not named or FORMS[lengths] in named)
        and (heads not in question or len(lines) == len(heads))
        and (first not in question or len(lines[0]) == len(first))
        and len(set(lines)) == len(lines)
    )


def _add(counts: Counts, measure: str, *right: bool) -> None:
    entry = counts.setdefault(measure, [0, 0])
    entry[0] += sum(right)
    entry[1] += len(right)


def table(results: dict[str, Any], answers: Iterable[dict[str, Any]]) -> list[str]:
    """Markdown: a row a measure, a column a model; then bits per byte of every task."""
    judges = {"Couplet": count_couplet, "AncientPoem": count_poem}
    models = list(results["models"])
    by_model: defaultdict[str, Counts] = defaultdict(dict)
    for row in answers:
        if judge := judges.get(row["kind"]):
            for name in models:
                judge(row["question"], row["reference"], row["answers"][name], by_model[name])
    lines = [f"| held out | number | {' | '.join(models)} |", "|---|--:|" + "--:|" * len(models)]
    for measure, (_, number) in by_model[models[0]].items():
        shares = [right / total for right, total in (by_model[name][measure] for name in models)]
        lines.append(f"| {measure} | {number:,} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    for kind in results["models"][models[0]]["held_out"]:
        bits = [results["models"][name]["held_out"][kind]["bits_per_byte"] for name in models]
        change = f" ({bits[-1] / bits[0] - 1:+.0%})"
        lines.append(f"| bits per byte: {kind} | | {' | '.join(f'{value:.3f}' for value in bits)}{change} |")
    return lines


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="what firefly evaluate wrote: results.json, answers.jsonl")
    folder = parser.parse_args().folder
    results = json.loads((folder / "results.json").read_text("utf-8"))
    answers = map(json.loads, (folder / "answers.jsonl").read_text("utf-8").splitlines())
    print("\n".join(table(results, answers)))


if __name__ == "__main__":
    main()
