"""`prune_model`: a smaller vocabulary for a model directory, exact, proven, and written whole or not at all.

Count tokens in the corpus, choose the closed keep-set, rewrite tokenizer and weights under a temporary name,
prove the result, and only then give it its name. The same inputs give the same bytes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import say
from firefly.errors import InputError, ModelError, OutputError
from firefly.files import directory_atomic, read_lines, require_disk, sha256_file, write_json
from firefly.prune import companions, weights
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.proof import prove
from firefly.prune.tokenizer import guarded, load, read, rebuild, vocabulary
from firefly.prune.vocabulary import choose

_SAMPLE_CHARACTERS = 1 << 24
_SAMPLE_TEXT_CHARACTERS = 1 << 17


@dataclass(frozen=True)
class PruneResult:
    """What pruning did; `to_json` gives it as plain values."""

    output: str
    vocab_before: int  # embedding rows
    vocab_after: int
    params_before: int  # tied matrices counted once
    params_after: int
    bytes_before: int  # of the weight files
    bytes_after: int
    closure_size: int  # tokens kept only as intermediates
    kept: dict[str, int]  # kept tokens by reason
    coverage: float  # share of the corpus' tokens that lie in the keep-set
    corpus_documents: int
    corpus_tokens: int
    documents_checked: int
    proof: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return asdict(self)


def prune_model(
    base: Path,
    out: Path,
    *,
    vocab_size: int,
    corpus: Sequence[Path] = (),
    texts: Iterable[str] = (),
    pad_to_multiple: int = 1,
    keep_file: Path | None = None,
    prove_logits: bool = True,
) -> PruneResult:
    """Prune the vocabulary of the model directory `base` to `vocab_size` tokens and write it to `out`.

    Args:
        corpus: text or JSON Lines files, or folders of them, whose tokens are kept by frequency.
        texts: documents that are counted beside the corpus.
        pad_to_multiple: keep a few more tokens so that the size is a multiple of this.
        keep_file: further tokens to keep, one a line: a token of the vocabulary, or text whose tokens stay.
        prove_logits: also compare logits in float32 (needs both models in memory, one after the other).

    Raises `InputError`, `ModelError`, `RecipeError`, `OutputError`, or `ProofError`; `out` is then untouched.
    """
    base, out = Path(base), Path(out)
    _check_output(base, out)
    if not base.is_dir():
        raise ModelError(
            f"The model directory {base} does not exist; give a directory in Hugging Face layout."
        )
    content = read(base / "tokenizer.json")
    tokenizer = load(base / "tokenizer.json")
    files = weights.shards(base)
    for path in files:
        weights.read_header(path)
    tokens = vocabulary(content)
    rows = int(weights.meta_model(base).get_input_embeddings().weight.shape[0])
    if max(tokens.values()) >= rows:
        raise ModelError(
            f"{base}: tokenizer.json has the id {max(tokens.values()):,}, and the embeddings have only {rows:,} rows; "
            "the two do not belong together."
        )

    sample = _Sample()
    corpus = [Path(path) for path in corpus]
    total = sum(1 for _ in corpus_texts(corpus))  # finds bad lines before the long work, and gives the ETA
    if isinstance(texts, Sequence):
        total += len(texts)
    elif not corpus:
        total = 0
    counts = count_tokens(tokenizer, sample.passing(_chain(corpus_texts(corpus), texts)), total or None)
    if not counts.sum():
        raise InputError(
            "The corpus holds no tokens; give corpus files with text, so that there is something to keep."
        )

    wanted = companions.required_ids(
        base, tokens, {token["content"] for token in content["added_tokens"] or []}
    )
    if keep_file is not None:
        wanted |= _wanted_ids(tokenizer, tokens, Path(keep_file))
    keep = choose(content, counts, vocab_size, wanted, pad_to_multiple)
    new_to_old = keep.new_to_old
    old_to_new = {int(old): new for new, old in enumerate(new_to_old)}

    bytes_before = sum(path.stat().st_size for path in files)
    require_disk(out, bytes_before)
    with directory_atomic(out) as place:
        write_json(place / "tokenizer.json", rebuild(content, new_to_old))
        companions.write(base, place, old_to_new, len(new_to_old))
        layout = weights.vocabulary_layout(base, place, files)
        weights.select_rows(files, place, layout.names, new_to_old)
        proof = prove(base, place, new_to_old, layout.names, sample.texts, prove_logits)
        result = PruneResult(
            output=str(out),
            vocab_before=rows,
            vocab_after=len(new_to_old),
            params_before=layout.params_before,
            params_after=layout.params_after,
            bytes_before=bytes_before,
            bytes_after=sum((place / path.name).stat().st_size for path in files),
            closure_size=keep.num_closure,
            kept=keep.statistics,
            coverage=float(counts[new_to_old[new_to_old < len(counts)]].sum() / counts.sum()),
            corpus_documents=sample.seen,
            corpus_tokens=int(counts.sum()),
            documents_checked=proof["documents_checked"],
            proof=proof,
        )
        record = result.to_json()
        del record["output"]  # the same model wherever it is written
        source = {name: sha256_file(base / f"{name}.json") for name in ("tokenizer", "config")}
        write_json(
            place / "prune.json", {**record, "source_sha256": source, "new_to_old": id_ranges(new_to_old)}
        )
    say(
        f"prune: {rows:,} → {len(new_to_old):,} tokens, {layout.params_before:,} → {layout.params_after:,} parameters, "
        f"{result.coverage:.2%} of the corpus kept as it was; proof passed ({proof['logits']} logits)"
    )
    return result


def id_ranges(ids: NDArray[np.int64]) -> str:
    """Ids as a compact line, such as `0-258,300,302-310`; `parse_id_ranges` reads it back."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_id_ranges(line: str) -> NDArray[np.int64]:
    """The ids of `id_ranges`, in order: `new_to_old` [K] of a prune.json."""
    ends = [part.split("-") for part in line.split(",")]
    return np.concatenate([np.arange(int(end[0]), int(end[-1]) + 1, dtype=np.int64) for end in ends])


