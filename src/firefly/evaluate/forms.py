"""Exact form: does a couplet line mirror the given line, and does a poem have the asked shape?

    couplet("白日依山尽", "黄河入海流")   same_length, no_shared_character, mirrored → well_formed
    poem(reference, answer)              num_lines, line_lengths, … → well_formed

Only Chinese characters count: punctuation, spaces and line breaks around them never change a verdict. Tone and
rhyme are not judged here.
"""

from __future__ import annotations

import re
from functools import cache

from firefly.data.tasks import load_tasks

_CHINESE = "〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LINE_END = re.compile(r"[，。！？；：、,.!?;:\s]+")
_RUN = re.compile(f"[{_CHINESE}，、；]+")
FORMS = {(5,) * 4: "五言绝句", (7,) * 4: "七言绝句", (5,) * 8: "五言律诗", (7,) * 8: "七言律诗"}
"""Lengths of the lines of each regulated form."""

Checks = dict[str, float]
"""Named results: a check is 0 or 1, a share lies between."""


def characters(text: str) -> str:
    """The Chinese characters of a text, everything else left out."""
    return re.sub(f"[^{_CHINESE}]", "", text)


def verse_lines(text: str) -> list[str]:
    """The lines of a poem, as Chinese characters alone; a punctuation mark or a line break ends a line."""
    return [line for part in _LINE_END.split(text) if (line := characters(part))]


def couplet(given: str, answer: str) -> Checks:
    """Check an answer against the line it was given.

    `mirrored`: characters recur at the same positions in both lines, and nowhere else. `no_shared_character`:
    no character of the given line stands in the answer.
    """
    first, second = characters(given), characters(answer)
    checks = {
        "same_length": len(first) == len(second) > 0,
        "no_shared_character": bool(second) and not set(first) & set(second),
        "mirrored": _recurrences(first) == _recurrences(second),
    }
    return _verdict(checks)


def poem(reference: str, answer: str) -> Checks:
    """Check a poem against the form that was asked for: number and lengths of the lines of `reference`.

    `repeated_characters` is the share of characters that stand earlier in the poem already; it is reported and
    not judged, as good poems repeat some.
    """
    asked, lengths = line_lengths(reference), line_lengths(answer)
    lines, text = verse_lines(answer), characters(answer)
    checks = {
        "num_lines": len(lengths) == len(asked),
        "line_lengths": lengths == asked,
        "equal_lengths": bool(lengths)
        and (len(set(lengths)) == 1 or lengths == asked),  # 词 has uneven lines
        "no_repeated_line": bool(lines) and len(set(lines)) == len(lines),
    }
    return _verdict(checks) | {"repeated_characters": 1 - len(set(text)) / len(text) if text else 0.0}


def line_lengths(text: str) -> tuple[int, ...]:
    """Characters in each line of a poem; `FORMS` has the name of the regulated forms."""
    return tuple(map(len, verse_lines(text)))


def given_line(question: str, reference: str) -> str | None:
    """The couplet line inside a question: where the task's templates put it, else by its shape.

    A question in foreign words is searched for the last run of characters with the segment lengths of
    `reference`; None when there is no such run.
    """
    for pattern in _couplet_patterns():
        if match := pattern.fullmatch(question):
            return match[1]
    shape = line_lengths(reference)
    runs = [run for run in _RUN.findall(question) if line_lengths(run) == shape]
    return runs[-1] if runs else None


@cache
def _couplet_patterns() -> list[re.Pattern[str]]:
    """Every template of the task Couplet as a pattern whose first group is the given line."""
    tasks = [task for task in load_tasks().values() if task.metric == "couplet"]
    templates = [text for task in tasks for way in task.directions for text in way.templates]
    return [re.compile(re.sub(r"\\{\w+\\}", "(.+)", re.escape(text), count=1)) for text in templates]


def _recurrences(line: str) -> list[int]:
    """For each position, where its character stood first: equal lists mean equal repetition."""
    return [line.index(character) for character in line]


def _verdict(checks: dict[str, bool]) -> Checks:
    return {"well_formed": float(all(checks.values())), **{name: float(ok) for name, ok in checks.items()}}
