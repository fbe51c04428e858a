"""A tokens directory: the dataset as memory-mapped token ids, loss mask and document borders.

    SPLIT/tokens.bin    ids of all samples, one after the other (uint16 or uint32)
    SPLIT/mask.bin      one byte a token: 1 where the model learns to produce it
    SPLIT/borders.npy   int64 [N + 1]: sample i is tokens[borders[i] : borders[i + 1]]
    SPLIT/kinds.npy     uint16 [N]: index into index.json's `kinds`
    SPLIT/bytes.npy     int64 [N]: UTF-8 bytes of the text that is learned, for bits per byte
    SPLIT/origins.npy   int64 [N]: line of the dataset's SPLIT.jsonl, counted from 0
    index.json          counts, cuts by kind and reason, the tokenizer's hash, every file's hash

Of preferences each gives two samples in a row, the chosen answer's and the rejected one's; index.json then says
`pairs`. A dataset holds preferences alone, or none.

Lines are rendered, encoded, masked and cut in blocks by worker processes and appended in order, so the bytes are the
same for any number of workers, and memory does not grow with the dataset. In each worker a faster encoder works only
after its proof; every 100th block and the last one of a split are encoded by the standard one too, and after a
difference everything since the last such block is done again without it.

Opening a directory with another tokenizer is an error, not a surprise.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress, say, warn
from firefly.data.chatformat import ChatFormat, Encode, Rendered, RenderedBlock, open_format
from firefly.data.dataset import FILES
from firefly.data.encoder import ENCODERS, fastest
from firefly.data.engine import call_everywhere, ordered_map
from firefly.data.example import Example
from firefly.data.overlong import fit, fit_pair
from firefly.data.stats import length_chart
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, ModelError
from firefly.files import directory_atomic, locate, sha256_file, write_json
from firefly.recipe import DataSection

SPLITS = ("train", "validation")
_BLOCK_BYTES = 1 << 18
_AUDIT_EVERY = 100  # blocks
_SMALL_BYTES = 4 << 20  # a smaller file is encoded before workers and faster encoders would be ready
_ENCODERS = tuple(ENCODERS)  # the faster encoders to try


@dataclass(frozen=True)
class TokensResult:
    """What `encode_dataset` made: samples and tokens by split, and every cut by kind and reason."""

    output: str
    samples: dict[str, int]
    tokens: dict[str, int]
    target_tokens: dict[str, int]
    longest_tokens: int
    cuts: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """One sample: `ids` [L] and `mask` [L], its kind, and where it stands in the dataset."""

    ids: NDArray[Any]
    mask: NDArray[Any]
    kind: str
    origin: int


@dataclass(frozen=True)
class Tokens:
    """One split of a tokens directory, memory-mapped. N samples, T tokens in all."""

    ids: NDArray[Any]  # T
    mask: NDArray[Any]  # T
    borders: NDArray[np.int64]  # N + 1
    kinds: NDArray[Any]  # N
    target_bytes: NDArray[np.int64]  # N
    origins: NDArray[np.int64]  # N
    kind_names: tuple[str, ...]
    max_seq_length: int
    pairs: bool = False  # samples 2i and 2i + 1 are the chosen and the rejected answer to one question

    @classmethod
    def open(cls, directory: Path, split: str, tokenizer_sha256: str | None = None) -> Tokens:
        """Map one split; raises `InputError` when it is missing or damaged, `ModelError` for a wrong tokenizer."""
        index = _read_index(directory)
        if tokenizer_sha256 is not None and index["tokenizer_sha256"] != tokenizer_sha256:
            raise ModelError(
                f"{directory} was made with another tokenizer (hash {index['tokenizer_sha256'][:12]}, the model's is "
                f"{tokenizer_sha256[:12]}); run `firefly data` again with this model."
            )
        place = directory / split
        for name, digest in index["sha256"].items():
            path = directory / name
            if name.startswith(f"{split}/") and (not path.is_file() or sha256_file(path) != digest):
                raise InputError(
                    f"{path} is missing or damaged; delete {directory} and run `firefly data` again."
                )
        num_tokens = int(index["tokens"][split])

        def mapped(name: str, dtype: Any) -> NDArray[Any]:
            if num_tokens == 0:
                return np.zeros(0, dtype)
            return np.memmap(place / name, dtype=dtype, mode="r", shape=(num_tokens,))

        return cls(
            ids=mapped("tokens.bin", np.dtype(index["dtype"])),
            mask=mapped("mask.bin", np.uint8),
            borders=np.load(place / "borders.npy"),
            kinds=np.load(place / "kinds.npy"),
            target_bytes=np.load(place / "bytes.npy"),
            origins=np.load(place / "origins.npy"),
            kind_names=tuple(index["kinds"]),
            max_seq_length=int(index["max_seq_length"]),
            pairs=bool(index.get("pairs")),
        )

    def __len__(self) -> int:
        return len(self.borders) - 1

    def sample(self, number: int) -> Sample:
        """Sample `number`, counted from 0."""
        span = slice(self.borders[number], self.borders[number + 1])
        kind = self.kind_names[self.kinds[number]]
        return Sample(self.ids[span], self.mask[span], kind, int(self.origins[number]))


def _read_index(directory: Path) -> dict[str, Any]:
    """index.json of a tokens directory; raises `InputError` for one that is missing or damaged."""
    path = directory / "index.json"
    if not path.is_file():
        raise InputError(
            f"{directory} is not a tokens directory (no index.json); make it with `firefly data`."
        )
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        index = None
    needed = {"tokens", "kinds", "dtype", "max_seq_length", "tokenizer_sha256", "sha256"}
    if not isinstance(index, dict) or not needed <= set(index):
        raise InputError(f"{path} is damaged; delete {directory} and run `firefly data` again.")
    return index


def encode_dataset(dataset: Path, model: Path, data: DataSection, out: Path) -> TokensResult:
    """Render and encode every example of a dataset directory with the tokenizer of `model`.

    Raises `InputError` for a damaged line, or when a sample is too long and the recipe does not say what to do.
    """
    model = locate(str(model))
    for split in SPLITS:
        if not (dataset / FILES[split]).is_file():
            raise InputError(f"{dataset / FILES[split]} does not exist; run `firefly data` first.")
    if (dataset / FILES["train"]).stat().st_size < _SMALL_BYTES:
        job = _Job(model, dataset, data, uuid4().hex, 1, ())
    else:
        job = _Job(model, dataset, data, uuid4().hex, data.num_workers, _ENCODERS)
    facts = call_everywhere(partial(_facts, job), engine=data.engine, num_workers=job.workers)
    dtype = np.dtype(np.uint16 if facts.highest_id < 1 << 16 else np.uint32)
    kinds: dict[str, int] = {}
    with directory_atomic(out) as place:
        writers = {}
        for split in SPLITS:
            writers[split] = _SplitWriter(place / split, dtype, kinds, data.max_seq_length)
            if not _encode_split(job, split, writers[split]):
                job = replace(job, encoders=())
        if writers["train"].counts["samples"] == 0:
            raise InputError(f"{dataset} leaves no training sample of at most {data.max_seq_length} tokens.")
        examples, preferences = (
            sum(writer.counts[name] for writer in writers.values()) for name in ("examples", "preferences")
        )
        if 0 < preferences < examples:
            raise InputError(
                f"{dataset} mixes {preferences:,} preferences (chosen, rejected) with {examples - preferences:,} plain "
                "examples; use a recipe of its own for each."
            )
        cuts = sum((writer.cuts for writer in writers.values()), Counter())
        by_kind: dict[str, dict[str, int]] = {}
        for (kind, reason), count in sorted(cuts.items()):
            by_kind.setdefault(kind, {})[reason] = count
        histogram = np.sum([writer.histogram for writer in writers.values()], axis=0)
        totals = {
            name: {split: writer.counts[name] for split, writer in writers.items()}
            for name in ("samples", "tokens", "target_tokens")
        }
        result = TokensResult(
            str(out), **totals, longest_tokens=int(np.flatnonzero(histogram)[-1]), cuts=by_kind
        )
        lengths = np.repeat(np.arange(len(histogram), dtype=np.uint32), histogram)
        length_chart(place / "lengths.png", lengths, "token")
        index = asdict(result)
        del index["output"]
        index |= {
            "kinds": list(kinds),
            "dtype": dtype.name,
            "max_seq_length": data.max_seq_length,
            "pairs": preferences > 0,
            "chat_format": data.chat_format,
            "stop_ids": list(facts.stop_ids),
            "tokenizer_sha256": facts.tokenizer_sha256,
            "sha256": {
                path.relative_to(place).as_posix(): sha256_file(path)
                for path in sorted(place.rglob("*"))
                if path.suffix in {".bin", ".npy"}
            },
        }
        write_json(place / "index.json", index)
    _tell(by_kind)
    return result


def _tell(cuts: dict[str, dict[str, int]]) -> None:
    """Print what was cut, a line a kind and a column a reason."""
    if not cuts:
        return
    reasons = sorted({reason for counts in cuts.values() for reason in counts})
    width = max(map(len, [*cuts, "kind"]))
    say(f"encode: samples longer than data.max_seq_length\n  {'kind':<{width}}  {'  '.join(reasons)}")
    for kind, counts in cuts.items():
        cells = (f"{counts.get(reason, 0):>{len(reason)},}" for reason in reasons)
        say(f"  {kind:<{width}}  {'  '.join(cells)}")


@dataclass(frozen=True)
class _Job:
    """What a worker must know; it travels with every block. `run`: no two runs have the same."""

    model: Path
    dataset: Path
    data: DataSection
    run: str
    workers: int
    encoders: tuple[str, ...]  # the faster ones to try


@dataclass(frozen=True)
class _Lines:
    """Whole lines of a file; `first` is the first one's number in it, from 1."""

    path: Path
    first: int
    content: bytes
    audit: bool


