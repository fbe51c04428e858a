"""`firefly data`, first half: sources → records → examples → cleaned → deduplicated → mixed → one directory.

    train.jsonl, validation.jsonl   one Example a line, in the order of the sources
    rejects.jsonl.zst               everything that was dropped, with its file, line and reason
    card.json                       what is in it: counts, drops, lengths, licences, hashes
    README.md, report.html, *.png   the same for people

Three passes, none of which holds more than a few blocks of text. *Read*: every record becomes a candidate on disk,
asked, mended, judged and fingerprinted (`prepare`). *Decide*: repetitions, caps, weights and the side of the split
follow from the fingerprints alone (`dedup`, `mix`). *Write*: what stays is written out (`emit`). The first and the
last run in parallel, and the result has the same bytes for any number of processes. Which side a record falls on
depends on its own group alone: adding sources never moves a record from training to validation or back.
"""

from __future__ import annotations

import difflib
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from firefly import console
from firefly.data.candidates import KEPT, Names, Spool
from firefly.data.card import write_cards
from firefly.data.dedup import PERMUTATIONS, band_keys, mark_exact, mark_near
from firefly.data.emit import NOT_USED, TRAIN, VALIDATION, Chosen, emit
from firefly.data.engine import ordered_map
from firefly.data.example import Example
from firefly.data.importers import NEED_TASK, NoRecords, recognise
from firefly.data.mix import copies, multiplicities, within_cap
from firefly.data.prepare import Work, prepare, split_number
from firefly.data.readers import Numbered, files_of, read_tolerant
from firefly.data.stats import length_summary
from firefly.data.tasks import load_tasks, task
from firefly.errors import FireflyError, InputError, OutputError, choices
from firefly.files import directory_atomic, locate, read_json_lines, require_disk, sha256_file, write_json
from firefly.recipe import CleanSection, DataSection, Source

Split = Literal["train", "validation"]
FILES = {"train": "train.jsonl", "validation": "validation.jsonl", "rejected": "rejects.jsonl.zst"}
_RECORDS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 1 << 21
_SPACE = 6  # bytes on disk for each byte of the sources, at most: compressed text and the passes between


@dataclass(frozen=True)
class DatasetResult:
    """What `build_dataset` made; `kinds` maps a kind to its counts.

    A kind's counts are examples by side (train, validation), and candidates that were rejected, or left out by
    the mix (`unused`: over a cap, or thinned out by a weight).
    """

    path: str
    train: int
    validation: int
    rejected: int
    unused: int
    kinds: dict[str, dict[str, int]]
    reasons: dict[str, int]  # why records were rejected


@dataclass(frozen=True)
class _File:
    """One file of one source, checked."""

    source: int
    path: Path
    importer: str


@dataclass
class _Read:
    """What the first pass leaves behind, beside the candidates on disk."""

    spool: Spool
    files: list[_File]
    kinds: Names = field(default_factory=Names)
    reasons: Names = field(default_factory=lambda: Names(""))
    records: Counter[int] = field(default_factory=Counter)  # by file


@dataclass(frozen=True)
class _Decided:
    """What becomes of each candidate [N]."""

    kind: NDArray[np.uint16]
    source: NDArray[np.uint16]
    reason: NDArray[np.uint16]
    side: NDArray[np.uint8]
    copies: NDArray[np.int64]
    duplicate_of: NDArray[np.int64]  # −1: of none


def side_of(group: str, validation_fraction: float) -> Split:
    """The side of the split on which every record of a group lies, decided by the group's hash alone."""
    return "validation" if split_number(group) < validation_fraction * 2**64 else "train"


