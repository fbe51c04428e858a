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
same for any number of workers, and memory does not grow with the dataset. The faster encoder works only after its
proof; every 100th block and the last one of a split are encoded by the standard one too, and after a difference
everything since the last such block is done again without it.

Opening a directory with another tokenizer is an error, not a surprise.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress, say, warn
from firefly.data.chatformat import ChatFormat, Encode, Rendered, RenderedBlock, open_format
from firefly.data.dataset import FILES
from firefly.data.encoder import ENCODERS, fastest
from firefly.data.engine import ordered_map
from firefly.data.example import Example
from firefly.data.overlong import fit, fit_pair
from firefly.data.stats import length_chart
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, ModelError
from firefly.files import directory_atomic, locate, read_lines, sha256_file, write_json
from firefly.recipe import DataSection

SPLITS = ("train", "validation")
_BLOCK_RECORDS, _BLOCK_CHARACTERS = 1000, 1 << 20
_AUDIT_EVERY = 100  # blocks
_SMALL_BYTES = 4 << 20  # a smaller dataset is encoded before worker processes would have started


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
        index_path = directory / "index.json"
        if not index_path.is_file():
            raise InputError(
                f"{directory} is not a tokens directory (no index.json); make it with `firefly data`."
            )
        index = json.loads(index_path.read_text(encoding="utf-8"))
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


def encode_dataset(dataset: Path, model: Path, data: DataSection, out: Path) -> TokensResult:
    """Render and encode every example of a dataset directory with the tokenizer of `model`.

    Raises `InputError` for a damaged line, or when a sample is too long and the recipe does not say what to do.
    """
    model = locate(str(model))
    tokenizer = ModelTokenizer.load(model)
    chat_format = open_format(data.chat_format, tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.highest_id < 1 << 16 else np.uint32)
    fast = _proved(tokenizer, dataset / FILES["train"])
    kinds: dict[str, int] = {}
    with directory_atomic(out) as place:
        writers = {}
        for split in SPLITS:
            path = dataset / FILES[split]
            if not path.is_file():
                raise InputError(f"{path} does not exist; run `firefly data` first.")
            writers[split] = _SplitWriter(place / split, dtype, kinds, data.max_seq_length)
            job = _Job(model, tokenizer.sha256, path, data, dtype.name, path.stat().st_size < _SMALL_BYTES)
            fast = _encode_split(job, writers[split], fast, f"encode {split}")
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
            "stop_ids": list(chat_format.stop_ids),
            "tokenizer_sha256": tokenizer.sha256,
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
    """What a worker must know; it travels with every block."""

    model: Path
    tokenizer_sha256: str
    path: Path
    data: DataSection
    dtype: str
    small: bool


@dataclass(frozen=True)
class _Lines:
    """Lines of the dataset, with their numbers in the file (from 1); `first` is the first one's place."""

    first: int
    lines: list[tuple[int, str]]
    audit: bool


@dataclass(frozen=True)
class _Encoded:
    """The samples of one block. `names` are its kinds; `agreed`: an audit found no difference."""

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


def _encode_split(job: _Job, writer: _SplitWriter, fast: str | None, label: str) -> str | None:
    """Encode one file into `writer`; returns the faster encoder that may go on."""
    workers = 1 if job.small else job.data.num_workers
    mark, done = writer.mark(), 0  # everything up to here is sure
    with progress(label, None, "examples") as bar:
        while True:
            work = partial(_encode_block, job, fast)
            blocks = islice(_blocks(job.path), done, None)
            number = done
            for block in ordered_map(work, blocks, engine=job.data.engine, num_workers=workers):
                number += 1
                if not block.agreed:
                    break
                writer.add(block)
                bar.advance(block.num_examples)
                if block.audit:
                    mark, done = writer.mark(), number
            else:
                writer.close()
                return fast
            warn(
                f"{job.path}: the faster encoder and the standard one differ; what only the faster one has encoded "
                "is done again, and the standard one goes on"
            )
            writer.rewind(mark)
            fast = None


def _proved(tokenizer: ModelTokenizer, path: Path) -> str | None:
    """The encoder that gives the tokenizer's own ids for a sample of the file and for hard texts, if any does."""
    name, refused = fastest(tokenizer, _sample(path))
    if name is None:
        why = "; ".join(f"{encoder}: {reason}" for encoder, reason in refused.items())
        say(f"encode: the standard encoder does the work; the faster ones did not pass their proof ({why})")
    return name