@dataclass(frozen=True)
class _Encoded:
    """The samples of one block. `names` are its kinds, `origins` count its examples from 0.

    `agreed`: an audit found no difference; `refused`: why the standard encoder works, where a faster one should have.
    """

    ids: NDArray[Any]
    mask: NDArray[np.uint8]
    lengths: NDArray[np.int64]
    kinds: NDArray[np.int64]
    names: list[str]
    target_bytes: NDArray[np.int64]
    origins: NDArray[np.int64]
    cuts: Counter[tuple[str, str]]
    num_examples: int
    num_preferences: int
    audit: bool
    agreed: bool
    refused: str


def _encode_split(job: _Job, split: str, writer: _SplitWriter) -> bool:
    """Encode one file into `writer`; returns whether the faster encoder may go on."""
    path = job.dataset / FILES[split]
    if path.stat().st_size <= _BLOCK_BYTES:  # a single block, which would be audited
        job = replace(job, encoders=())
    agreed = True
    mark, done = writer.mark(), 0  # everything up to here is sure
    with progress(f"encode {split}", None, "examples") as bar:
        while True:
            blocks = islice(_blocks(path), done, None)
            number = done
            work = partial(_encode_block, job)
            for block in ordered_map(work, blocks, engine=job.data.engine, num_workers=job.workers):
                number += 1
                if number == 1 and block.refused:
                    say(
                        f"encode: the standard encoder does the work; no faster one passed its proof ({block.refused})"
                    )
                if not block.agreed:
                    break
                writer.add(block)
                bar.advance(block.num_examples)
                if block.audit:
                    mark, done = writer.mark(), number
            else:
                writer.close()
                return agreed
            warn(
                f"{path}: the faster encoder and the standard one differ; what only the faster one has encoded "
                "is done again, and the standard one goes on"
            )
            writer.rewind(mark)
            agreed, job = False, replace(job, encoders=())


