"""`firefly data`, first half: sources → records → examples → cleaned → split → one directory.

    train.jsonl, validation.jsonl   one Example a line, in the order of the sources
    rejects.jsonl                   everything that was dropped, with the reason
    card.json, tasks.png            what is in it: counts, drops, lengths, licences, hashes

Nothing is held in memory but one hash an example. Which side of the split a record falls on depends on its own
group alone: adding sources never moves a record from training to validation or back. The same sources give the
same bytes.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from firefly import console
from firefly.data.clean import Duplicates, digest, reject_reason
from firefly.data.example import Example
from firefly.data.importers import IMPORTERS, Imported, Origin, Record, Skipped, recognise
from firefly.data.readers import read_records
from firefly.data.stats import length_summary, task_chart
from firefly.data.tasks import Task, load_tasks, task
from firefly.errors import FireflyError, InputError, OutputError, choices
from firefly.files import (
    directory_atomic,
    locate,
    read_json_lines,
    require_file,
    sha256_file,
    write_json,
)
from firefly.recipe import DataSection, Source

Split = Literal["train", "validation"]
FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "rejected": "rejects.jsonl"}


@dataclass(frozen=True)
class DatasetResult:
    """What `build_dataset` made; `kinds` maps a kind to its counts by side (train, validation, rejected)."""

    path: str
    train: int
    validation: int
    rejected: int
    kinds: dict[str, dict[str, int]]
    reasons: dict[str, int]  # why records were rejected


@dataclass(frozen=True)
class _Input:
    """A source of the recipe, checked."""

    source: Source
    path: Path
    importer: str
    task: Task | None  # None: the importer yields whole examples

    @property
    def kind(self) -> str:
        return self.task.kind if self.task else self.source.task or "unknown"


@dataclass(frozen=True)
class _Candidate:
    """An example on its way in, or the reason why there is none."""

    kind: str
    source: str
    group: str
    text: str
    example: Example | None = None
    reason: str | None = None

    def accepted(self) -> str:
        """Its line in train.jsonl or validation.jsonl."""
        assert self.example is not None
        return self.example.to_json()

    def rejected(self, reason: str) -> str:
        """Its line in rejects.jsonl."""
        line = {"source": self.source, "kind": self.kind, "reason": reason, "text": self.text}
        return json.dumps(line, ensure_ascii=False)


class _Tally:
    """Everything that is counted on the way."""

    def __init__(self) -> None:
        self.sides: defaultdict[str, Counter[str]] = defaultdict(Counter)  # kind → side → examples
        self.reasons: defaultdict[str, Counter[str]] = defaultdict(Counter)  # kind → reason → examples
        self.characters: defaultdict[str, array[int]] = defaultdict(lambda: array("L"))  # kind → lengths
        self.records: Counter[str] = Counter()  # kind → records rendered, for the task's cap
        self.sources: list[dict[str, Any]] = []

    def total(self, side: str) -> int:
        return sum(sides[side] for sides in self.sides.values())


def side_of(group: str, validation_fraction: float) -> Split:
    """The side of the split on which every record of a group lies, decided by the group's hash alone."""
    return "validation" if int(digest(group)[:16], 16) < validation_fraction * 2**64 else "train"


def build_dataset(data: DataSection, out: Path) -> DatasetResult:
    """Make the dataset directory `out`, which appears whole or not at all.

    Raises `InputError` for a bad source, record, task or importer, or when no example is left to train on;
    `OutputError` when `out` cannot be written or holds something that is not a dataset.
    """
    inputs = [_check(source, f"data.sources[{index}]") for index, source in enumerate(data.sources)]
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not a dataset; choose another output_dir, or remove it.")
    tally, duplicates = _Tally(), Duplicates()
    with directory_atomic(out) as folder:
        with ExitStack() as stack:
            handles = {side: stack.enter_context((folder / name).open("wb")) for side, name in FILES.items()}
            shown = stack.enter_context(console.progress("data", None, "records"))
            for given in inputs:
                sides: Counter[str] = Counter()
                for candidate in _candidates(given, tally):
                    side, line = _decide(candidate, data, duplicates, tally)
                    # A lone surrogate, which UTF-8 cannot hold, becomes its JSON escape.
                    handles[side].write(line.encode("utf-8", "backslashreplace") + b"\n")
                    sides[side] += 1
                    if sides.total() % 256 == 0:
                        shown.advance(256, candidate.kind)
                shown.advance(sides.total() % 256)
                tally.sources[-1] |= {"candidates": sides.total()} | {side: sides[side] for side in FILES}
        reasons = sum(tally.reasons.values(), Counter())
        if tally.total("train") == 0:
            why = ", ".join(f"{reason} {count:,}" for reason, count in reasons.most_common()) or "none"
            raise InputError(
                f"No example is left to train on: {tally.total('validation'):,} went to validation and "
                f"{tally.total('rejected'):,} were rejected ({why}). Check the sources, or data.validation_fraction."
            )
        write_json(folder / "card.json", _card(data, tally, folder))
        titles = {kind: known.title_zh for kind, known in load_tasks().items()}
        counts = {kind: sides["train"] + sides["validation"] for kind, sides in tally.sides.items()}
        task_chart(folder / "tasks.png", counts, titles)
    kinds = {kind: {side: sides[side] for side in FILES} for kind, sides in sorted(tally.sides.items())}
    totals = {side: tally.total(side) for side in FILES}
    result = DatasetResult(str(out), **totals, kinds=kinds, reasons=dict(reasons.most_common()))
    _tell(result)
    return result