class _Sample:
    """A reproducible sample of a stream: all of it up to a budget, random replacement after that."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.seen = 0
        self._room = _SAMPLE_CHARACTERS
        self._random = random.Random(0)

    def passing(self, texts: Iterable[str]) -> Iterator[str]:
        """Pass every text on, keeping some."""
        for text in texts:
            self.seen += 1
            kept = text[:_SAMPLE_TEXT_CHARACTERS]
            if self._room > 0:
                self.texts.append(kept)
                self._room -= len(kept)
            elif (place := self._random.randrange(self.seen)) < len(self.texts):
                self.texts[place] = kept
            yield text


def _chain(*streams: Iterable[str]) -> Iterator[str]:
    for stream in streams:
        yield from stream


def _wanted_ids(tokenizer: Tokenizer, tokens: dict[str, int], path: Path) -> set[int]:
    """The ids that a keep file asks for."""
    ids: set[int] = set()
    for _, line in read_lines(path):
        if line in tokens:
            ids.add(tokens[line])
        elif line.strip():
            with guarded(f"tokenizing {path}"):
                ids.update(tokenizer.encode(line, add_special_tokens=False).ids)
    return ids


def _check_output(base: Path, out: Path) -> None:
    """Refuse an output place whose replacement would destroy something that pruning did not write."""
    if out.resolve() == base.resolve():
        raise OutputError(f"The output {out} is the base model itself; choose another place.")
    if out.exists() and not out.is_dir():
        raise OutputError(f"The output {out} is a file; choose a directory.")
    if out.is_dir() and any(out.iterdir()) and not (out / "prune.json").is_file():
        raise OutputError(
            f"The output {out} is not empty and no pruned model; choose another place or empty it."
        )