def _sample(path: Path, places: int = 16, lines: int = 32) -> list[str]:
    """Texts from all over a dataset file."""
    texts: list[str] = []
    with path.open("rb") as handle:
        for place in range(places):
            handle.seek(path.stat().st_size * place // places)
            if place:
                handle.readline(_BLOCK_BYTES)
            for line in (handle.readline(_BLOCK_BYTES) for _ in range(lines)):
                try:
                    example = Example.from_record(json.loads(line), path, 0)
                except (ValueError, AttributeError, RecursionError):  # the encoding itself tells of bad lines
                    continue
                texts += [message.content for message in example.messages]
    return texts


def _blocks(path: Path) -> Iterator[_Lines]:
    """The lines of a dataset file in blocks; every `_AUDIT_EVERY`th and the last are to be audited."""
    with path.open("rb") as handle:
        first, content = 1, handle.read(_BLOCK_BYTES) + handle.readline()
        for number in count(1):
            following = handle.read(_BLOCK_BYTES) + handle.readline()
            if content:
                yield _Lines(path, first, content, number % _AUDIT_EVERY == 0 or not following)
            if not following:
                return
            first, content = first + content.count(b"\n"), following


def _encode_block(job: _Job, block: _Lines) -> _Encoded:
    """Lines → examples → rendered, encoded, masked, cut; in a worker process."""
    chat_format, encoder, refused = _tools(job)
    records = _examples(block)
    examples = [side for record in records for side in record.answered]
    rendered = _render(examples, chat_format, encoder if not block.audit else None)
    agreed = True
    if encoder is not None and block.audit:
        again = _render(examples, chat_format, encoder)
        agreed = bool(
            np.array_equal(again.borders, rendered.borders) and np.array_equal(again.ids, rendered.ids)
        )
    return _cut(records, examples, rendered, chat_format, job, block, agreed, refused)


@dataclass(frozen=True)
class _Facts:
    """What must be known of the tokenizer and the chat format where samples are written."""

    tokenizer_sha256: str
    highest_id: int
    stop_ids: tuple[int, ...]


def _facts(job: _Job) -> _Facts:
    chat_format, _, _ = _tools(job)
    tokenizer = chat_format.tokenizer
    return _Facts(tokenizer.sha256, tokenizer.highest_id, chat_format.stop_ids)


def _tools(job: _Job) -> tuple[ChatFormat, Encode | None, str]:
    """What a worker needs for a run: the format, the faster encoder that proved itself, or why none did."""
    encoder, refused = _encoder(job.run, job.model, job.dataset / FILES["train"], job.encoders)
    return _chat_format(job.run, job.model, job.data.chat_format), encoder, refused


@lru_cache(maxsize=1)
def _tokenizer(_run: str, model: Path) -> ModelTokenizer:
    return ModelTokenizer.load(model)


@lru_cache(maxsize=1)
def _chat_format(run: str, model: Path, name: str) -> ChatFormat:
    return open_format(name, _tokenizer(run, model))


@lru_cache(maxsize=1)
def _encoder(run: str, model: Path, path: Path, names: tuple[str, ...]) -> tuple[Encode | None, str]:
    if not names:
        return None, ""
    encoder, refused = fastest(_tokenizer(run, model), _sample(path), names)
    if encoder is None:
        return None, "; ".join(f"{name}: {reason}" for name, reason in refused.items())
    return encoder.encode_many, ""


def _examples(block: _Lines) -> list[Example]:
    """The examples of a block; raises `InputError` for a damaged line."""
    try:
        lines = block.content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        line = block.first + block.content.count(b"\n", 0, error.start)
        raise InputError(
            f"{block.path}, line {line}: not valid UTF-8 ({error.reason}); run `firefly data` again."
        ) from error
    return [
        _example(line, block.path, number) for number, line in enumerate(lines, block.first) if line.strip()
    ]


def _example(text: str, path: Path, line: int) -> Example:
    try:
        record = json.loads(text)
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {line}: not valid JSON ({error}); run `firefly data` again."
        ) from error
    return Example.from_record(record, path, line)


