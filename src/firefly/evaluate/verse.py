"""A judge of classical verse: tonal patterns (平仄), 粘对 and rhyme of poems, and the rules of couplets.

    poem = judge_poem("白日依山尽，黄河入海流。欲穷千里目，更上一层楼。")
    poem.form, poem.rhyme, poem.regulated        五言绝句, 下平十一尤, True

    judge_couplet("无边落木萧萧下", "不尽长江滚滚来").closing_tones      True

A regulated poem repeats four kinds of line. In five characters (seven put two more in front, of the other tone):

    A 仄仄平平仄   B 平平仄仄平   C 平平平仄仄   D 仄仄仄平平

Within a couplet the second characters are opposed (对), between couplets they agree (粘); even lines close level and
rhyme, the other ones oblique, the first as it likes. `_PATTERNS` lists what each kind may become by the usual licences
and rescues (拗救), after 王力《诗词格律》. A character with two readings takes the one that fits. The verdict is on the
whole poem: single positions are right in five lines of six even when verse is shuffled.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from firefly.errors import InputError
from firefly.evaluate.forms import FORMS, characters, verse_lines
from firefly.evaluate.rhyme import BOTH, Book, neighbours, rhyme_of, tone_of, tones

# What a kind of line may be, 中 standing for either tone, and the name of the licence it takes.
_PATTERNS: dict[str, list[tuple[str, str]]] = {
    "A": [("中仄中平仄", "")],
    "B": [("平平中仄平", ""), ("仄平平仄平", "孤平拗救")],
    "C": [("中平平仄仄", ""), ("中平仄平仄", "特拗"), ("平平仄仄仄", "小拗")],
    "D": [("中仄仄平平", "")],
}
# Breaches that have a name: the pattern, the name, the character that is wrong. That of A is no breach but the licence
# 大拗 when the third character of the next line is level.
_BREACHES = {
    "A": ("中仄中仄仄", "拗未救", 4),
    "B": ("仄平仄仄平", "孤平", 1),
    "D": ("中仄平平平", "三平尾", 3),
}
_OPENS_OBLIQUE = "AD"  # kinds whose second character is oblique
_LEVEL_CLOSE, _OBLIQUE_CLOSE = "BD", "AC"


@dataclass(frozen=True)
class Fault:
    """One breach of the rules: line and character, counted from 1, and its name."""

    line: int
    position: int
    name: str


@dataclass(frozen=True)
class Line:
    """A line, its tones, the pattern it was held to (both with 中 for either), and the licence that it takes.

    `pattern` is "" in a poem without a regulated form.
    """

    text: str
    tones: str
    pattern: str
    licence: str


@dataclass(frozen=True)
class Poem:
    """What was found out about a poem.

    `form` and `rhyme`: the regulated form and the group that the even lines share, "" when there is none.
    `rhymed`: there is one, and a first line that closes level rhymes too, or nearly (邻韵).
    `regulated`: a regulated form without a tonal fault. `faults`: those of tone, then those of rhyme.
    `parallel`: by couplet number, the share of characters with the same part of speech; only when asked for.
    """

    form: str
    book: Book
    lines: list[Line]
    rhyme: str
    rhymed: bool
    regulated: bool
    faults: list[Fault]
    parallel: dict[int, float]


@dataclass(frozen=True)
class Couplet:
    """What was found out about a couplet.

    `opposed`: at each even position of each phrase of the first line, whether the second has the opposite tone.
    `closing_tones`: the first line closes oblique and the second level. `mirrored`: characters recur at the same
    positions in both lines, and nowhere else. `no_shared_character`: no character stands in both. `parallel`: the share
    of characters with the same part of speech; only when asked for.
    """

    first: Line
    second: Line
    book: Book
    same_length: bool
    no_shared_character: bool
    mirrored: bool
    closing_tones: bool
    opposed: list[bool]
    parallel: float | None

    @property
    def well_formed(self) -> bool:
        """Right in shape; tones aside."""
        return self.same_length and self.no_shared_character and self.mirrored


def judge_poem(text: str, book: Book = "pingshui", parallel: bool = False) -> Poem:
    """Judge a poem; tonal patterns where it is a 绝句 or 律诗 of five or seven characters a line.

    Raises `InputError` for less than two lines, and for `parallel` without jieba.
    """
    lines = verse_lines(text)
    if len(lines) < 2:
        raise InputError(
            f"{text!r} is no poem: it needs two lines or more, with punctuation or line breaks between."
        )
    form = FORMS.get(tuple(map(len, lines)), "")
    rhyme, rhyme_faults = _judge_rhyme(lines, book)
    shown, tone_faults = _judge_tones(lines, book) if form else ([_unheld(line, book) for line in lines], [])
    pairs = enumerate(zip(lines[::2], lines[1::2], strict=False), 1)
    return Poem(
        form=form,
        book=book,
        lines=shown,
        rhyme=rhyme,
        rhymed=not rhyme_faults,
        regulated=bool(form) and not tone_faults,
        faults=tone_faults + rhyme_faults,
        parallel={number: parallelism(*pair) for number, pair in pairs} if parallel else {},
    )


def judge_couplet(first: str, second: str, book: Book = "pingshui", parallel: bool = False) -> Couplet:
    """Judge the second line of a couplet against the first; a longer one has phrases, parted by punctuation.

    Raises `InputError` for `parallel` without jieba.
    """
    phrases = verse_lines(first)
    one, two = _unheld(characters(first), book), _unheld(characters(second), book)
    ordinals = [number for phrase in phrases for number in range(1, len(phrase) + 1)]
    even = [place for place, number in enumerate(ordinals) if number % 2 == 0]
    return Couplet(
        first=one,
        second=two,
        book=book,
        same_length=len(one.text) == len(two.text) > 0,
        no_shared_character=bool(two.text) and not set(one.text) & set(two.text),
        mirrored=_recurrences(one.text) == _recurrences(two.text),
        closing_tones=one.tones[-1:] in ("仄", "中") and two.tones[-1:] in ("平", "中"),
        opposed=[
            place < len(two.text) and (one.tones[place] == "中" or one.tones[place] != two.tones[place])
            for place in even
        ],
        parallel=parallelism(one.text, two.text) if parallel else None,
    )


def acrostic(text: str) -> str:
    """The first characters of the lines (藏头)."""
    return "".join(line[0] for line in verse_lines(text))


def parallelism(first: str, second: str) -> float:
    """The share of positions whose words have the same part of speech (jieba's tags): a hint, not a rule.

    Raises `InputError` when jieba is missing.
    """
    if importlib.util.find_spec("jieba") is None:
        raise InputError("Parts of speech need jieba; install it with: pip install 'firefly-zh[verse]'.")
    import jieba
    import jieba.posseg

    jieba.setLogLevel("ERROR")
    one: list[str]
    two: list[str]
    one, two = ([flag[0] for word, flag in jieba.posseg.lcut(line) for _ in word] for line in (first, second))
    return sum(a == b for a, b in zip(one, two, strict=False)) / max(len(one), len(two), 1)


class _Fit(NamedTuple):
    """A line held to one kind: its pattern and licence, and what is wrong as (position, name)."""

    kind: str
    pattern: str
    licence: str
    faults: list[tuple[int, str]]


def _judge_tones(lines: Sequence[str], book: Book) -> tuple[list[Line], list[Fault]]:
    """The reading of a regulated poem that breaks the fewest rules, and what it breaks."""
    marked = [_tones(line, book) for line in lines]
    num_oblique = sum(mark[-1] == "仄" for mark in marked[1::2])
    level = num_oblique <= len(lines) // 4  # the closing tone of most even lines
    options = []
    for number, mark in enumerate(marked):
        if number == 0:
            kinds = "ABCD"
        else:
            kinds = _LEVEL_CLOSE if (number % 2 == 1) == level else _OBLIQUE_CLOSE
        rescued = number % 2 == 0 and _fits(marked[number + 1][-3], "平")
        options.append([_fit(mark, kind, rescued) for kind in kinds])

    def cost(fits: Sequence[_Fit]) -> tuple[int, int]:
        """All faults; among equals, better one 失粘 than a line full of wrong tones."""
        num_tonal = sum(len(fit.faults) for fit in fits)
        return num_tonal + len(_joints(fits)), num_tonal

    best = min(product(*options), key=cost)
    shown = [
        Line(line, mark, fit.pattern, fit.licence)
        for line, mark, fit in zip(lines, marked, best, strict=True)
    ]
    tonal = [Fault(number, *fault) for number, fit in enumerate(best, 1) for fault in fit.faults]
    return shown, sorted(tonal + _joints(best), key=lambda fault: (fault.line, fault.position))


def _fit(mark: str, kind: str, rescued: bool) -> _Fit:
    """Hold a line's tones to one kind: the pattern with the fewest faults; a breach with a name before 出律."""
    offset = len(mark) - 5
    head = ("中平" if kind in _OPENS_OBLIQUE else "中仄")[:offset]

    def held(pattern: str, licence: str) -> _Fit:
        pairs = enumerate(zip(mark, head + pattern, strict=True), 1)
        return _Fit(
            kind, head + pattern, licence, [(place, "出律") for place, pair in pairs if not _fits(*pair)]
        )

    fits = [held(pattern, licence) for pattern, licence in _PATTERNS[kind]]
    if kind in _BREACHES:
        pattern, name, position = _BREACHES[kind]
        if kind == "A" and rescued:
            fits.append(held(pattern, "大拗"))
        else:
            wrong = [*held(pattern, "").faults, (offset + position, name)]
            fits.insert(0, _Fit(kind, fits[0].pattern, "", wrong))
    return min(fits, key=lambda fit: len(fit.faults))


def _joints(fits: Sequence[_Fit]) -> list[Fault]:
    """失对 within couplets and 失粘 between them."""
    oblique = [fit.kind in _OPENS_OBLIQUE for fit in fits]
    faults = []
    for number in range(1, len(fits)):
        agree = oblique[number] == oblique[number - 1]
        if agree == (number % 2 == 1):
            faults.append(Fault(number + 1, 2, "失对" if agree else "失粘"))
    return faults


def _judge_rhyme(lines: Sequence[str], book: Book) -> tuple[str, list[Fault]]:
    """The rhyme of the even lines, and faults: 失韵 at every even line, or at a first line that stays out of it."""
    shared = sorted(
        rhyme_of((line[-1] for line in lines[1::2]), book), key=lambda group: (tone_of(group) != "平", group)
    )
    if not shared:
        return "", [Fault(number, len(lines[number - 1]), "失韵") for number in range(2, len(lines) + 1, 2)]
    first = lines[0][-1]
    for rhyme in shared:
        level_close = tone_of(rhyme) == "平" and tones(first, book) == {"平"}
        if not level_close or rhyme_of([first], book) & neighbours(rhyme):
            return rhyme, []
    return shared[0], [Fault(1, len(lines[0]), "失韵")]


def _unheld(line: str, book: Book) -> Line:
    return Line(line, _tones(line, book), "", "")


def _tones(line: str, book: Book) -> str:
    """平, 仄, or 中 for a character that has both."""
    return "".join("中" if (found := tones(char, book)) == BOTH else min(found) for char in line)


def _fits(tone: str, wanted: str) -> bool:
    return tone == wanted or "中" in (tone, wanted)


def _recurrences(line: str) -> list[int]:
    """For each position, where its character stood first: equal lists mean equal repetition."""
    return [line.index(character) for character in line]
