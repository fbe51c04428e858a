"""Rhyme books: which tones and which rhyme groups a character has.

    tones("看")                     {平, 仄}: both 寒 and 翰, so it fits either
    tones("国")                     {仄}: 入声十三职, where modern Mandarin has a level tone
    tones("国", "xinyun")           {平}
    rhyme_of(["中", "风", "空"])    {"上平一东"}

`pingshui` is 平水韵 with its 106 groups, the measure of classical verse; `xinyun` is 中华新韵 with its 14, the measure
of verse in modern Mandarin. Simplified and traditional forms are in both. A simplified character has the readings of
every traditional one that it stands for. A character that 平水韵 lacks has its modern tones and rhymes with nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Literal

Book = Literal["pingshui", "xinyun"]
Tone = Literal["平", "仄"]
BOTH: frozenset[Tone] = frozenset(("平", "仄"))

_FOLDER = Path(__file__).parent / "books"
_NEIGHBOURS = (
    "上平一东 上平二冬", "上平三江 下平七阳", "上平四支 上平五微 上平八齐", "上平六鱼 上平七虞",
    "上平九佳 上平十灰", "上平九佳 下平六麻", "上平十一真 上平十二文 上平十三元", "上平十三元 上平十四寒",
    "上平十四寒 上平十五删 下平一先", "上平十三元 下平一先", "下平二萧 下平三肴 下平四豪", "下平八庚 下平九青",
    "下平九青 下平十蒸", "下平八庚 下平十蒸", "下平十三覃 下平十四盐 下平十五咸",
)  # fmt: skip


def groups(character: str, book: Book = "pingshui") -> frozenset[str]:
    """The rhyme groups of a character, such as 上平一东 or 八寒仄; none when the book lacks it."""
    return _book(book).get(character, frozenset())


def tone_of(group: str) -> Tone:
    """The tone of a rhyme group: 上平 and 下平 are level, 上 去 入 oblique; 新韵 says so in the group's name."""
    return "平" if group[1] == "平" or group[-1] == "平" else "仄"


@cache
def tones(character: str, book: Book = "pingshui") -> frozenset[Tone]:
    """The tones that a character can have; both when no book knows it."""
    known = groups(character, book) or groups(character, "xinyun")
    return frozenset(map(tone_of, known)) or BOTH


def rhyme_of(characters: Iterable[str], book: Book = "pingshui") -> frozenset[str]:
    """The rhyme groups that all characters share."""
    shared = [groups(character, book) for character in characters]
    return frozenset.intersection(*shared) if shared else frozenset()


def neighbours(group: str) -> frozenset[str]:
    """The group with those near enough for a first line to borrow its rhyme from (邻韵)."""
    near = (row.split() for row in _NEIGHBOURS)
    return frozenset([group]).union(*(row for row in near if group in row))


@cache
def _book(name: Book) -> dict[str, frozenset[str]]:
    """Character → its groups."""
    found: dict[str, set[str]] = {}
    for line in (_FOLDER / f"{name}.txt").read_text("utf-8").splitlines():
        group, characters = line.split()
        for character in characters:
            found.setdefault(character, set()).add(group)
    return {character: frozenset(names) for character, names in found.items()}
