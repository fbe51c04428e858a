"""Shape of verse: its lines, their lengths, and whether a poem has the shape that was asked for.

Only Chinese characters count: punctuation, spaces and line breaks around them never change a verdict. Tone and
rhyme are judged in `verse`.
"""

from __future__ import annotations

import re

CHINESE = "〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_LINE_END = re.compile(r"[，。！？；：、,.!?;:\s]+")
FORMS = {(5,) * 4: "五言绝句", (7,) * 4: "七言绝句", (5,) * 8: "五言律诗", (7,) * 8: "七言律诗"}
"""Lengths of the lines of each regulated form."""

Checks = dict[str, float]
"""Named results: a check is 0 or 1, a share lies between."""


def characters(text: str) -> str:
    """The Chinese characters of a text, everything else left out."""
    return re.sub(f"[^{CHINESE}]", "", text)


def verse_lines(text: str) -> list[str]:
    """The lines of a poem, as Chinese characters alone; a punctuation mark or a line break ends a line."""
    return [line for part in _LINE_END.split(text) if (line := characters(part))]


def poem(reference: str, answer: str) -> Checks:
    """Check a poem against the form that was asked for: number and lengths of the lines of `reference`.

    Lines may repeat as often as they do in the reference, as some 词 want it.
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
        "no_repeated_line": bool(lines) and _num_repeated(lines) <= _num_repeated(verse_lines(reference)),
    }
    return _verdict(checks) | {"repeated_characters": 1 - len(set(text)) / len(text) if text else 0.0}


def line_lengths(text: str) -> tuple[int, ...]:
    """Characters in each line of a poem; `FORMS` has the name of the regulated forms."""
    return tuple(map(len, verse_lines(text)))


def _num_repeated(lines: list[str]) -> int:
    return len(lines) - len(set(lines))


def _verdict(checks: dict[str, bool]) -> Checks:
    return {"well_formed": float(all(checks.values())), **{name: float(ok) for name, ok in checks.items()}}