def _render(examples: list[Example], chat_format: ChatFormat, encode: Encode | None) -> RenderedBlock:
    conversations = [example.messages for example in examples]
    try:
        return chat_format.render_many(conversations, encode)
    except InputError:
        for example in examples:  # which one was it?
            try:
                chat_format.render(example.messages)
            except InputError as error:
                raise InputError(f"{example.source} ({example.kind}): {error}") from error
        raise


def _cut(
    records: list[Example],
    examples: list[Example],
    rendered: RenderedBlock,
    chat_format: ChatFormat,
    job: _Job,
    block: _Lines,
    agreed: bool,
    refused: str,
) -> _Encoded:
    """Cut what is too long; most blocks have nothing of the kind and stay as they are.

    `records` are the lines, `examples` what was rendered: of a preference both sides.
    """
    ids, mask, lengths = rendered.ids, rendered.mask, np.diff(rendered.borders)
    num_sides = [1 if record.rejected is None else 2 for record in records]
    lines = np.repeat(np.arange(len(records)), num_sides)  # of each example, counted from the block's first
    begins = np.cumsum([0, *num_sides])
    target_bytes = rendered.answer_bytes
    cuts: Counter[tuple[str, str]] = Counter()
    overlong = np.unique(lines[lengths > job.data.max_seq_length]).tolist()
    if overlong:
        pieces: list[NDArray[Any]] = []  # ids, mask, ids, mask …
        rows: list[tuple[int, int, int]] = []  # length, bytes, line in the block
        done = 0
        for line in [*overlong, len(records)]:
            place = int(begins[line])
            span = slice(rendered.borders[done], rendered.borders[place])
            pieces += [ids[span], mask[span]]
            rows += zip(
                lengths[done:place].tolist(),
                target_bytes[done:place].tolist(),
                lines[done:place].tolist(),
                strict=True,
            )
            done = place
            if line < len(records):
                done = int(begins[line + 1])
                wholes = []
                for start, end in pairwise(rendered.borders[place : done + 1]):
                    wholes.append(Rendered(ids[start:end].tolist(), mask[start:end].astype(bool).tolist()))
                sides = examples[place:done]
                if len(sides) == 1:
                    parts = list(fit(sides[0], wholes[0], chat_format, job.data))
                else:
                    parts = fit_pair(sides, wholes, chat_format, job.data)
                for part in parts:
                    cuts.update((examples[place].kind, reason) for reason in part.reasons)
                    if part.sample is not None:
                        pieces += [
                            np.asarray(part.sample.ids, np.uint32),
                            np.asarray(part.sample.mask, np.uint8),
                        ]
                        rows.append((len(part.sample.ids), part.target_bytes, line))
        ids, mask = np.concatenate(pieces[0::2]), np.concatenate(pieces[1::2])
        lengths, target_bytes, lines = np.asarray(rows, np.int64).reshape(-1, 3).T
    names = {name: number for number, name in enumerate(dict.fromkeys(one.kind for one in records))}
    kinds = np.asarray([names[one.kind] for one in records], np.int64)[lines]
    return _Encoded(
        ids,
        mask,
        lengths,
        kinds,
        list(names),
        target_bytes,
        lines,
        cuts,
        len(records),
        num_sides.count(2),
        block.audit,
        agreed,
        refused,
    )