def _decide(
    candidate: _Candidate, data: DataSection, duplicates: Duplicates, tally: _Tally
) -> tuple[str, str]:
    """Where a candidate goes (train, validation or rejected) and its line there; counts it."""
    reason = candidate.reason
    if candidate.example:
        reason = reject_reason(candidate.example)
    if candidate.example and data.deduplicate != "off":
        reason = reason or duplicates(candidate.example)
    if reason:
        side, line = "rejected", candidate.rejected(reason)
        tally.reasons[candidate.kind][reason] += 1
    else:
        side, line = side_of(candidate.group, data.validation_fraction), candidate.accepted()
        tally.characters[candidate.kind].append(len(candidate.text))
    tally.sides[candidate.kind][side] += 1
    return side, line


def _check(source: Source, place: str) -> _Input:
    """Find a source's file, importer and task before any work begins."""
    path = require_file(locate(source.path), f"{place}: the file")
    try:
        name = recognise(source.importer, path, source.task)
        needed = task(source.task) if source.task and name not in ("firefly", "text") else None
    except FireflyError as error:
        raise InputError(f"{place}: {error}") from error
    return _Input(source, path, name, needed)


def _candidates(given: _Input, tally: _Tally) -> Iterator[_Candidate]:
    """The examples of one source, up to its cap; a record without one comes with its reason."""
    cap = given.source.cap
    if cap is None and given.task:  # the task's own cap holds over all of its sources
        cap = max(0, given.task.cap - tally.records[given.kind])
    counts: dict[str, Any] = given.source.model_dump() | {
        "importer": given.importer,
        "sha256": sha256_file(given.path),
        "records": 0,
        "capped": False,
    }
    tally.sources.append(counts)
    for item in _imported(given):
        if not isinstance(item, Skipped):
            if cap is not None and counts["records"] >= cap:
                counts["capped"] = True
                return
            counts["records"] += 1
            tally.records[given.kind] += 1
        yield from _asked(item, given)


def _imported(given: _Input) -> Iterator[Imported]:
    """What the importer makes of each record of one source."""
    for line, record in read_records(given.path):
        yield from IMPORTERS[given.importer](record, Origin(given.path, line, given.source.task))


def _asked(item: Imported, given: _Input) -> Iterator[_Candidate]:
    """One imported record as examples: one for each variant that the recipe asks for."""
    if isinstance(item, Skipped):
        yield _Candidate(given.kind, item.source, "", item.text, reason=item.reason)
    elif not isinstance(item, Record):
        yield _candidate(item.example, item.group)
    else:
        assert given.task is not None
        full = [name for name, text in item.fields.items() if text]
        if given.task.eligible(item.fields) and not given.task.eligible(full):
            text = json.dumps(item.fields, ensure_ascii=False)
            yield _Candidate(given.kind, item.source, "", text, reason="empty_field")
            return
        for variant in range(given.source.repeat):
            yield _candidate(given.task.render(item.fields, source=item.source, variant=variant), item.group)


def _candidate(example: Example, group: str) -> _Candidate:
    text = f"{example.input}\n{example.target}" if example.input else example.target
    return _Candidate(example.kind, example.source, group, text, example)


def _card(data: DataSection, tally: _Tally, folder: Path) -> dict[str, Any]:
    """What the dataset holds, for people and for later stages."""
    known = load_tasks()
    everything = array("L")
    for lengths in tally.characters.values():
        everything.extend(lengths)
    kinds = {}
    for kind, sides in sorted(tally.sides.items()):
        described = {
            "title_zh": known[kind].title_zh,
            "title_en": known[kind].title_en,
            "metric": known[kind].metric,
            "licences": [f"{source.name}: {source.licence}" for source in known[kind].sources],
        } if kind in known else {}  # fmt: skip
        kinds[kind] = {side: sides[side] for side in FILES} | {
            "reasons": dict(sorted(tally.reasons[kind].items())),
            "characters": length_summary(tally.characters[kind]),
            **described,
        }
    return {
        "examples": {side: tally.total(side) for side in FILES},
        "validation_fraction": data.validation_fraction,
        "deduplicate": data.deduplicate,
        "characters": length_summary(everything),
        "kinds": kinds,
        "sources": tally.sources,
        "files": {name: sha256_file(folder / name) for name in FILES.values()},
    }


def _tell(result: DatasetResult) -> None:
    """Say in a few lines what was made and what was lost."""
    console.say(
        f"data: {result.train:,} training and {result.validation:,} validation examples "
        f"of {len(result.kinds)} tasks in {result.path}"
    )
    if result.rejected:
        why = ", ".join(f"{reason} {count:,}" for reason, count in result.reasons.items())
        console.say(f"data: {result.rejected:,} rejected ({why}); see {result.path}/{FILES['rejected']}")
    bare = [kind for kind, sides in result.kinds.items() if sides["train"] and not sides["validation"]]
    if bare:
        console.warn(f"no validation example for {', '.join(bare)}; raise data.validation_fraction")


def read_dataset(folder: Path, split: str = "train") -> Iterator[Example]:
    """Yield the examples of one side ("train" or "validation") of a dataset directory, in order.

    Raises `InputError` at once when the side is unknown or its file is missing, and later for a damaged line.
    """
    if split not in get_args(Split):
        raise InputError(f"Unknown split '{split}': {choices(split, get_args(Split))}.")
    path = folder / FILES[split]
    if not path.is_file():
        raise InputError(f"{path} does not exist; run `firefly data` first.")
    return _read(path)


def _read(path: Path) -> Iterator[Example]:
    if path.stat().st_size == 0:  # nothing was held out
        return
    for line, record in read_json_lines(path):
        yield Example.from_record(record, path, line)