def _sample(path: Path, places: int = 16, lines: int = 32) -> list[str]:
    """Texts from all over a dataset file."""
    texts: list[str] = []
    if not path.is_file():
        return texts
    with path.open("rb") as handle:
        for place in range(places):
            handle.seek(path.stat().st_size * place // places)
            if place:
                handle.readline(_BLOCK_CHARACTERS)
            for line in (handle.readline(_BLOCK_CHARACTERS) for _ in range(lines)):
                try:
                    example = Example.from_record(json.loads(line), path, 0)
                except (ValueError, AttributeError, RecursionError):  # the encoding itself tells of bad lines
                    continue
                texts += [message.content for message in example.messages]
    return texts


def _blocks(path: Path) -> Iterator[_Lines]:
    """The lines of a dataset file in blocks; every `_AUDIT_EVERY`th and the last are to be audited."""
    if path.stat().st_size == 0:  # nothing was held out
        return
    number, first, size = 0, 0, 0
    waiting: list[tuple[int, str]] = []
    for line in ((number, line) for number, line in read_lines(path) if line.strip()):
        if len(waiting) == _BLOCK_RECORDS or size > _BLOCK_CHARACTERS:
            number += 1
            yield _Lines(first, waiting, number % _AUDIT_EVERY == 0)
            first, waiting, size = first + len(waiting), [], 0
        waiting.append(line)
        size += len(line[1])
    if waiting:
        yield _Lines(first, waiting, True)


def _encode_block(job: _Job, fast: str | None, block: _Lines) -> _Encoded:
    """Lines → examples → rendered, encoded, masked, cut; in a worker process."""
    if not job.small:  # every core has a worker already
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
    chat_format, quick = _tools(job.model, job.tokenizer_sha256, job.data.chat_format, fast)
    records = [_example(line, number, job.path) for number, line in block.lines]
    examples = [side for record in records for side in record.answered]
    rendered = _render(examples, chat_format, None if block.audit else quick)
    agreed = True
    if fast and block.audit:
        again = _render(examples, chat_format, quick)
        agreed = bool(
            np.array_equal(again.borders, rendered.borders) and np.array_equal(again.ids, rendered.ids)
        )
    return _cut(records, examples, rendered, chat_format, job, block, agreed)


@lru_cache(maxsize=2)
def _tools(model: Path, _sha256: str, chat_format: str, fast: str | None) -> tuple[ChatFormat, Encode | None]:
    """What a worker loads once; the hash is there so that another tokenizer in the same place is another one."""
    tokenizer = ModelTokenizer.load(model)
    return open_format(chat_format, tokenizer), ENCODERS[fast](tokenizer).encode_many if fast else None


def _example(line: str, number: int, path: Path) -> Example:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}, line {number}: not valid JSON ({error}); run `firefly data` again."
        ) from error
    return Example.from_record(record, path, number)


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
) -> _Encoded:
    """Cut what is too long; most blocks have nothing of the kind and stay as they are.

    `records` are the lines, `examples` what was rendered: of a preference both sides.
    """
    ids, mask, lengths = rendered.ids, rendered.mask, np.diff(rendered.borders)
    num_sides = [1 if record.rejected is None else 2 for record in records]
    lines = np.repeat(np.arange(len(records)), num_sides)  # of each example, counted from the block's first
    begins = np.cumsum([0, *num_sides])
    origins = lines + block.first
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
        table = np.asarray(rows, np.int64).reshape(-1, 3)
        lengths, target_bytes, origins = table[:, 0], table[:, 1], table[:, 2] + block.first
    names = {name: number for number, name in enumerate(dict.fromkeys(one.kind for one in records))}
    kinds = np.asarray([names[one.kind] for one in records], np.int64)[origins - block.first]
    return _Encoded(
        ids.astype(job.dtype),
        mask,
        lengths,
        kinds,
        list(names),
        target_bytes,
        origins,
        cuts,
        len(records),
        num_sides.count(2),
        block.audit,
        agreed,
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
        self.tokens.write(block.ids.tobytes())
        self.mask.write(block.mask.tobytes())
        numbers = np.asarray([self.kinds.setdefault(name, len(self.kinds)) for name in block.names], np.int64)
        self.columns["borders"].append(self.counts["tokens"] + np.cumsum(block.lengths))
        self.columns["kinds"].append(numbers[block.kinds])
        self.columns["bytes"].append(block.target_bytes)
        self.columns["origins"].append(block.origins)
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
