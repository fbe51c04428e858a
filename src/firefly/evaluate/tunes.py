"""词牌: does a lyric keep the shape, the tones and the rhymes of the tune that it is set to?

    judge_lyric("红藕香残玉簟秋。轻解罗裳，独上兰舟。……", "一剪梅").well_formed

The table of tunes, `books/tunes.txt`, was counted over the 词 of the Song by tools/make_tunes.py: a row holds a shape
of a tune, line by line, 中 for either tone and a letter where a line rhymes. 词 rhyme by the 19 parts of 词林正韵, here
as unions of the groups of 平水韵; groups that are divided between two parts (佳, 灰, 元 and their kin) count in both.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from firefly.errors import InputError, choices
from firefly.evaluate.forms import verse_lines
from firefly.evaluate.rhyme import groups, tones

_TABLE = Path(__file__).parent / "books" / "tunes.txt"
_PARTS = (
    "东冬董肿送宋", "江阳讲养绛漾", "支微齐灰纸尾荠贿寘未霁泰队", "鱼虞语麌御遇", "佳灰蟹贿泰卦队",
    "真文元轸吻阮震问愿", "元寒删先阮旱潸铣愿翰谏霰", "萧肴豪筱巧皓啸效号", "歌哿个", "佳麻马卦祃",
    "庚青蒸梗迥敬径", "尤有宥", "侵寝沁", "覃盐咸感琰豏勘艳陷",
    "屋沃", "觉药", "质陌锡职缉物", "物月曷黠屑叶", "合洽",
)  # fmt: skip
_LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Lyric:
    """What was found out about a lyric, held to the nearest shape of its tune.

    `well_formed`: every line has its length. The others are False or 0 without that. `tones`: the share of bound
    positions with the right tone. `rhymed`: all lines that should rhyme do. `off`: (line, character), from 1, of the
    wrong tones.
    """

    tune: str
    lines: list[str]
    pattern: list[str]
    well_formed: bool
    tones: float
    rhymed: bool
    off: list[tuple[int, int]]


def judge_lyric(text: str, tune: str) -> Lyric:
    """Judge a lyric by its tune; raises `InputError` with the nearest names for an unknown tune."""
    if tune not in tunes():
        raise InputError(f"Unknown tune '{tune}': {choices(tune, tunes())}.")
    lines = verse_lines(text)
    for shape in tunes()[tune]:
        if [pattern_length(line) for line in shape] == [len(line) for line in lines]:
            return _held(tune, lines, shape)
    return Lyric(tune, lines, tunes()[tune][0], False, 0.0, False, [])


def pattern_length(pattern: str) -> int:
    """Characters in a line of a shape, without the letter of its rhyme."""
    return len(pattern.rstrip(_LETTERS))


def _held(tune: str, lines: list[str], shape: list[str]) -> Lyric:
    """Judge lines whose lengths are those of the shape."""
    num_bound = 0
    off: list[tuple[int, int]] = []
    rhymes: dict[str, list[frozenset[int]]] = {}
    for number, (line, pattern) in enumerate(zip(lines, shape, strict=True), 1):
        for place, (char, wanted) in enumerate(zip(line, pattern, strict=False), 1):
            num_bound += wanted != "中"
            if wanted != "中" and wanted not in tones(char):
                off.append((number, place))
        if pattern[-1] in _LETTERS:
            rhymes.setdefault(pattern[-1], []).append(part_of(line[-1]))
    rhymed = all(frozenset.intersection(*parts) for parts in rhymes.values())
    return Lyric(tune, lines, shape, True, 1 - len(off) / max(num_bound, 1), rhymed, off)


@cache
def part_of(character: str) -> frozenset[int]:
    """The parts of 词林正韵, 0 to 18, that a character is in."""
    return frozenset(
        number for number, names in enumerate(_PARTS) for group in groups(character) if group[-1] in names
    )


@cache
def tunes() -> dict[str, list[list[str]]]:
    """Tune → its shapes, commonest first."""
    table: dict[str, list[list[str]]] = {}
    for row in _TABLE.read_text("utf-8").splitlines():
        name, *lines = row.split()
        if lines[0].startswith("="):  # another name; these rows come last
            table[name] = table[lines[0][1:]]
        else:
            table.setdefault(name, []).append(lines)
    return table
