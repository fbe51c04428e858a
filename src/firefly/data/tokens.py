"""A tokens directory: the dataset as memory-mapped token ids, loss mask and document borders.

    SPLIT/tokens.bin    ids of all samples, one after the other (uint16 or uint32)
    SPLIT/mask.bin      one byte a token: 1 where the model learns to produce it
    SPLIT/borders.npy   int64 [N + 1]: sample i is tokens[borders[i] : borders[i + 1]]
    SPLIT/kinds.npy     uint16 [N]: index into index.json's `kinds`
    SPLIT/bytes.npy     int64 [N]: UTF-8 bytes of the text that is learned, for bits per byte
    SPLIT/origins.npy   int64 [N]: line of the dataset's SPLIT.jsonl, counted from 0
    index.json          counts, cuts by kind and reason, the tokenizer's hash, every file's hash

Opening it with another tokenizer is an error, not a surprise. A plain text longer than `max_seq_length` becomes
several samples and loses nothing; a conversation is cut or dropped as the recipe says, and counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress
from firefly.data.chatformat import Rendered, render_many
from firefly.data.dataset import read_dataset
from firefly.data.example import Example
from firefly.data.stats import length_chart
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, ModelError
from firefly.files import directory_atomic, locate, sha256_file, write_json
from firefly.recipe import DataSection

SPLITS = ("train", "validation")
_BATCH = 1000


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

    Raises `InputError` when a sample is too long and the recipe does not say what to do.
    """
    tokenizer = ModelTokenizer.load(locate(str(model)))
    with directory_atomic(out) as place:
        kinds: dict[str, int] = {}
        cuts: Counter[tuple[str, str]] = Counter()
        dtype = np.dtype(np.uint16 if tokenizer.highest_id < 1 << 16 else np.uint32)
        totals: dict[str, dict[str, int]] = {"samples": {}, "tokens": {}, "target_tokens": {}}
        lengths: list[int] = []
        for split in SPLITS:
            writer = _SplitWriter(place / split, dtype)
            with progress(f"encode {split}", None, "examples") as bar:
                for batch in _batches(dataset, split):
                    rendered = render_many([example.messages for _, example in batch], tokenizer)
                    for (origin, example), whole in zip(batch, rendered, strict=True):
                        kind = kinds.setdefault(example.kind, len(kinds))
                        for part, reason in _fit(example, whole, data):
                            if reason:
                                cuts[example.kind, reason] += 1
                            if part is not None:
                                writer.add(
                                    part, kind, _learned_bytes(example, part, whole, tokenizer), origin
                                )
                    bar.advance(len(batch))
            writer.close()
            totals["samples"][split] = len(writer.kinds)
            totals["tokens"][split] = writer.borders[-1]
            totals["target_tokens"][split] = writer.num_targets
            lengths += np.diff(writer.borders).tolist()
        if totals["samples"]["train"] == 0:
            raise InputError(f"{dataset} leaves no training sample of at most {data.max_seq_length} tokens.")
        by_kind: dict[str, dict[str, int]] = {}
        for (kind_name, reason), count in sorted(cuts.items()):
            by_kind.setdefault(kind_name, {})[reason] = count
        result = TokensResult(str(out), **totals, longest_tokens=max(lengths), cuts=by_kind)
        length_chart(place / "lengths.png", np.asarray(lengths), "token")
        index = asdict(result)
        del index["output"]
        index |= {
            "kinds": list(kinds),
            "dtype": dtype.name,
            "max_seq_length": data.max_seq_length,
            "tokenizer_sha256": tokenizer.sha256,
            "sha256": {
                path.relative_to(place).as_posix(): sha256_file(path)
                for path in sorted(place.rglob("*"))
                if path.suffix in {".bin", ".npy"}
            },
        }
        write_json(place / "index.json", index)
    return result


class _SplitWriter:
    """Streams samples to disk; only one number a sample stays in memory."""

    def __init__(self, place: Path, dtype: np.dtype[Any]) -> None:
        place.mkdir()
        self.place, self.dtype = place, dtype
        self.tokens, self.mask = (place / "tokens.bin").open("wb"), (place / "mask.bin").open("wb")
        self.borders, self.num_targets = [0], 0
        self.kinds: list[int] = []
        self.bytes: list[int] = []
        self.origins: list[int] = []

    def add(self, sample: Rendered, kind: int, num_bytes: int, origin: int) -> None:
        self.tokens.write(np.asarray(sample.ids, self.dtype).tobytes())
        self.mask.write(np.asarray(sample.mask, np.uint8).tobytes())
        self.borders.append(self.borders[-1] + len(sample.ids))
        self.num_targets += sum(sample.mask)
        self.kinds.append(kind)
        self.bytes.append(num_bytes)
        self.origins.append(origin)

    def close(self) -> None:
        self.tokens.close()
        self.mask.close()
        np.save(self.place / "borders.npy", np.asarray(self.borders, np.int64))
        np.save(self.place / "kinds.npy", np.asarray(self.kinds, np.uint16))
        np.save(self.place / "bytes.npy", np.asarray(self.bytes, np.int64))
        np.save(self.place / "origins.npy", np.asarray(self.origins, np.int64))


def _batches(dataset: Path, split: str) -> Iterator[list[tuple[int, Example]]]:
    examples = enumerate(read_dataset(dataset, split))
    while batch := list(islice(examples, _BATCH)):
        yield batch


def _fit(example: Example, whole: Rendered, data: DataSection) -> Iterator[tuple[Rendered | None, str]]:
    """The samples that one rendered example becomes, each with the reason if something was cut."""
    limit = data.max_seq_length
    if len(whole.ids) <= limit:
        yield whole, ""
    elif example.is_plain:
        # Windows overlap by one token: the last of one is the first of the next, where it is not learned again.
        for start in range(0, len(whole.ids) - 1, limit - 1):
            window = slice(start, start + limit)
            yield Rendered(whole.ids[window], [False, *whole.mask[window][1:]]), ""
    elif data.overlong == "error":
        raise InputError(
            f"{example.source} ({example.kind}) has {len(whole.ids)} tokens and max_seq_length is {limit}; "
            "raise data.max_seq_length, or set data.overlong to 'right-of-target' or 'drop'."
        )
    elif data.overlong == "drop":
        yield None, "overlong_dropped"
    elif not any(whole.mask[:limit]):
        if not data.allow_lost_targets:
            raise InputError(
                f"{example.source} ({example.kind}): the input alone fills max_seq_length = {limit}, so its target "
                "would be cut entirely; raise data.max_seq_length, or set data.allow_lost_targets = true to drop it."
            )
        yield None, "target_lost"
    else:
        yield Rendered(whole.ids[:limit], whole.mask[:limit]), "truncated"


def _learned_bytes(example: Example, part: Rendered, whole: Rendered, tokenizer: ModelTokenizer) -> int:
    """UTF-8 bytes of the text under the loss mask; exact for a sample that was not cut."""
    if part is whole:
        return sum(len(m.content.encode("utf-8")) for m in example.messages if m.role == "assistant")
    learned = [token for token, learn in zip(part.ids, part.mask, strict=True) if learn]
    return len(tokenizer.decode(learned).encode("utf-8"))
