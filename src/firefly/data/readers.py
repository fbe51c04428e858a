"""Readers know file formats: whatever the file, it becomes a stream of (number, record).

    .jsonl .ndjson   one JSON object a line                                number: the line
    .json            an array of objects, one object, or JSON Lines        the object's place, or the line
    .csv             a header, then a row a record; cells may be quoted     the row's first line
    .tsv             the same, tabs between cells, no quoting               the line
    .txt .md         one line a record: {"text": line}; blank lines pass    the line
    .parquet         a row a record                                        the row

All but Parquet also with .gz, .xz or .zst behind them. Memory is one block of a file, and at most one line.
Nothing is guessed: a line that is not a record is an `InputError` with file and line, which `read_records`
raises and `read_tolerant` hands over in the record's place.
"""

from __future__ import annotations

import codecs
import csv
import glob
import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from firefly.errors import InputError, choices
from firefly.files import (
    JSON_DECODER,
    LONGEST_LINE_BYTES,
    BadLine,
    RefusedJSON,
    check_json,
    damage_named,
    json_object,
    not_json,
    open_binary,
    read_lines_tolerant,
    require_file,
)

Numbered = tuple[int, dict[str, Any] | InputError]
_COMPRESSED = (".gz", ".xz", ".zst")
_ROWS_AT_ONCE = 1000
_WHITE = re.compile(r"[ \t\n\r]*")


