"""Token frequencies over a corpus: which tokens the target language uses, and how often.

`corpus_texts` streams documents out of text and JSON Lines files (plain or compressed, files or folders);
`count_tokens` sends them in batches through the tokenizer and adds up how often each id occurs. Both keep
one batch in memory, so a corpus may be larger than the machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import progress
from firefly.errors import InputError, ModelError
from firefly.files import read_json_lines, read_lines
from firefly.prune.tokenizer import guarded

_BATCH_CHARACTERS = 1 << 20
_COMPRESSED = {".gz", ".xz", ".zst"}
_JSON = {".jsonl", ".json"}
_TEXT = {".txt", ".text"}
_LINES_AT_ONCE = 1000
_MOST_IDS = 1 << 24  # far above every real vocabulary; an id of 2³²−1 must not allocate 32 GiB


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str], total: int | None = None) -> NDArray[np.int64]:
    """Count how often each token id occurs in `texts`, without the special tokens that encoding adds.

    Args:
        tokenizer: used without truncation and padding.
        texts: the documents, streamed.
        total: how many documents there are, for the ETA; taken from `len(texts)` where that exists.

    Returns:
        counts [V] int64, V = highest id + 1.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    if size > _MOST_IDS:
        raise ModelError(
            f"The tokenizer has the id {size - 1}, which no real vocabulary reaches; fetch it again."
        )
    counts = np.zeros(size, dtype=np.int64)
    if total is None and isinstance(texts, Sequence):
        total = len(texts)
    with progress("count tokens", total, "documents") as bar:
        for batch in batches(texts):
            with guarded("tokenizing the corpus"):
                encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            ids = np.concatenate([np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings])
            counts += np.bincount(ids, minlength=size)
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
    """Yield the documents of text and JSON Lines files; folders are searched in name order.

    `.txt`: paragraphs (blocks between blank lines), or lines in a file without blank lines.
    `.jsonl`/`.json`: one object a line; its `text`, else its `messages`, else `input` and `target`, else all
    its strings. Both may end in `.gz`, `.xz` or `.zst`. Raises `InputError` naming file and line.
    """
    for path in paths:
        files = _files_in(Path(path)) if Path(path).is_dir() else [Path(path)]
        for file in files:
            kind = _kind(file)
            if kind in _JSON:
                for number, record in read_json_lines(file):
                    found = [text for text in _record_texts(record) if text]
                    if not found:
                        raise InputError(
                            f"{file}, line {number}: the record holds no text; give it a field 'text' (or "
                            "'messages', or 'input' and 'target'), or take the line out."
                        )
                    yield from found
            elif kind in _TEXT:
                yield from _text_documents(file)
            else:
                raise InputError(
                    f"The corpus file {file} is of an unknown kind '{file.suffix}'; use .txt, .jsonl or .json, "
                    "each also with .gz, .xz or .zst."
                )


def _kind(path: Path) -> str:
    """The suffix that tells how to read a file, without its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _files_in(folder: Path) -> list[Path]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path) in _JSON | _TEXT]
    if not found:
        raise InputError(
            f"The corpus folder {folder} holds no .txt, .jsonl or .json file (plain or compressed)."
        )
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


def _record_texts(record: dict[str, Any]) -> Iterator[str]:
    """The texts of one record, by the first of its known shapes."""
    if isinstance(record.get("text"), str):
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
