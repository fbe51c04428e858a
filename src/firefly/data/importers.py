"""Importers turn one raw record into examples or into fields that a task renders, one function a shape of record.

    records    {"word": …, "explanation": …}: fields that a task renders
    firefly    {"kind", "input", "target"} or {"kind", "messages"}: firefly-train-1.1M, and our own datasets;
               also their preferences, with "chosen" and "rejected" for "target"
    text       plain text to pre-train on: a .txt line or a JSON record's "text" is one document
    auto       whichever of these, or of the shapes in `conversations`, the first record looks like

`readers` knows the file formats; an importer sees one record at a time and nothing else, so records can be
imported in any process. Every record has a *group*: records of one group are never split between training and
validation. A new shape is one function with the decorator `@importer("name")`; those for verse, prose and
dictionaries are in `literature`, those for labelled corpora in `corpora`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from firefly.data.clean import digest, normalised
from firefly.data.example import Example
from firefly.data.readers import read_tolerant
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
_SHAPES: list[tuple[frozenset[str], str]] = []  # the fields by which "auto" knows an importer's records


def importer(
    name: str, *, needs_task: bool = False, shapes: Iterable[Collection[str]] = ()
) -> Callable[[Importer], Importer]:
    """Make a function available to recipes as `importer = "name"`; it raises `InputError` for a bad record.

    "auto" chooses it for a record that has all fields of one of `shapes`, if no other shape has more of them.
    """

    def register(function: Importer) -> Importer:
        assert name not in IMPORTERS, f"two importers are called {name}"
        IMPORTERS[name] = function
        _SHAPES.extend((frozenset(shape), name) for shape in shapes)
        if needs_task:
            NEED_TASK.add(name)
        return function

    return register


class NoRecords(InputError):
    """A file without a single readable record; the sentence is about its first bad one, if there is one."""


def recognise(name: str, path: Path, kind: str | None) -> str:
    """The importer to use: `name` itself, or for "auto" the one that the first record looks like.

    Raises `InputError` for an unknown name or format, or when a task is needed and none or an unknown one is given;
    `NoRecords` when there is nothing to look at.
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
    first = _first_record(path)
    fitting = [(shape, name) for shape, name in _SHAPES if shape <= first.keys()]
    if fitting:
        return max(fitting, key=lambda entry: len(entry[0]))[1]
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


def _first_record(path: Path) -> dict[str, Any]:
    records, bad = read_tolerant(path), None
    try:
        for _, record in records:
            if isinstance(record, dict):
                return record
            bad = bad or record
    except InputError as error:
        bad = bad or error
    raise NoRecords(str(bad or f"{path} has no records; give a file with content."))


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
    if isinstance(value, float) and not math.isfinite(value):  # Parquet can hold it
        raise InputError(f"{origin}: field '{name}' is {value}, which is no number to train on.")
    return str(value).strip()


@importer("firefly", shapes=[{"input", "target"}, {"kind", "messages"}])
def import_firefly(record: dict[str, Any], origin: Origin) -> Iterator[Imported]:
    """Examples as firefly-train-1.1M writes them, character by character; other shapes are in `conversations`."""
    example = Example.from_record(record, origin.path, origin.line, origin.kind)
    example = replace(example, source=origin.source)
    # By question: two answers to one question stay on one side of the split.
    yield Whole(example, digest(normalised(example.input or example.target)))


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