def build_dataset(data: DataSection, out: Path) -> DatasetResult:
    """Make the dataset directory `out`, which appears whole or not at all.

    Raises `InputError` for a bad source, record, task or importer, or when no example is left to train on;
    `OutputError` when `out` cannot be written or holds something that is not a dataset.
    """
    skip_bad = data.on_bad_record == "skip"
    files = [file for index, source in enumerate(data.sources) for file in _check(index, source, skip_bad)]
    if out.exists() and not (out / "card.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not a dataset; choose another output_dir, or remove it.")
    require_disk(out, _SPACE * sum(file.path.stat().st_size for file in files))
    with directory_atomic(out) as folder:
        read = _read_sources(data, files, folder / "candidates")
        decided = _decide(data, read)
        _write(data, read, decided, folder)
        characters = read.spool.column("characters")
        shutil.rmtree(read.spool.folder)
        result = _count(read, decided, out)
        if result.train == 0:
            why = ", ".join(f"{reason} {count:,}" for reason, count in result.reasons.items()) or "none"
            raise InputError(
                f"No example is left to train on: {result.validation:,} went to validation, {result.unused:,} were "
                f"left out by the mix and {result.rejected:,} were rejected ({why}). Check the sources, data.mix, or "
                "data.validation_fraction."
            )
        card = _card(data, read, decided, result, folder, characters)
        write_json(folder / "card.json", card)
        write_cards(folder, card)
    _tell(result, data)
    return result


def _check(index: int, source: Source, skip_bad: bool) -> list[_File]:
    """The files of a source with their importers, before any work begins."""
    place = f"data.sources[{index}]"
    files = []
    try:
        if source.directions and not source.task:
            raise InputError("directions are a task's; name it, too (task = …).")
        if source.directions and source.task:
            names = [direction.name for direction in task(source.task).directions]
            for name in sorted(set(source.directions).difference(names)):
                raise InputError(f"directions: task {source.task} has no '{name}'; {choices(name, names)}.")
        for path in files_of(locate(source.path)):
            try:
                name = recognise(source.importer, path, source.task)
            except NoRecords:
                if not skip_bad:
                    raise
                name = "none"  # reading it will say why
            files.append(_File(index, path, name))
        if source.task and any(file.importer in NEED_TASK for file in files):
            known = task(source.task).fields
            plain = all(file.importer == "records" for file in files)
            for name in sorted(source.fields.keys() - set(known)) if plain else []:
                raise InputError(
                    f"fields.{name}: task {source.task} has no such field; {choices(name, known)}."
                )
    except FireflyError as error:
        raise InputError(f"{place}: {error}") from error
    return files


def _read_sources(data: DataSection, files: list[_File], place: Path) -> _Read:
    """First pass: every record of every source becomes a candidate on disk."""
    read = _Read(Spool(place, PERMUTATIONS), files)
    total_bytes = sum(file.path.stat().st_size for file in files)
    fields: dict[int, set[str]] = {index: set() for index in range(len(data.sources))}
    with console.progress("read", total_bytes / 2**20, "MiB") as shown:
        works = _works(data, read, shown)
        for prepared in ordered_map(prepare, works, engine=data.engine, num_workers=data.num_workers):
            columns = prepared.columns.copy()  # what came from Ray cannot be written to
            for name, local, names in (
                ("kind", prepared.kinds, read.kinds),
                ("reason", prepared.reasons, read.reasons),
            ):
                numbers = np.array([names.number(one) for one in local], columns[name].dtype)
                columns[name] = numbers[columns[name]] if len(numbers) else columns[name]
            read.spool.add(prepared.bodies, columns, prepared.signatures)
            fields[prepared.source] |= prepared.names
    read.spool.close()
    for index, source in enumerate(data.sources):
        for name, there in source.fields.items():
            if fields[index] and there not in fields[index]:
                raise InputError(
                    f"data.sources[{index}].fields.{name} = '{there}': no record of {source.path} has a field of that "
                    f"name; {choices(there, sorted(fields[index]))}."
                )
    return read


