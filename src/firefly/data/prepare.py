"""The first pass over one block of raw records: import, ask, mend, judge, and fingerprint each of them.

This runs in worker processes, so it is a pure function of its block: `prepare(Work) → Prepared`. What a record
asks is the same however often it is prepared, because templates are chosen by the record's hash.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data import conversations, corpora, literature  # noqa: F401 (their importers become known)
from firefly.data.candidates import COLUMN, Names
from firefly.data.clean import clean, digest, mended
from firefly.data.dedup import content_key, signature
from firefly.data.example import Example, Message
from firefly.data.importers import IMPORTERS, Imported, Origin, Record, Skipped
from firefly.data.overlap import EvaluationGrams
from firefly.data.tasks import task
from firefly.errors import InputError
from firefly.recipe import CleanSection

_MOST_QUALITY = (1 << 32) - 1


@dataclass(frozen=True, slots=True)
class Work:
    """Raw records of one file, each with its line, or with the error that stands in its place."""

    source: int
    file: int
    path: Path
    importer: str
    kind: str | None
    rename: dict[str, str]
    directions: tuple[str, ...]  # of the task, those to ask in; none named: all
    records: list[tuple[int, dict[str, Any] | InputError]]
    skip_bad: bool
    clean: CleanSection
    evaluation: tuple[tuple[tuple[str, int], ...], int]  # files with their times, characters in an n-gram
    near: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """The candidates of a block, see `candidates`; `kind` and `reason` count through the names given here."""

    bodies: bytes
    columns: NDArray[Any]
    signatures: NDArray[np.uint32] | None
    kinds: list[str]
    reasons: list[str]
    source: int
    names: frozenset[str]  # of fields that records had, where the source renames some


@dataclass(frozen=True, slots=True)
class _Candidate:
    line: int
    kind: str
    body: dict[str, Any]
    group: str = ""
    same: str = ""  # the text by which repetitions are found
    target: str = ""
    characters: int = 0
    reason: str = ""


def prepare(work: Work) -> Prepared:
    """All candidates of a block; raises `InputError` for a bad record unless `skip_bad`."""
    candidates = list(_candidates(work))
    kinds, reasons = Names(), Names("")
    columns = np.zeros(len(candidates), COLUMN)
    lines = []
    for row, one in zip(columns, candidates, strict=True):
        key = content_key(one.same)
        row["key"] = np.void(key)
        row["chance"] = int.from_bytes(key[:8], "little")
        row["group"] = split_number(one.group)
        row["line"], row["characters"] = one.line, min(one.characters, _MOST_QUALITY)
        row["quality"] = min(len(one.target), _MOST_QUALITY)
        row["file"], row["source"] = work.file, work.source
        row["kind"], row["reason"] = kinds.number(one.kind), reasons.number(one.reason)
        lines.append(json.dumps(one.body, ensure_ascii=False).encode("utf-8") + b"\n")
    sound = [signature(one.same) for one in candidates if not one.reason] if work.near else []
    signatures = np.stack(sound) if sound else None
    names: set[str] = set()
    if work.rename:
        names.update(*(record for _, record in work.records if isinstance(record, dict)))
    return Prepared(
        b"".join(lines), columns, signatures, kinds.all, reasons.all, work.source, frozenset(names)
    )


def split_number(group: str) -> int:
    """Where a group lies on the line from 0 to 2**64 whose beginning is held out."""
    return int(digest(group)[:16], 16)


def _candidates(work: Work) -> Iterator[_Candidate]:
    for line, record in work.records:
        try:
            yield from _of_record(work, Origin(work.path, line, work.kind), record)
        except InputError as error:
            if not work.skip_bad:
                raise
            yield _Candidate(line, work.kind or "unknown", {"text": str(error)}, reason="bad_record")


def _of_record(work: Work, origin: Origin, record: dict[str, Any] | InputError) -> list[_Candidate]:
    """What one raw record gives; all of it, or an error."""
    if isinstance(record, InputError):
        raise record
    renamed = {name: record[there] for name, there in work.rename.items() if there in record}
    found: list[_Candidate] = []
    for item in IMPORTERS[work.importer](record | renamed, origin):
        found.append(_candidate(work, origin, item))
    return found


def _candidate(work: Work, origin: Origin, item: Imported) -> _Candidate:
    if isinstance(item, Skipped):
        return _Candidate(origin.line, work.kind or "unknown", {"text": item.text}, reason=item.reason)
    if isinstance(item, Record):
        known = task(origin.kind or "")
        full = [name for name, text in item.fields.items() if text.strip()]
        if known.eligible(item.fields, work.directions) and not known.eligible(full, work.directions):
            text = json.dumps(item.fields, ensure_ascii=False)
            return _Candidate(origin.line, known.kind, {"text": text}, reason="empty_field")
        asked = known.render(item.fields, source=str(origin), among=work.directions)
        example, reason = clean(asked, work.clean)
        body: dict[str, Any] = {"fields": item.fields}
        if work.directions:
            body["directions"] = work.directions
        # What the task's first direction would ask and answer: two records with the same of it are the same.
        first = known.eligible(full)[0]
        parts = [item.fields[name] for name in known.fields if name in first.needs]
        turns = mended(Example("", tuple(Message("user", part) for part in parts)), work.clean).messages
    else:
        example, reason = clean(item.example, work.clean)
        body = {"messages": [[turn.role, turn.content] for turn in example.messages]}
        turns = example.messages
        if example.rejected is not None:
            body["rejected"] = example.rejected
            turns = (*turns, Message("assistant", example.rejected))
    same = "\0".join(turn.content for turn in turns)
    if not reason and work.evaluation[0] and (hit := _grams(*work.evaluation).hit(same)):
        reason, body["note"] = "contaminated", hit
    text = f"{example.input}\n{example.target}" if example.input else example.target
    return _Candidate(
        origin.line, example.kind, body, item.group, same, example.target, len(text), reason or ""
    )


@cache
def _grams(files: tuple[tuple[str, int], ...], size: int) -> EvaluationGrams:
    return EvaluationGrams.load([Path(file) for file, _ in files], size)
