"""Importers turn one raw record into examples or into fields that a task renders, one function a shape of record.

    records    {"word": …, "explanation": …}: fields that a task renders
    poems      {"title", "authorName", "dynasty", "content": [lines]}: 绝句 and 律诗
    couplets   the same poems: the two middle couplets of 律诗, which are antithetical by rule
    firefly    {"kind", "input", "target"} or {"kind", "messages"}, or Alpaca's {"instruction", "input", "output"}
    text       plain text to pre-train on: a .txt line or a JSON record's "text" is one document
    auto       whichever of these the first record looks like

`readers` knows the file formats; an importer sees one record at a time and nothing else, so records can be
imported in any process. Every record has a *group*: records of one group are never split between training and
validation. A poem and its couplets share a group, so that no held-out couplet was read in a training poem.
A new shape is one function with the decorator `@importer("name")`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firefly.data.clean import digest, normalised
from firefly.data.example import Example
from firefly.data.readers import read_records
from firefly.data.tasks import load_tasks, task
from firefly.errors import InputError, choices


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a raw record stands, and the task that the recipe names for it."""

    path: Path
    line: int
    kind: str | None = None

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    @property
    def source(self) -> str:
        """The short form that travels with the example."""
        return f"{self.path.name}:{self.line}"


@dataclass(frozen=True, slots=True)
class Record:
    """Raw fields for a task to render; `source` is "file:line"."""

    fields: dict[str, str]
    group: str
    source: str


@dataclass(frozen=True, slots=True)
class Whole:
    """A record that already is an example."""

    example: Example
    group: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """A record that the importer cannot use, and the reason's code."""

    reason: str
    source: str
    text: str


Imported = Record | Whole | Skipped
Importer = Callable[[dict[str, Any], Origin], Iterable[Imported]]
IMPORTERS: dict[str, Importer] = {}
NEED_TASK: set[str] = set()  # importers that yield raw fields


def importer(name: str, *, needs_task: bool = False) -> Callable[[Importer], Importer]:
    """Make a function available to recipes as `importer = "name"`; it raises `InputError` for a bad record."""

    def register(function: Importer) -> Importer:
        IMPORTERS[name] = function
        if needs_task:
            NEED_TASK.add(name)
        return function

    return register


def recognise(name: str, path: Path, kind: str | None) -> str:
    """The importer to use: `name` itself, or for "auto" the one that the first record looks like.

    Raises `InputError` for an unknown name or format, or when a task is needed and none or an unknown one is given.
    """
    if name != "auto" and name not in IMPORTERS:
        raise InputError(f"Unknown importer '{name}': {choices(name, ['auto', *IMPORTERS])}.")
    if name == "auto":
        name = _guess(path, kind)
    if name in NEED_TASK:
        if kind is None:
            raise InputError(
                f"{path}: the importer '{name}' yields raw fields; name the task that renders them "
                f"(task = …; choices: {', '.join(load_tasks())})."
            )
        task(kind)
    return name


def _guess(path: Path, kind: str | None) -> str:
    _, first = next(read_records(path), (0, None))
    if first is None:
        raise InputError(f"{path} has no records; give a file with content.")
    if (
        "messages" in first
        or {"input", "target"} <= first.keys()
        or {"instruction", "output"} <= first.keys()
    ):
        return "firefly"
    if isinstance(first.get("content"), list) and "title" in first:
        return "couplets" if kind == "Couplet" else "poems"
    if kind is not None:
        return "records"
    if "text" in first:
        return "text"
    raise InputError(
        f"{path}: cannot tell the format from the fields of the first record ({', '.join(sorted(first))}); "
        "name a task for raw records, or an importer."
    )