def _works(data: DataSection, read: _Read, shown: console.Progress) -> Iterator[Work]:
    """The raw records of all files in blocks."""
    # With their times, since workers live on and remember what they have read.
    paths = map(Path, data.decontaminate)
    evaluation = tuple((str(path), path.stat().st_mtime_ns if path.exists() else 0) for path in paths)
    for number, file in enumerate(read.files):
        source = data.sources[file.source]
        make = partial(
            Work,
            source=file.source,
            file=number,
            path=file.path,
            importer=file.importer,
            kind=source.task,
            rename=source.fields,
            directions=tuple(source.directions),
            skip_bad=data.on_bad_record == "skip",
            clean=data.clean,
            evaluation=(evaluation, data.decontaminate_ngram),
            near=data.deduplicate == "near",
        )
        for records in _blocks(_records(file.path, data.on_bad_record == "skip")):
            read.records[number] += len(records)
            yield make(records=records)
        shown.advance(file.path.stat().st_size / 2**20, file.path.name)


def _records(path: Path, skip_bad: bool) -> Iterator[Numbered]:
    """The records of a file; with `skip_bad`, a place behind which nothing can be read is its last bad record."""
    records, last = read_tolerant(path), 0
    try:
        for last, record in records:
            yield last, record
    except InputError as error:
        if not skip_bad:
            raise
        console.warn(f"the rest of a file is left out: {error}")
        yield last + 1, error


