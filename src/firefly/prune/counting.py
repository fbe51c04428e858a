"""Token frequencies over a corpus: which tokens the target language uses, and how often.

`corpus_texts` streams documents out of all the formats that `firefly.data.readers` knows; `count_tokens` sends
them in batches through the tokenizer, whose threads use every core, and adds up how often each id occurs. Both
keep one batch in memory, so a corpus may be larger than the machine.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import progress
from firefly.data.engine import ordered_map
from firefly.data.readers import files_of, kind_of, read_records
from firefly.errors import InputError
from firefly.files import read_lines
from firefly.prune.sample import Sample
from firefly.prune.tokenizer import guarded
from firefly.recipe import Engine

_BATCH_CHARACTERS = 1 << 20
_LINES_AT_ONCE = 1000
_PROSE = (".txt", ".md")
_UNITS = {".parquet": "row", ".json": "record"}  # what the reader's numbers count; else lines


def count_tokens(tokenizer: Tokenizer, texts: Iterable[str], total: int | None = None) -> NDArray[np.int64]:
    """Count how often each token id occurs in `texts`, without the special tokens that encoding adds.

    Args:
        tokenizer: used without truncation and padding.
        texts: the documents, streamed.
        total: how many documents there are, for the ETA; taken from `len(texts)` where that exists.

    Returns:
        counts [V] int64, V = the number of tokens, or the highest id that occurs + 1 where ids have holes.
    """
    if total is None and isinstance(texts, Sequence):
        total = len(texts)
    return count_corpora(tokenizer, [("", texts)], total)


def count_corpora(
    tokenizer: Tokenizer,
    corpora: Iterable[tuple[str, Iterable[str]]],
    total: int | None = None,
    sample: Sample | None = None,
    engine: Engine = "local",
) -> NDArray[np.int64]:
    """`count_tokens` over several corpora (name, documents), of which `sample` may keep some with their ids.

    `engine`: encoded here, by the tokenizer's own threads, or on a Ray cluster.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    on_their_way: deque[tuple[str, list[str]]] = deque()

    def blocks() -> Iterator[list[str]]:
        for name, texts in corpora:
            for batch in batches(texts):
                on_their_way.append((name, batch))
                yield batch

    def work(batch: list[str]) -> list[bytes]:
        return encode(tokenizer, batch, "the corpus")

    counts = np.zeros(tokenizer.get_vocab_size(with_added_tokens=True), dtype=np.int64)
    with progress("count tokens", total, "documents") as bar:
        for encoded in ordered_map(work, blocks(), engine=engine, num_workers=0 if engine == "ray" else 1):
            name, batch = on_their_way.popleft()
            found = np.bincount(np.frombuffer(b"".join(encoded), np.uint32), minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
            if sample is not None:
                sample.take(name, batch, encoded)
            bar.advance(len(batch))
    return counts


def encode(tokenizer: Tokenizer, texts: list[str], what: str) -> list[bytes]:
    """The ids of each text, no special tokens added, as uint32: a tenth of the memory of Python's integers."""
    with guarded(f"tokenizing {what}"):
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [array("I", encoding.ids).tobytes() for encoding in encodings]


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
    """Yield the documents of files, folders and patterns, in any format of `firefly.data.readers`.

    `.txt`, `.md`: paragraphs (blocks between blank lines), or lines in a file without blank lines. A record's
    text is its `text`, else its `messages`, else `input` and `target`, else all its strings. Raises
    `InputError` naming file and line.
    """
    for path in paths:
        for file in files_of(Path(path)):
            yield from (_paragraphs if kind_of(file) in _PROSE else _texts_of_records)(file)


def _paragraphs(path: Path) -> Iterator[str]:
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


def _texts_of_records(file: Path) -> Iterator[str]:
    for number, record in read_records(file):
        found = [text for text in _record_texts(record) if text]
        if not found:
            raise InputError(
                f"{file}, {_UNITS.get(kind_of(file), 'line')} {number}: the record holds no text; give it a field "
                "'text' (or 'messages', or 'input' and 'target'), or take it out."
            )
        yield from found


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