@importer("records", needs_task=True)
def import_records(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """The task's fields as they stand; numbers become text, null counts as empty, other fields are left out."""
    names = task(origin.kind or "").fields
    fields = {name: field_text(record, name, origin) for name in names if name in record}
    if not fields:
        raise InputError(
            f"{origin}: task {origin.kind} needs one of the fields {', '.join(names)}; "
            f"the fields there are: {', '.join(sorted(record)) or 'none'}."
        )
    yield Record(fields, digest("\0".join(map(normalised, fields.values()))), origin.source)


def field_text(record: dict[str, Any], name: str, origin: Origin) -> str:
    """A field's value as text; "" where it is absent or null. Raises `InputError` for a list or an object."""
    value = record.get(name)
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(
            f"{origin}: field '{name}' is a {type(value).__name__} where a text or a number is needed."
        )
    return str(value).strip()


@importer("firefly")
def import_firefly(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Examples as firefly-train-1.1M, BELLE and Alpaca write them; the latter two become kind "BELLE"."""
    if "instruction" in record and "output" in record:
        record = _from_alpaca(record, origin)
    example = Example.from_record(record, origin.path, origin.line, origin.kind)
    example = replace(example, source=origin.source)
    # By question: two answers to one question stay on one side of the split.
    yield Whole(example, digest(normalised(example.input or example.target)))


def _from_alpaca(record: dict[str, Any], origin: Origin) -> dict[str, Any]:
    """Alpaca's fields, with earlier turns in `history`, as a record with messages."""
    for name in ("instruction", "output"):
        field_text(record, name, origin)
    question = "\n".join(str(part) for part in (record["instruction"], record.get("input")) if part)
    try:
        pairs = [*(record.get("history") or []), (question, record["output"])]
        turns = [
            (role, content)
            for asked, answer in pairs
            for role, content in (("user", asked), ("assistant", answer))
        ]
    except (TypeError, ValueError) as error:
        raise InputError(f"{origin}: field 'history' must be a list of [question, answer].") from error
    return {
        "kind": record.get("kind", "BELLE"),
        "messages": [{"role": role, "content": content} for role, content in turns],
    }


@importer("text")
def import_text(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """A document to pre-train on: one assistant message, so that every token is a target."""
    text = record.get("text")
    if not isinstance(text, str):
        raise InputError(
            f"{origin}: field 'text' is missing or not text; "
            f"the fields there are: {', '.join(sorted(record)) or 'none'}."
        )
    yield Whole(Example.plain(origin.kind or "Text", text.strip(), origin.source), digest(normalised(text)))


FORMS = {(4, 5): "五言绝句", (4, 7): "七言绝句", (8, 5): "五言律诗", (8, 7): "七言律诗"}
_MARKS = "，。！？；：、"
_VERSE_LINE = re.compile(f"([^{_MARKS}]+)([{_MARKS}]+)")
_HAN = re.compile("[〇㐀-䶿一-鿿\U00020000-\U000323af]+")
_BRACKETED = re.compile(r"([（(〔［\[【][^）)〕］\]】]*[）)〕］\]】]\s*)+$")
_SERIES = re.compile(
    "(?<=.)[·\\s]*([一二三四五六七八九十百廿]+首)?[·\\s]*([其之][一二三四五六七八九十百廿]+)?$"
)
_BAD_TITLE = re.compile("[□囗■○?？（）()〔〕【】\\[\\]]")


@dataclass(frozen=True, slots=True)
class Verse:
    """A poem of four or eight lines, each of five or seven characters, without and with its punctuation."""

    title: str
    form: str
    lines: tuple[str, ...]
    text: str

    @property
    def group(self) -> str:
        """A hash of the poem's characters alone."""
        return digest("".join(self.lines))


def read_verse(title: str, content: list[str]) -> Verse | str:
    """A poem's form and lines, or the code of the reason why it cannot be used.

    The title loses a closing note in brackets and its number in a series (咏怀八十二首（其七十九） becomes 咏怀).
    """
    title = _SERIES.sub("", _BRACKETED.sub("", title).strip()).strip()
    if not title or _BAD_TITLE.search(title):
        return "bad_title"
    pieces = ["".join(piece.split()) for piece in content if piece.strip()]
    closed = [
        piece if piece[-1] in _MARKS else piece + "，。"[index % 2] for index, piece in enumerate(pieces)
    ]
    pairs = _VERSE_LINE.findall("".join(closed))
    lines = tuple(line for line, _ in pairs)
    if not all(_HAN.fullmatch(line) for line in lines):
        return "not_only_han"  # a lacuna □, a note in brackets, a character outside Unicode
    lengths = {len(line) for line in lines}
    form = FORMS.get((len(lines), lengths.pop())) if len(lengths) == 1 else None
    if form is None:
        return "other_form"
    halves = [line + marks for line, marks in pairs]
    text = "\n".join(first + second for first, second in zip(halves[::2], halves[1::2], strict=True))
    return Verse(title, form, lines, text)


def _verse(record: dict[str, Any], origin: Origin) -> Verse | Skipped:
    """The poem of a raw record."""
    content = record.get("content")
    if not isinstance(content, list) or not all(isinstance(piece, str) for piece in content):
        raise InputError(
            f"{origin}: field 'content' must be a list of the poem's lines; "
            f"the fields there are: {', '.join(sorted(record)) or 'none'}."
        )
    verse = read_verse(field_text(record, "title", origin), content)
    return Skipped(verse, origin.source, "".join(content)) if isinstance(verse, str) else verse


@importer("poems", needs_task=True)
def import_poems(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """绝句 and 律诗: fields title, author, dynasty, form, first_line, poem (two lines to a row)."""
    verse = _verse(record, origin)
    if isinstance(verse, Skipped):
        yield verse
        return
    fields = {
        "title": verse.title,
        "author": field_text(record, "authorName", origin),
        "dynasty": field_text(record, "dynasty", origin),
        "form": verse.form,
        "first_line": verse.lines[0],
        "poem": verse.text,
    }
    yield Record(fields, verse.group, origin.source)


@importer("couplets", needs_task=True)
def import_couplets(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """The 颔联 and 颈联 of 律诗, which must be antithetical: fields first, second, form (without punctuation)."""
    verse = _verse(record, origin)
    if isinstance(verse, Skipped):
        yield verse
    elif len(verse.lines) != 8:
        yield Skipped("no_middle_couplets", origin.source, verse.text)
    else:
        for first, second in (verse.lines[2:4], verse.lines[4:6]):
            if any(upper == lower for upper, lower in zip(first, second, strict=True)):
                # The same character facing itself: no antithesis, so the poem is 古体 in the shape of 律诗.
                yield Skipped("not_antithetical", origin.source, f"{first}，{second}")
            else:
                yield Record(
                    {"first": first, "second": second, "form": verse.form}, verse.group, origin.source
                )