class _Column:
    """A one-dimensional .npy file that grows by appending, and that can be taken back to an earlier length."""

    def __init__(self, path: Path, dtype: Any) -> None:
        self.file, self.dtype, self.length = path.open("w+b"), np.dtype(dtype), 0
        self._write_header()
        self.start = self.file.tell()

    def append(self, values: NDArray[Any]) -> None:
        self.file.write(values.astype(self.dtype).tobytes())
        self.length += len(values)

    def rewind(self, length: int) -> None:
        self.length = length
        self.file.seek(self.start + length * self.dtype.itemsize)
        self.file.truncate()

    def close(self) -> None:
        self.file.seek(0)
        self._write_header()
        assert self.file.tell() == self.start, "a header of another length"
        self.file.close()

    def _write_header(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(self.dtype),
            "fortran_order": False,
            "shape": (self.length,),
        }
        np.lib.format.write_array_header_1_0(self.file, header)


class _SplitWriter:
    """Streams the samples of one split to disk; `kinds` is shared by the splits. Nothing grows in memory."""

    def __init__(self, place: Path, dtype: np.dtype[Any], kinds: dict[str, int], longest: int) -> None:
        place.mkdir()
        self.kinds = kinds
        self.tokens, self.mask = (place / "tokens.bin").open("wb"), (place / "mask.bin").open("wb")
        self.columns = {
            name: _Column(place / f"{name}.npy", kind)
            for name, kind in (("borders", "i8"), ("kinds", "u2"), ("bytes", "i8"), ("origins", "i8"))
        }
        self.columns["borders"].append(np.zeros(1, np.int64))
        self.dtype, self.histogram = dtype, np.zeros(longest + 1, np.int64)
        self.counts: Counter[str] = Counter()
        self.cuts: Counter[tuple[str, str]] = Counter()

    def add(self, block: _Encoded) -> None:
        """Append the samples of one block."""
        self.tokens.write(block.ids.astype(self.dtype).tobytes())
        self.mask.write(block.mask.tobytes())
        numbers = np.asarray([self.kinds.setdefault(name, len(self.kinds)) for name in block.names], np.int64)
        self.columns["borders"].append(self.counts["tokens"] + np.cumsum(block.lengths))
        self.columns["kinds"].append(numbers[block.kinds])
        self.columns["bytes"].append(block.target_bytes)
        self.columns["origins"].append(self.counts["examples"] + block.origins)
        self.counts["examples"] += block.num_examples
        self.counts["preferences"] += block.num_preferences
        self.counts["samples"] += len(block.lengths)
        self.counts["tokens"] += len(block.ids)
        self.counts["target_tokens"] += int(np.count_nonzero(block.mask))
        self.histogram += np.bincount(block.lengths, minlength=len(self.histogram))
        self.cuts += block.cuts

    def mark(self) -> tuple[Counter[str], Counter[tuple[str, str]], NDArray[np.int64]]:
        """Where the writer stands, to come back to."""
        return self.counts.copy(), self.cuts.copy(), self.histogram.copy()

    def rewind(self, mark: tuple[Counter[str], Counter[tuple[str, str]], NDArray[np.int64]]) -> None:
        """Take back everything that was added since `mark`."""
        self.counts, self.cuts, self.histogram = mark[0].copy(), mark[1].copy(), mark[2].copy()
        self.tokens.seek(self.counts["tokens"] * self.dtype.itemsize)
        self.tokens.truncate()
        self.mask.seek(self.counts["tokens"])
        self.mask.truncate()
        for name, column in self.columns.items():
            column.rewind(self.counts["samples"] + (name == "borders"))

    def close(self) -> None:
        """Finish the files."""
        self.tokens.close()
        self.mask.close()
        for column in self.columns.values():
            column.close()
