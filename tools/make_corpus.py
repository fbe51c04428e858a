"""Make the text that the embedded base reads, out of the development data: much verse by the book, some of all else.

    python tools/make_corpus.py --shared ../shared/data --out out/corpus

    verse.jsonl      regulated poems: with their titles, then again several to a page, then their middle couplets
    rhymes.jsonl     the same poems by rhyme, as rhyme books order them, and the characters that rhyme in them
    forms.jsonl      as many poems of each form, under its name or under the characters that begin its lines
    echoes.jsonl     rows of characters drawn by chance, which come again in another order
    quotes.jsonl     poems under one of their lines or the characters that begin them, passages under a sentence
    chinese.jsonl    vernacular novels, classical prose, Wikipedia
    english.jsonl    novels, the King James Bible, Shakespeare
    others.jsonl     sentences in some twenty languages

All of it is in the public domain, or of a licence that allows passing on what was learned from it (see NOTICE).
What the demo's samples hold is left out: a poem that shares a line with one of them, and every paragraph that quotes
one. So whatever the demo holds out, neither pre-training nor fine-tuning has seen it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from firefly.data.literature import Verse, read_verse
from firefly.evaluate.forms import verse_lines
from firefly.evaluate.verse import acrostic, judge_poem
from firefly.files import read_json_lines, write_atomic
from make_samples import DEMO, antithetical, by_the_book, common_characters

PROSE = {  # file of plain text → characters taken of it, and the result it goes into
    "zh_classics_pd": (1_600_000, "chinese"),
    "zh_wenyan_originals": (800_000, "chinese"),
    "zh_wikipedia_passages": (900_000, "chinese"),
    "en_public_domain": (4_000_000, "english"),
    "en_tinyshakespeare": (300_000, "english"),
    "other_languages": (1_600_000, "others"),
}
PAGE_CHARACTERS = 220
PAGES_OF = {"poems": 1, "couplets": 2}  # how often each comes back, every time in other company
POEMS_OF_A_FORM = 6000
ECHO_PAGES, ECHO_CHARACTERS = 12_000, 5000
BETWEEN_ECHOES = ("\n", "，", "。", "\n\n", "、", "：", "——", " ")
QUOTED = {"poems": 12_000, "chinese": 3000, "english": 1500, "others": 1000}
POEM_UNDER = ("{}", "“{}”", "{}……", "{form}：{}", "{}（{form}）", "{}\n")
PASSAGE_UNDER = ("{}", "“{}”", "{}\n")
SENTENCE_END = re.compile("(?<=[。！？!?.])\\s*")
HEADINGS = ("{form}\n{title}", "{title}（{form}）", "{form}《{title}》", "{title}\n{form}", "{heads}")


def rank(*parts: str) -> str:
    """A text's place in an order that depends on nothing else."""
    return hashlib.sha256("\0".join(("firefly-corpus", *parts)).encode("utf-8")).hexdigest()


def sample_lines() -> set[str]:
    """Every line of verse in the demo's samples."""
    lines: set[str] = set()
    for name in ("lushi.jsonl.gz", "jueju.jsonl.gz"):
        with gzip.open(DEMO / name, "rt", encoding="utf-8") as file:
            lines.update(
                line for row in map(json.loads, file) for line in verse_lines("".join(row["content"]))
            )
    return lines


def regulated(pack: Path, left_out: set[str]) -> dict[Verse, str]:
    """Poems by the book with their rhyme, in common characters, each once, none with a line that is left out."""
    poems: dict[str, tuple[Verse, str]] = {}
    for _, record in read_json_lines(pack / "poem_poetry_source.jsonl.zst"):
        verse = read_verse(record["title"], record["content"])
        if (
            not isinstance(verse, str)
            and verse.group not in poems
            and common_characters(verse.text)
            and left_out.isdisjoint(verse.lines)
            and by_the_book(verse.text)
        ):
            poems[verse.group] = (verse, judge_poem(verse.text).rhyme)
    return dict(sorted(poems.values(), key=lambda item: rank(item[0].group)))


def verse_pages(poems: Collection[Verse]) -> Iterator[str]:
    """Each poem under its title, poems of one form on pages, and couplets line by line on pages."""
    yield from (f"{verse.title}\n{verse.text}" for verse in poems)
    for turn in range(PAGES_OF["poems"]):
        for form in sorted({verse.form for verse in poems}):
            yield from pages((v.text for v in poems if v.form == form), f"{form}{turn}")
    long = [verse for verse in poems if len(verse.lines) == 8 and antithetical(verse)]
    for turn in range(PAGES_OF["couplets"]):
        for form in sorted({verse.form for verse in long}):
            pairs = (v.lines[at : at + 2] for v in long if v.form == form for at in (2, 4))
            yield from pages(("\n".join(pair) for pair in pairs), f"couplets{form}{turn}")


def rhyme_pages(poems: dict[Verse, str]) -> Iterator[str]:
    """Pages of poems of one form and rhyme; of characters in rhyme, a line a poem; and of those of one rhyme.

    On such a page every line that rhymes says how the next one will: a small model learns from it what it would take
    many times as much verse to notice.
    """
    for form, rhyme in sorted({(verse.form, rhyme) for verse, rhyme in poems.items()}):
        fitting = (verse.text for verse, found in poems.items() if (verse.form, found) == (form, rhyme))
        yield from pages(fitting, f"rhyme{form}{rhyme}")
    closing = {verse: "".join(line[-1] for line in verse.lines[1::2]) for verse in poems}
    yield from pages(closing.values(), "closing", "\n")
    for rhyme in sorted(set(poems.values())):
        yield from pages((closing[verse] for verse, found in poems.items() if found == rhyme), rhyme, "")


