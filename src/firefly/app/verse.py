"""`firefly verse`: decide what a text is, judge it, and show the judgement in colour.

analyse("白日依山尽，黄河入海流。…")           a poem
analyse("无边落木萧萧下，不尽长江滚滚来")      two lines, or two halves of the same shape: a couplet
analyse("…", tune="浣溪沙")                    a lyric (词)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import typer

from firefly.errors import InputError
from firefly.evaluate.forms import FORMS, line_lengths, verse_lines
from firefly.evaluate.rhyme import Book
from firefly.evaluate.tunes import Lyric, judge_lyric, pattern_length
from firefly.evaluate.verse import Couplet, Poem, acrostic, judge_couplet, judge_poem

Kind = Literal["poem", "couplet", "lyric"]
_BOOKS = {"pingshui": "平水韵", "xinyun": "中华新韵"}


@dataclass(frozen=True)
class VerseResult:
    """A judgement: of a poem, a couplet or a lyric; `acrostic_right` is None when no acrostic was asked for."""

    kind: Kind
    verse: Poem | Couplet | Lyric
    acrostic: str
    acrostic_right: bool | None


def analyse(
    text: str,
    *,
    kind: Literal["poem", "couplet"] | None = None,
    book: Book = "pingshui",
    tune: str | None = None,
    hidden: str | None = None,
    parallel: bool = False,
) -> VerseResult:
    """Judge a text as what it is, or as the `kind` it is said to be; `hidden` are the characters that should head
    the lines (藏头).

    Raises `InputError` for a text without verse, an unknown tune, and for `parallel` without jieba.
    """
    if not verse_lines(text):
        raise InputError(f"{text!r} holds no Chinese verse; give a poem, a couplet or a lyric.")
    verse: Poem | Couplet | Lyric
    if tune is not None:
        kind_found: Kind = "lyric"
        verse = judge_lyric(text, tune)
    elif (kind or _kind(text)) == "couplet":
        kind_found = "couplet"
        verse = judge_couplet(*_halves(text), book, parallel)
    else:
        kind_found = "poem"
        verse = judge_poem(text, book, parallel)
    first = acrostic(text)
    return VerseResult(
        kind_found, verse, first, None if hidden is None else first == "".join(verse_lines(hidden))
    )


def _kind(text: str) -> Kind:
    lengths = line_lengths(text)
    half = len(lengths) // 2
    same_halves = len(lengths) % 2 == 0 and lengths[:half] == lengths[half:] and len(set(lengths)) > 1
    return "couplet" if len(lengths) == 2 or (same_halves and lengths not in FORMS) else "poem"


def _halves(text: str) -> tuple[str, str]:
    lines = verse_lines(text)
    if len(lines) % 2:
        raise InputError(f"{text!r} has {len(lines)} line(s); a couplet has two, each of as many phrases.")
    half = len(lines) // 2
    return "，".join(lines[:half]), "，".join(lines[half:])


def describe(result: VerseResult) -> list[str]:
    """A judgement as lines for a terminal: 平 in blue, 仄 in yellow, either in grey, what is wrong in red."""
    match result.verse:
        case Poem() as poem:
            shown = _poem(poem)
        case Couplet() as couplet:
            shown = _couplet(couplet)
        case lyric:
            shown = _lyric(lyric)
    if result.acrostic_right is not None:
        shown.append(f"{_mark(result.acrostic_right)} 藏头 {result.acrostic}")
    return shown


def _poem(poem: Poem) -> list[str]:
    wrong = {(fault.line, fault.position): fault.name for fault in poem.faults}
    shown = [f"{poem.form or '古体或杂言'} · {_BOOKS[poem.book]}"]
    for number, line in enumerate(poem.lines, 1):
        marks = {position: name for (row, position), name in wrong.items() if row == number}
        notes = [line.licence, *(f"{name} ({position})" for position, name in sorted(marks.items()))]
        shown.append("  ".join([_marked(line.text, line.tones, set(marks)), *filter(None, notes)]))
    if poem.form:
        shown.append(f"{_mark(poem.regulated)} 平仄粘对")
    shown.append(f"{_mark(poem.rhymed)} 押韵 {poem.rhyme}".rstrip())
    return shown + [f"  第 {number} 联词性相对 {share:.0%}" for number, share in poem.parallel.items()]


def _couplet(couplet: Couplet) -> list[str]:
    checks = {
        "字数相等": couplet.same_length,
        "没有同字": couplet.no_shared_character,
        "重字相应": couplet.mirrored,
        "仄起平收": couplet.closing_tones,
    }
    opposed = f"{sum(couplet.opposed)}/{len(couplet.opposed)} 双数位平仄相对"
    return [
        f"对联 · {_BOOKS[couplet.book]}",
        *(_marked(line.text, line.tones, set()) for line in (couplet.first, couplet.second)),
        *(f"{_mark(passed)} {name}" for name, passed in checks.items()),
        f"{_mark(all(couplet.opposed))} {opposed}",
        *([] if couplet.parallel is None else [f"  词性相对 {couplet.parallel:.0%}"]),
    ]


def _lyric(lyric: Lyric) -> list[str]:
    shown = [f"{lyric.tune} · 词林正韵"]
    for number, line in enumerate(lyric.lines, 1):
        wrong = {place for row, place in lyric.off if row == number}
        wanted = lyric.pattern[number - 1] if lyric.well_formed else ""
        shown.append(_marked(line, "", wrong) + f"  {wanted}".rstrip())
    if not lyric.well_formed:
        wanted = " ".join(str(length) for length in map(pattern_length, lyric.pattern))
        return [*shown, f"{_mark(False)} 句式 {wanted}"]
    return [
        *shown,
        f"{_mark(True)} 句式",
        f"{_mark(not lyric.off)} 平仄 {lyric.tones:.0%}",
        f"{_mark(lyric.rhymed)} 押韵",
    ]


def _marked(text: str, tones: str, wrong: set[int]) -> str:
    """A line in the colours of its tones, and the tones as signs beside it: － level, ｜ oblique, ＋ either."""
    colours = {"平": "blue", "仄": "yellow", "中": "bright_black"}
    signs = {"平": "－", "仄": "｜", "中": "＋"}
    shown = "".join(
        typer.style(char, fg="red", bold=True) if place in wrong else typer.style(char, fg=colours.get(tone))
        for place, (char, tone) in enumerate(zip(text, tones or " " * len(text), strict=True), 1)
    )
    return shown + (f"  {''.join(signs[tone] for tone in tones)}" if tones else "")


def _mark(passed: bool) -> str:
    return typer.style("✓", fg="green") if passed else typer.style("✗", fg="red")