def _blocks(records: Iterable[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Records in blocks of bounded count and size."""
    block: list[tuple[int, Any]] = []
    characters = 0
    for line, record in records:
        block.append((line, record))
        if isinstance(record, dict):
            characters += sum(len(value) for value in record.values() if isinstance(value, str | list))
        if len(block) >= _RECORDS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield block
            block, characters = [], 0
    if block:
        yield block


def _decide(data: DataSection, read: _Read) -> _Decided:
    """Second pass, without the texts: repetitions, caps, side of the split, number of copies."""
    spool = read.spool
    kind, source, reason = (spool.column(name) for name in ("kind", "source", "reason"))
    chance = spool.column("chance")
    duplicate_of = np.full(spool.num_candidates, -1, np.int64)

    if data.deduplicate != "off":
        _mark_repetitions(data, read, reason, duplicate_of)
    alive = reason == KEPT
    for index, given in enumerate(data.sources):
        if given.cap is not None:
            here = source == index
            alive &= ~here | within_cap(chance, alive & here, given.cap)
    capless = np.array([one.cap is None and one.task is not None for one in data.sources])
    known = load_tasks()
    for number, name in enumerate(read.kinds.all):
        here, cap = kind == number, data.mix.caps.get(name)
        if cap is None and name in known:  # the task's own cap is for sources that do not say
            here, cap = here & capless[source], known[name].cap
        if cap is not None:
            alive &= ~here | within_cap(chance, alive & here, cap)

    held_out = spool.column("group") < np.uint64(min(int(data.validation_fraction * 2**64), 2**64 - 1))
    side = np.where(alive, np.where(held_out, VALIDATION, TRAIN), NOT_USED).astype(np.uint8)
    repeat = np.array([one.repeat for one in data.sources], np.int64)[source]
    counts = dict(
        zip(
            read.kinds.all,
            np.bincount(kind[side == TRAIN], minlength=len(read.kinds.all)).tolist(),
            strict=True,
        )
    )
    weights = {name: known[name].weight if name in known else 1.0 for name in counts} | data.mix.weights
    wanted = multiplicities(counts, weights, data.mix.epochs, data.mix.temperature)
    amount = np.where(side == VALIDATION, 1, 0).astype(np.int64)
    for number, name in enumerate(read.kinds.all):
        here = (kind == number) & (side == TRAIN)
        amount[here] = copies(chance[here], wanted[name])
    amount *= repeat
    side[amount == 0] = NOT_USED
    return _Decided(kind, source, reason, side, amount, duplicate_of)


def _mark_repetitions(
    data: DataSection, read: _Read, reason: NDArray[np.uint16], duplicate_of: NDArray[np.int64]
) -> None:
    """Give repetitions their reason, and the candidate that stays instead."""
    spool = read.spool
    alive = np.flatnonzero(reason == KEPT)
    quality = spool.column("quality")[alive]
    found = mark_exact(spool.column("key")[alive], quality)
    reason[alive[found >= 0]] = read.reasons.number("duplicate")
    if data.deduplicate == "near":
        exact = found >= 0
        bands = spool.bands(partial(band_keys, threshold=data.near_threshold))
        found = mark_near(bands, spool.signatures(), quality, data.near_threshold, out=found)
        reason[alive[(found >= 0) & ~exact]] = read.reasons.number("near_duplicate")
    duplicate_of[alive[found >= 0]] = alive[found[found >= 0]]


def _write(data: DataSection, read: _Read, decided: _Decided, folder: Path) -> None:
    """Third pass: what stays and what does not, in the order of the sources."""
    import pyarrow

    places = [(folder / name).open("wb") for name in (FILES["train"], FILES["validation"])]
    rejects = pyarrow.output_stream(str(folder / FILES["rejected"]), compression="zstd")
    with (
        places[0] as train,
        places[1] as validation,
        rejects,
        console.progress("write", read.spool.num_candidates, "candidates") as shown,
    ):
        chosen = _chosen(read, decided, data.clean)
        for emitted in ordered_map(emit, chosen, engine=data.engine, num_workers=data.num_workers):
            train.write(emitted.train)
            validation.write(emitted.validation)
            rejects.write(emitted.rejects)
            shown.advance(emitted.num_candidates)


def _chosen(read: _Read, decided: _Decided, clean: CleanSection) -> Iterator[Chosen]:
    """The candidates in blocks, with what was decided about them."""
    file, line = read.spool.column("file"), read.spool.column("line")

    def place(candidate: int) -> str:
        return f"{read.files[file[candidate]].path.name}:{line[candidate]}" if candidate >= 0 else ""

    for block in read.spool.blocks:
        span = slice(block.first, block.first + block.count)
        yield Chosen(
            bodies=read.spool.bodies(block),
            kinds=[read.kinds.all[number] for number in decided.kind[span]],
            sources=[place(candidate) for candidate in range(span.start, span.stop)],
            reasons=[read.reasons.all[number] for number in decided.reason[span]],
            duplicate_of=[place(other) for other in decided.duplicate_of[span]],
            sides=decided.side[span],
            copies=decided.copies[span],
            clean=clean,
        )


def _count(read: _Read, decided: _Decided, out: Path) -> DatasetResult:
    kinds = {name: _counts(decided, decided.kind == number) for number, name in enumerate(read.kinds.all)}
    totals = {side: sum(counts[side] for counts in kinds.values()) for side in (*FILES, "unused")}
    reasons = _reasons(read, decided, slice(None))
    by_kind = dict(sorted(kinds.items()))
    return DatasetResult(str(out), **totals, kinds=by_kind, reasons=dict(reasons.most_common()))


def _counts(decided: _Decided, here: NDArray[np.bool_]) -> dict[str, int]:
    """Examples by side, and candidates that were rejected or left unused."""
    side, copies, rejected = decided.side[here], decided.copies[here], decided.reason[here] != KEPT
    return {
        "train": int(copies[side == TRAIN].sum()),
        "validation": int(copies[side == VALIDATION].sum()),
        "rejected": int(rejected.sum()),
        "unused": int(((side == NOT_USED) & ~rejected).sum()),
    }


def _reasons(read: _Read, decided: _Decided, here: Any) -> Counter[str]:
    numbers = np.bincount(decided.reason[here], minlength=len(read.reasons.all)).tolist()
    return Counter({
        name: count for name, count in zip(read.reasons.all, numbers, strict=True) if name and count
    })  # fmt: skip


def _card(
    data: DataSection,
    read: _Read,
    decided: _Decided,
    result: DatasetResult,
    folder: Path,
    characters: NDArray[Any],
) -> dict[str, Any]:
    """What the dataset holds, for people and for later stages."""
    known = load_tasks()
    kinds: dict[str, Any] = {}
    for name, counts in result.kinds.items():
        here = decided.kind == read.kinds.number(name)
        described = {
            "title_zh": known[name].title_zh,
            "title_en": known[name].title_en,
            "metric": known[name].metric,
        } if name in known else {}  # fmt: skip
        kinds[name] = counts | {
            "reasons": dict(sorted(_reasons(read, decided, here).items())),
            "characters": length_summary(_histogram(characters[here], decided.copies[here])),
            **described,
        }
    return {
        "examples": {side: getattr(result, side) for side in (*FILES, "unused")},
        "validation_fraction": data.validation_fraction,
        "deduplicate": data.deduplicate,
        "mix": data.mix.model_dump(),
        "clean": data.clean.model_dump(),
        "characters": length_summary(_histogram(characters, decided.copies)),
        "kinds": kinds,
        "sources": [_source_card(index, source, read, decided) for index, source in enumerate(data.sources)],
        "files": {name: sha256_file(folder / name) for name in FILES.values()},
    }


def _source_card(index: int, source: Source, read: _Read, decided: _Decided) -> dict[str, Any]:
    mine = [(number, file) for number, file in enumerate(read.files) if file.source == index]
    here = decided.source == index
    return source.model_dump() | {
        "licence": source.licence or _licence(source.task, {file.path.name for _, file in mine}),
        "files": [
            {
                "name": file.path.name,
                "importer": file.importer,
                "records": read.records[number],
                "sha256": sha256_file(file.path),
            }
            for number, file in mine
        ],
        "records": sum(read.records[number] for number, _ in mine),
        "candidates": int(here.sum()),
        **_counts(decided, here),
        "reasons": dict(sorted(_reasons(read, decided, here).items())),
    }


def _licence(kind: str | None, names: set[str]) -> str | None:
    """What the task's file says of files of these names, or of its records in general; None where it is silent."""
    known = load_tasks().get(kind or "")
    if known is None:
        return None
    told = [one for one in known.sources if one.file in names] or [
        one for one in known.sources if not one.file
    ]
    return "; ".join(f"{one.name}: {one.licence}" for one in told) or None


def _histogram(lengths: NDArray[Any], copies: NDArray[np.int64]) -> dict[int, int]:
    """How many examples have each number of characters."""
    used = copies > 0
    counts = np.bincount(lengths[used], weights=copies[used]).astype(np.int64)
    return {length: int(counts[length]) for length in np.flatnonzero(counts).tolist()}


def _tell(result: DatasetResult, data: DataSection) -> None:
    """Say in a few lines what was made and what was lost, and what in the recipe had no effect."""
    console.say(
        f"data: {result.train:,} training and {result.validation:,} validation examples "
        f"of {sum(sides['train'] + sides['validation'] > 0 for sides in result.kinds.values())} tasks in {result.path}"
    )
    if result.rejected:
        why = ", ".join(f"{reason} {count:,}" for reason, count in result.reasons.items())
        console.say(f"data: {result.rejected:,} rejected ({why}); see {result.path}/{FILES['rejected']}")
    if result.unused:
        console.say(f"data: {result.unused:,} left out by caps and weights; card.json has them by kind")
    for key in ("weights", "caps"):
        for kind in getattr(data.mix, key).keys() - result.kinds.keys():
            console.warn(
                f"data.mix.{key} names '{kind}', of which there is no record; {choices(kind, result.kinds)}"
            )
    known = load_tasks()
    for kind in result.kinds:
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.7)
        if kind not in known and near:
            console.warn(f"the kind '{kind}' is no known task; did you mean '{near[0]}'?")
    bare = [kind for kind, sides in result.kinds.items() if sides["train"] and not sides["validation"]]
    if bare and data.validation_fraction:
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
