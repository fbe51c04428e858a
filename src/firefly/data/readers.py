"""Readers know file formats: whatever the file, it becomes a stream of (line number, record).

    .jsonl .json .ndjson   one JSON object a line
    .txt .md               one line a record: {"text": line}; blank lines are layout and passed over

Each also with .gz, .xz or .zst behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firefly.errors import InputError
from firefly.files import read_json_lines, read_lines


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line from 1, record) of a file; raises `InputError` naming file and line."""
    kind = (path.with_suffix("") if path.suffix in (".gz", ".xz", ".zst") else path).suffix
    if kind in (".jsonl", ".json", ".ndjson"):
        yield from read_json_lines(path)
    elif kind in (".txt", ".md"):
        yield from ((line, {"text": text}) for line, text in read_lines(path) if text.strip())
    else:
        raise InputError(
            f"{path}: cannot tell the format from the name; call it .jsonl (or .txt for plain text), with .gz, .xz "
            "or .zst behind it when compressed."
        )