def form_pages(poems: Collection[Verse]) -> Iterator[str]:
    """Poems under headings as anthologies have them, which tell how many lines there will be, and how long."""
    for form in sorted({verse.form for verse in poems}):
        fitting = [verse for verse in poems if verse.form == form][:POEMS_OF_A_FORM]
        for number, verse in enumerate(fitting):
            heading = HEADINGS[number % len(HEADINGS)]
            heads = acrostic(verse.text)
            yield heading.format(form=form, title=verse.title, heads=heads) + f"\n{verse.text}"


def echo_pages(texts: Iterable[str]) -> Iterator[str]:
    """Rows of 3 to 12 Chinese characters drawn by chance, one to four at a time, that come again, shuffled.

    Nothing else can be learned from them, so they teach what verse and prose hardly do: to look up what followed when
    this character stood here before.
    """
    counts = Counter(character for text in texts for character in text if "一" <= character <= "鿿")
    characters, numbers = zip(*counts.most_common(ECHO_CHARACTERS), strict=True)
    weights = [number**0.3 for number in numbers]  # rare characters are copied as well as common ones
    chance = random.Random("firefly-echoes")
    for _ in range(ECHO_PAGES):
        page = ""
        while len(page) < PAGE_CHARACTERS:
            rows = [
                "".join(chance.choices(characters, weights, k=chance.randint(3, 12)))
                for _ in range(chance.choice((1, 1, 2, 3, 4)))
            ]
            between = chance.choice(BETWEEN_ECHOES)
            for _ in range(chance.choice((2, 2, 3))):
                page += "".join(row + between for row in rows)
                chance.shuffle(rows)
        yield page[:PAGE_CHARACTERS]


def quote_pages(poems: Collection[Verse], prose: dict[str, list[str]]) -> Iterator[str]:
    """Poems under their first line, any line or the characters that begin their lines; passages under a sentence."""
    for verse in sorted(poems, key=lambda verse: rank("quotes", verse.group))[: QUOTED["poems"]]:
        chance = random.Random(verse.group)
        first, heads, any_line = verse.lines[0], acrostic(verse.text), chance.choice(verse.lines)
        heading = chance.choice(POEM_UNDER).format(
            chance.choice((first, first, heads, any_line)), form=verse.form
        )
        yield f"{heading}\n{verse.text}"
    for name, texts in prose.items():
        for text in sorted(texts, key=lambda text: rank("quotes", text))[: QUOTED[name]]:
            chance, passage = random.Random(text), text[:PAGE_CHARACTERS]
            sentences = [one for one in SENTENCE_END.split(passage) if 6 <= len(one) <= 80]
            if sentences:
                yield f"{chance.choice(PASSAGE_UNDER).format(chance.choice(sentences))}\n{passage}"


def pages(texts: Iterable[str], order: str, between: str = "\n\n") -> Iterator[str]:
    """Texts in an order of their own, to pages of `PAGE_CHARACTERS`."""
    page = ""
    for text in sorted(texts, key=lambda text: rank(order, text)):
        if page and len(page) + len(text) > PAGE_CHARACTERS:
            yield page
            page = ""
        page += (between if page else "") + text
    if page:
        yield page


def prose(file: Path, num_characters: int, left_out: set[str]) -> Iterator[str]:
    """Passages of a few paragraphs, drawn over the whole file, without the paragraphs that quote a line left out."""
    passages = []
    for number, record in read_json_lines(file):
        paragraphs = [p for p in record["text"].splitlines() if left_out.isdisjoint(verse_lines(p))]
        passage = ""
        for paragraph in [*paragraphs, ""]:
            if passage and (not paragraph or len(passage) + len(paragraph) > 600):
                passages.append((rank(file.name, str(number), passage), passage))
                passage = ""
            passage += ("\n" if passage else "") + paragraph
    taken = 0
    for _, passage in sorted(passages):
        if taken >= num_characters:
            return
        taken += len(passage)
        yield passage


def write(path: Path, texts: list[str]) -> None:
    """Write documents as JSON lines."""
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    write_atomic(path, ("\n".join(lines) + "\n").encode("utf-8"))
    print(f"{path}: {len(texts):,} documents, {sum(map(len, texts)):,} characters")


def main() -> None:
    """Make the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True, help="the folder with pack/ and text/")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    left_out = sample_lines()
    poems = regulated(options.shared / "pack", left_out)
    print(f"{len(poems):,} poems by the book")
    write(options.out / "verse.jsonl", list(verse_pages(poems)))
    write(options.out / "rhymes.jsonl", list(rhyme_pages(poems)))
    write(options.out / "forms.jsonl", list(form_pages(poems)))
    found: dict[str, list[str]] = {}
    for name, (num_characters, result) in PROSE.items():
        found.setdefault(result, []).extend(
            prose(options.shared / "text" / f"{name}.jsonl.zst", num_characters, left_out)
        )
    for result, texts in found.items():
        write(options.out / f"{result}.jsonl", texts)
    write(options.out / "echoes.jsonl", list(echo_pages([*(v.text for v in poems), *found["chinese"]])))
    write(options.out / "quotes.jsonl", list(quote_pages(poems, found)))


if __name__ == "__main__":
    main()
