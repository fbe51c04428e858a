"""Make the table of 词牌 of `firefly.evaluate.tunes` by counting over the 词 of the Song.

    python tools/make_tunes.py --pack ../shared/data/pack

For each tune with enough poems, its commonest shapes (lengths of the lines) get a row: name, then each line's tones and
a letter for its rhyme. A position is level or oblique where 90 % of the unambiguous characters are, else 中. Two lines
rhyme where they do in 70 % of the poems. A tune with two names (凤栖梧・蝶恋花) is counted under the last; a row
`凤栖梧 =蝶恋花` holds the other. The texts (chinese-poetry, MIT) are in the public domain; the table holds
none of them.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from pathlib import Path

from firefly.evaluate.forms import line_lengths, verse_lines
from firefly.evaluate.rhyme import tones
from firefly.evaluate.tunes import part_of
from firefly.files import read_json_lines, write_atomic

TUNES = Path(__file__).parents[1] / "src" / "firefly" / "evaluate" / "books" / "tunes.txt"
MIN_POEMS, MIN_OF_SHAPE, MIN_SHARE, MAX_SHAPES = 40, 20, 0.15, 3
SAME = {
    "一翦梅": "一翦梅・一剪梅",
    "江神子": "江神子・江城子",
    "南柯子": "南柯子・南歌子",
}  # named twice in the texts
Poems = list[list[str]]


def row(name: str, poems: Poems) -> str:
    """One line of the table, from poems of one shape."""
    letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
    letter_of: dict[int, str] = {}
    parts = []
    for number in range(len(poems[0])):
        pattern = "".join(map(tone, zip(*(poem[number] for poem in poems), strict=True)))
        mates = [other for other in letter_of if share_rhyming(poems, other, number) >= 0.7]
        letter_of[number] = letter_of[mates[-1]] if mates else next(letters, "?")
        parts.append(pattern)
    common = Counter(letter_of.values())
    kept = dict(zip((one for one in common if common[one] > 1), "ABCDEFGH", strict=False))
    lines = (pattern + kept.get(letter_of[number], "") for number, pattern in enumerate(parts))
    return " ".join((name, *lines))


def tone(column: tuple[str, ...]) -> str:
    """平, 仄 or 中 for the characters that poems have at one position."""
    clear = [next(iter(found)) for char in column if len(found := tones(char)) == 1]
    level = clear.count("平") / max(len(clear), 1)
    return "平" if level >= 0.9 else "仄" if level <= 0.1 else "中"


def share_rhyming(poems: Poems, one: int, other: int) -> float:
    """The share of poems in which two lines rhyme."""
    return sum(bool(part_of(poem[one][-1]) & part_of(poem[other][-1])) for poem in poems) / len(poems)


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pack", type=Path, required=True)
    source = parser.parse_args().pack / "lyric_songci.jsonl.zst"
    aliases: dict[str, str] = {}
    by_tune: dict[str, dict[tuple[int, ...], Poems]] = defaultdict(lambda: defaultdict(list))
    for _, record in read_json_lines(source):
        text = "".join(record["paragraphs"])
        *others, name = SAME.get(record["rhythmic"], record["rhythmic"]).split("・")
        by_tune[name][line_lengths(text)].append(verse_lines(text))
        aliases |= dict.fromkeys(others, name)
    rows: list[str] = []
    for name, shapes in sorted(by_tune.items()):
        total = sum(map(len, shapes.values()))
        if total < MIN_POEMS:
            continue
        ranked = sorted(shapes.values(), key=len, reverse=True)[:MAX_SHAPES]
        rows += [row(name, poems) for poems in ranked if len(poems) >= max(MIN_OF_SHAPE, MIN_SHARE * total)]
    known = {line.split()[0] for line in rows}
    rows += [
        f"{other} ={name}" for other, name in sorted(aliases.items()) if name in known and other not in known
    ]
    write_atomic(TUNES, "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