def files_of(path: Path) -> list[Path]:
    """The files that a path means: itself, those of a folder and its subfolders, or those that match a pattern.

    In name order. A folder yields the files of a known kind, without hidden ones. Raises `InputError` when there
    is none.
    """
    if path.is_dir():
        found = [
            file
            for file in sorted(path.rglob("*"))
            if kind_of(file) in _READERS
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
        if not found:
            raise InputError(f"The folder {path} holds no file of a known kind ({', '.join(_READERS)}).")
        return found
    if path.exists() or not glob.has_magic(str(path)):
        return [require_file(path, "The file")]
    matches = sorted(Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207  absolute patterns
    if not matches:
        raise InputError(
            f"No file matches the pattern {path}; check it (relative paths start at {Path.cwd()})."
        )
    return sorted({file for match in matches for file in files_of(match)})


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, record) of a file; raises `InputError` naming file and line at the first bad one."""
    for number, record in read_tolerant(path):
        if isinstance(record, InputError):
            raise record
        yield number, record


def read_tolerant(path: Path) -> Iterator[Numbered]:
    """Yield (number, record) of a file, or the `InputError` in the place of a bad record, and go on behind it.

    Raises at once for an unknown kind, and while reading when nothing behind the bad place can be read: a missing,
    empty or unreadable file, broken compression, a JSON array that breaks off.
    """
    kind = kind_of(path)
    if kind not in _READERS:
        raise InputError(
            f"{path}: cannot tell the format from the name; {choices(kind, _READERS)} "
            "(all but .parquet also with .gz, .xz or .zst behind)."
        )
    return _READERS[kind](path)


def kind_of(path: Path) -> str:
    """The suffix that tells the format, without a compression's behind it: ".jsonl" for a.jsonl.gz."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    kind = name.suffix.lower()
    return "" if kind == ".parquet" and name is not path else kind


def _text_lines(path: Path) -> Iterator[Numbered]:
    for number, line in read_lines_tolerant(path):
        if isinstance(line, BadLine):
            yield number, line
        elif line and not line.isspace():
            yield number, {"text": line}


def _json_lines(path: Path) -> Iterator[Numbered]:
    for number, line in read_lines_tolerant(path):
        if isinstance(line, BadLine):
            yield number, line
        elif line and not line.isspace():
            try:
                record: dict[str, Any] | InputError = json_object(line, f"{path}, line {number}")
            except InputError as error:
                record = error
            yield number, record


def _json_file(path: Path) -> Iterator[Numbered]:
    """JSON Lines when one of the first two lines is a whole JSON object; else an array, or objects in succession."""
    with (
        damage_named(path, lambda: "at its beginning"),
        open_binary(require_file(path, "The file")) as stream,
    ):
        in_array = _JSONText(path, stream).peek() == "["
    if not in_array:
        lines = (line for _, line in read_lines_tolerant(path) if isinstance(line, BadLine) or line.strip())
        if any(isinstance(line, BadLine) or _is_object(line) for line in islice(lines, 2)):
            yield from _json_lines(path)
            return
    yield from _json_values(path)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_values(path: Path) -> Iterator[Numbered]:
    """The elements of an array, or values one after the other, parsed while they are read."""
    number = 0
    with damage_named(path, lambda: f"after record {number}"), open_binary(path) as stream:
        text = _JSONText(path, stream)
        if text.peek() != "[":
            while text.peek():
                number += 1
                yield number, text.object(number)
            return
        text.at += 1
        mark = "," if text.peek() != "]" else ""
        while mark == ",":
            number += 1
            yield number, text.object(number)
            mark = text.peek()
            text.at += mark == ","
        if not mark and number:
            raise InputError(
                f"{path}: the JSON array breaks off after record {number}; fetch the file again."
            )
        text.at += 1
        if mark not in ("", "]") or text.peek():
            raise text.refused(number, f"'{mark or text.peek()}' is out of place")


class _JSONText:
    """A long JSON text of which only the piece being parsed is in memory."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.at = 0  # the next character, in the piece
        self._piece = ""
        self._path, self._stream = path, stream
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._lines_before, self._ended = 0, False

    def peek(self) -> str:
        """The next character that is not white space, at which `at` then stands; "" at the text's end."""
        while True:
            self.at = _WHITE.match(self._piece, self.at).end()  # type: ignore[union-attr]  # matches everywhere
            if self.at < len(self._piece) or self._ended:
                return self._piece[self.at : self.at + 1]
            self._read()

    def object(self, number: int) -> dict[str, Any] | InputError:
        """The object that begins at `at`, which moves behind it, or why it is no record."""
        self.peek()
        while (found := self._value(number)) is None:
            self._read()
        record, self.at = found
        where = f"{self._path}, record {number}"
        if isinstance(record, RefusedJSON):
            return not_json(record, where)
        if not isinstance(record, dict):
            return InputError(f"{where}: a JSON {type(record).__name__} where an object is needed.")
        return record

    def refused(self, number: int, why: str, at: int | None = None) -> InputError:
        """The sentence about a place behind which nothing can be read."""
        line = self._lines_before + self._piece.count("\n", 0, self.at if at is None else at) + 1
        return InputError(
            f"{self._path}, line {line}: record {number} is not valid JSON ({why}); mend it, or write JSON Lines, "
            "where one bad line does not spoil the others."
        )

    def _value(self, number: int) -> tuple[Any, int] | None:
        """The value (or why it is refused) and its end; None when the piece does not hold all of it."""
        piece, at = self._piece, self.at
        try:
            try:
                record, end = JSON_DECODER.raw_decode(piece, at)
                check_json(record, piece, at, end)
            except RefusedJSON as error:
                record, end = error, json.JSONDecoder().raw_decode(piece, at)[1]
        except json.JSONDecodeError as error:
            # More text can mend an error that lies at the piece's end, or a string without its end.
            near_end = error.pos >= len(piece) - len("-Infinity")
            if self._ended or not (near_end or error.msg.startswith("Unterminated string")):
                raise self.refused(number, error.msg, error.pos) from error
            return None
        except RecursionError as error:
            raise self.refused(number, "nested too deeply") from error
        return (record, end) if end < len(piece) or self._ended else None

    def _read(self) -> None:
        """Take in more; twice as much when a value was not all there, so that re-parsing stays linear."""
        rest = len(self._piece) - self.at
        if rest > LONGEST_LINE_BYTES:
            raise self.refused(0, f"longer than {LONGEST_LINE_BYTES >> 20} MiB")
        block = bytes(self._stream.read(max(1 << 20, rest)))
        self._ended = not block
        self._lines_before += self._piece.count("\n", 0, self.at)
        try:
            self._piece, self.at = self._piece[self.at :] + self._decode(block, self._ended), 0
        except UnicodeDecodeError as error:
            line = (
                self._lines_before + self._piece.count("\n", self.at) + block.count(b"\n", 0, error.start) + 1
            )
            raise InputError(
                f"{self._path}, line {line}: not valid UTF-8; convert the file to UTF-8."
            ) from error


def _table(path: Path) -> Iterator[Numbered]:
    """Rows of a .csv or .tsv file under the names of its first row; every row has a cell for every name."""
    # A module-wide setting, and the only one: Python's own limit of 128 KiB is shorter than a chapter of a novel.
    csv.field_size_limit(LONGEST_LINE_BYTES)
    bad: list[InputError] = []
    last = 0

    def lines() -> Iterable[str]:
        nonlocal last
        for number, line in read_lines_tolerant(path):
            last = number
            if isinstance(line, BadLine):
                bad.append(line)
            yield (line.text if isinstance(line, BadLine) else line) + "\n"  # its quotes still count

    if kind_of(path) == ".tsv":
        rows = csv.reader(lines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        rows = csv.reader(lines(), strict=True)
    header: list[str] | None = None
    while True:
        first = last + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            row = []
            bad.append(InputError(f"{path}, line {first}: not valid CSV ({error}); mend the row's quotes."))
        if header is None:
            if bad:
                raise bad[0]
            if row:
                header = _header(row, f"{path}, line {first}")
        elif bad:
            yield first, bad[0]
            bad.clear()
        elif len(row) == len(header):
            yield first, dict(zip(header, row, strict=True))
        elif row:
            yield (
                first,
                InputError(
                    f"{path}, line {first}: {len(row)} cells where the header names {len(header)} "
                    f"({', '.join(header)}); mend the row."
                ),
            )


def _header(row: list[str], where: str) -> list[str]:
    twice = next((name for index, name in enumerate(row) if name in row[:index]), None)
    if twice is not None:
        raise InputError(f"{where}: the header names '{twice}' twice; give every column its own name.")
    return row


def _parquet_rows(path: Path) -> Iterator[Numbered]:
    import pyarrow
    from pyarrow import parquet

    require_file(path, "The file")
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE):
                try:
                    records: list[Any] = batch.to_pylist()
                except UnicodeDecodeError:  # one row spoils the batch: take each alone
                    records = [_parquet_row(batch, index) for index in range(batch.num_rows)]
                for record in records:
                    number += 1
                    if isinstance(record, UnicodeDecodeError):
                        yield number, InputError(f"{path}, row {number}: not valid UTF-8; mend the row.")
                    else:
                        yield number, record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{path} is not a sound Parquet file after row {number} ({error}); fetch it again."
        ) from error


def _parquet_row(batch: Any, index: int) -> Any:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


_READERS: dict[str, Callable[[Path], Iterator[Numbered]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": _table,
    ".tsv": _table,
    ".txt": _text_lines,
    ".md": _text_lines,
    ".parquet": _parquet_rows,
}
