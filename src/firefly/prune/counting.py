"""Token frequencies over a corpus: which tokens the target language uses, and how often.

`corpus_texts` streams documents out of text, JSON, CSV and Parquet files (plain or compressed, files or
folders); `count_tokens` sends them in batches through the tokenizer, whose threads use every core, and adds
up how often each id occurs. Both keep one batch in memory, so a corpus may be larger than the machine.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import json
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import progress
from firefly.errors import InputError
from firefly.files import open_binary, read_json_lines, read_lines, require_file
from firefly.prune.tokenizer import guarded

_BATCH_CHARACTERS = 1 << 20
_COMPRESSED = {".gz", ".xz", ".zst"}
_LINES_AT_ONCE = 1000
_LONGEST_CELL = 1 << 27
_LONGEST_RECORD = 1 << 28
_BETWEEN_VALUES = re.compile(r"[\s,]*")
_TEXT_COLUMNS = ("text", "content", "messages", "input", "target", "instruction", "output")


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str], total: int | None = None) -> NDArray[np.int64]:
    """Count how often each token id occurs in `texts`, without the special tokens that encoding adds.

    Args:
        tokenizer: used without truncation and padding.
        texts: the documents, streamed.
        total: how many documents there are, for the ETA; taken from `len(texts)` where that exists.

    Returns:
        counts [V] int64, V = the number of tokens, or the highest id that occurs + 1 where ids have holes.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    counts = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    if total is None and isinstance(texts, Sequence):
        total = len(texts)
    with progress("count tokens", total, "documents") as bar:
        for batch in batches(texts):
            with guarded("tokenizing the corpus"):
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.int64)
            found = np.bincount(ids, minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            bar.advance(len(batch))
    return counts


def batches(texts: Iterable[str], most_characters: int = _BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Group documents so that a batch holds about `most_characters` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text) + 64
        if characters >= most_characters:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def corpus_texts(paths: Iterable[Path]) -> Iterator[str]:
    """Yield the documents of text, JSON, CSV and Parquet files; folders are searched in name order.

    `.txt`: paragraphs (blocks between blank lines), or lines in a file without blank lines.
    `.jsonl`: one object a line; `.json`: an array, an object, or JSON Lines. `.csv`, `.tsv`: one row a record,
    with a header if its first row names a known field. A record's text is its `text`, else its `messages`,
    else `input` and `target`, else all its strings. All but `.parquet` may also end in `.gz`, `.xz` or `.zst`.
    Raises `InputError` naming file and line.
    """
    for path in paths:
        for file in _files_in(Path(path)) if Path(path).is_dir() else [Path(path)]:
            kind = _kind(file)
            if kind in _DOCUMENTS:
                yield from _DOCUMENTS[kind](file)
            elif kind in _RECORDS:
                for place, record in _RECORDS[kind](file):
                    found = [text for text in _record_texts(record) if text]
                    if not found:
                        raise InputError(
                            f"{file}, {place}: the record holds no text; give it a field 'text' (or "
                            "'messages', or 'input' and 'target'), or take it out."
                        )
                    yield from found
            else:
                require_file(file, "The corpus file")
                raise InputError(
                    f"The corpus file {file} is of an unknown kind '{file.suffix}'; use .txt, .jsonl, .json, .csv or "
                    ".tsv, each also with .gz, .xz or .zst, or .parquet."
                )


def _kind(path: Path) -> str:
    """The suffix that tells how to read a file, without its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED and suffixes[-2] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files_in(folder: Path) -> list[Path]:
    known = _DOCUMENTS.keys() | _RECORDS.keys()
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path) in known]
    if not found:
        raise InputError(f"The corpus folder {folder} holds no {', '.join(sorted(known))} file.")
    return found


def _text_documents(path: Path) -> Iterator[str]:
    """Paragraphs where blank lines part them, single lines where none is seen."""
    block: list[str] = []
    has_blank = False

    def documents() -> list[str]:
        return ["\n".join(block)] if has_blank and block else list(block)

    for _, line in read_lines(path):
        if line.strip():
            block.append(line)
            if len(block) < _LINES_AT_ONCE:
                continue
        else:
            has_blank = True
        yield from documents()
        block = []
    yield from documents()


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, record in read_json_lines(path):
        yield f"line {number}", record


def _json_values(path: Path) -> Iterator[tuple[str, Any]]:
    """The elements of an array, or whole values one after the other, parsed while they are read."""
    require_file(path, "The file")
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    buffer, at, number = "", 0, 0
    in_array: bool | None = None
    try:
        with open_binary(path) as stream:
            ended = False
            while not ended or at < len(buffer):
                at = _BETWEEN_VALUES.match(buffer, at).end()  # type: ignore[union-attr]
                if in_array is None and at < len(buffer):
                    in_array = buffer[at] == "["
                    at += in_array
                elif in_array and buffer.startswith("]", at):
                    at, in_array = at + 1, False
                elif value := _value_at(buffer, at, ended):
                    at, number = value[1], number + 1
                    yield f"record {number}", value[0]
                elif (ended and at < len(buffer)) or len(buffer) - at > _LONGEST_RECORD:
                    raise InputError(f"{path}, record {number + 1}: not valid JSON; mend it or take it out.")
                elif not ended:  # asking for twice as much keeps the re-reading linear
                    block = stream.read(max(1 << 20, len(buffer) - at))
                    ended = not block
                    buffer, at = buffer[at:] + decode(bytes(block), ended), 0
    except (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError) as error:
        raise InputError(f"{path}: damaged or not UTF-8 after record {number} ({error}).") from error
    if in_array:
        raise InputError(f"{path}: the JSON array breaks off after record {number}; fetch the file again.")


def _value_at(buffer: str, at: int, ended: bool) -> tuple[Any, int] | None:
    """The JSON value that begins at `at` and where it ends; None if it is not all there."""
    with contextlib.suppress(ValueError):
        value, end = json.JSONDecoder().raw_decode(buffer, at)
        if end < len(buffer) or ended:
            return value, end
    return None


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dicts if the first row names a known field, else as lists of cells."""
    csv.field_size_limit(_LONGEST_CELL)
    lines = (line + "\n" for _, line in read_lines(path))
    rows = csv.reader(lines, delimiter="\t" if _kind(path) == ".tsv" else ",")
    header: list[str] | None = None
    try:
        for number, row in enumerate(rows, start=1):
            if number == 1 and set(_TEXT_COLUMNS) & set(row):
                header = row
            elif row:
                yield f"row {number}", dict(zip(header, row, strict=False)) if header else row
    except csv.Error as error:
        raise InputError(f"{path}, line {rows.line_num}: not valid CSV ({error}); mend the file.") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Rows as dicts, a thousand in memory at a time; only the text's columns are read where their names tell."""
    import pyarrow
    from pyarrow import parquet

    require_file(path, "The file")
    try:
        with parquet.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in _TEXT_COLUMNS] or None
            number = 0
            for batch in file.iter_batches(batch_size=_LINES_AT_ONCE, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a sound Parquet file ({error}); fetch it again.") from error


def _record_texts(record: Any) -> Iterator[str]:
    """The texts of one record, by the first of its known shapes."""
    if not isinstance(record, dict):
        yield from strings_in(record)
    elif isinstance(record.get("text"), str):
        yield record["text"]
    elif isinstance(record.get("messages"), list):
        for message in record["messages"]:
            yield from strings_in(message.get("content") if isinstance(message, dict) else message)
    elif "input" in record or "target" in record:
        yield from strings_in([record.get("input"), record.get("target")])
    else:
        yield from strings_in(record)


def strings_in(value: Any) -> Iterator[str]:
    """Every string inside a JSON value, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings_in(item)


_DOCUMENTS: dict[str, Callable[[Path], Iterator[str]]] = {".txt": _text_documents, ".text": _text_documents}
_RECORDS: dict[str, Callable[[Path], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json_values,
    ".csv": _rows,
    ".tsv": _rows,
    ".parquet": _parquet_rows,
}
