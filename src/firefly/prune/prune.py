"""`prune_model`: a smaller vocabulary for a model directory, exact, proven, and written whole or not at all.

Count tokens in the corpus, choose the closed keep-set, rewrite tokenizer and weights under a temporary name,
prove the result, and only then give it its name. The same inputs give the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.console import say, warn
from firefly.errors import InputError, ModelError, OutputError, RecipeError
from firefly.files import (
    directory_atomic,
    exclusive_beside,
    read_lines,
    require_disk,
    sha256_file,
    write_json,
)
from firefly.prune import companions, weights
from firefly.prune.chart import coverage_chart, coverage_curve
from firefly.prune.copying import WeightsCopy
from firefly.prune.counting import corpus_texts, count_corpora
from firefly.prune.layout import find_layout
from firefly.prune.opening import Opener
from firefly.prune.proof import AUTO_TEXTS, prove, prove_tokenizer
from firefly.prune.proof_weights import prove_opening
from firefly.prune.sample import Sample
from firefly.prune.scripts import ids_in_scripts, script, token_texts
from firefly.prune.tokenizer import added_tokens, guarded, load, read, rebuild, vocabulary, write
from firefly.prune.vocabulary import choose
from firefly.recipe import Engine

_NUM_EXAMPLES = 5


@dataclass(frozen=True)
class PruneResult:
    """What pruning did; `to_json` gives it as plain values."""

    output: str
    vocab_before: int  # embedding rows; without weights, tokens
    vocab_after: int
    params_before: int  # tied matrices counted once; 0 without weights, as the next three
    params_after: int
    bytes_before: int  # of the weight files
    bytes_after: int
    closure_size: int  # tokens kept only as intermediates; with a given tokenizer, all that it lacked
    kept: dict[str, int]  # kept tokens by reason
    coverage: float  # share of the corpus' tokens that lie in the keep-set; 1 without a corpus
    scripts: dict[str, list[int]]  # tokens before and after, by script
    dropped_examples: dict[str, list[str]]  # the first dropped tokens of each script
    dropped_added_tokens: list[str]  # reserved ones, and those that nothing names or uses
    not_in_base: list[str]  # tokens of the given tokenizer that the base lacks
    corpus_documents: int
    corpus_tokens: int
    documents_checked: int
    proof: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON-able values."""
        return asdict(self)


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """Vocabularies are millions of objects without a cycle; looking for cycles in them costs seconds."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def prune_model(
    base: Path,
    out: Path,
    *,
    vocab_size: int | None = None,
    coverage: float | None = None,
    tokenizer: Path | None = None,
    corpus: Sequence[Path] = (),
    texts: Iterable[str] = (),
    pad_to_multiple: int = 1,
    keep_file: Path | None = None,
    keep_script: Sequence[str] = (),
    tokenizer_only: bool = False,
    prove_logits: bool = True,
    chart: Path | None = None,
    engine: Engine = "local",
) -> PruneResult:
    """Prune the vocabulary of the model directory `base` and write it to `out`.

    Args:
        vocab_size, coverage, tokenizer: one of the three says how much stays: exactly so many tokens; the most
            frequent until they are this share (up to 1) of the corpus; or the tokens of another tokenizer's
            directory, with what they need to stay exact.
        corpus: text, JSON, CSV or Parquet files, or folders of them, whose tokens are kept by frequency.
        texts: documents that are counted beside the corpus.
        pad_to_multiple: keep a few more tokens so that the size is a multiple of this.
        keep_file: further tokens to keep, one a line: a token of the vocabulary, or text whose tokens stay.
        keep_script: keep every token in these scripts, such as Han, Latin, Digits.
        tokenizer_only: `base` holds no weights, or they are left alone.
        prove_logits: also compare logits in float32 (needs both models in memory, one after the other).
        chart: a PNG file to draw when all is done: coverage of the corpus against vocabulary size.
        engine: where the corpus is counted, here or on a Ray cluster.

    Raises `InputError`, `ModelError`, `RecipeError`, `OutputError`, or `ProofError`; `out` is then untouched.
    """
    base, out = Path(base), Path(out)
    _check_arguments(vocab_size, coverage, tokenizer, pad_to_multiple)
    _check_output(base, out)
    if not base.is_dir():
        raise ModelError(
            f"The model directory {base} does not exist; give a directory in Hugging Face layout."
        )
    files = [] if tokenizer_only else weights.shards(base)
    # Without tokenizer_config.json, transformers cannot tell the class.
    opens = not tokenizer_only or (base / "tokenizer_config.json").is_file()
    # Both helpers start at once, so that they are ready when there is something to open and to copy.
    with (
        exclusive_beside(out, "firefly prune"),
        Opener() if opens else contextlib.nullcontext() as opener,
        WeightsCopy(files) as copy,
    ):
        content = read(base / "tokenizer.json")
        original = functools.cache(lambda: load(base / "tokenizer.json", content))  # not before it is needed
        tokens = vocabulary(content)
        layout = None
        if not tokenizer_only:
            layout = find_layout(base, files)
            _require_rows(base, layout.num_rows, max(tokens.values()))
        rows = layout.num_rows if layout else len(tokens)

        sample = Sample()
        counts = np.zeros(0, dtype=np.int64)
        if corpus or not (isinstance(texts, Sequence) and not texts):
            counts = _count(original(), sample, [Path(path) for path in corpus], texts, engine)
        if not counts.sum() and (tokenizer is None or chart is not None):
            raise InputError(
                "The corpus holds no tokens; give corpus files with text, so that there is something to keep."
            )

        wanted = companions.required_ids(base, tokens, {token["content"] for token in added_tokens(content)})
        if keep_script:
            wanted |= ids_in_scripts(original(), sorted(tokens.values()), keep_script)
        if keep_file is not None:
            wanted |= _wanted_ids(original(), tokens, Path(keep_file))
        given: set[int] = set()
        not_in_base: list[str] = []
        if tokenizer is not None:
            given, not_in_base = _tokens_of(Path(tokenizer), tokens)
        keep = choose(content, counts, vocab_size, wanted | given, pad_to_multiple, coverage)
        new_to_old = keep.new_to_old
        closure_size = len(set(new_to_old.tolist()) - given) if given else keep.num_closure
        old_to_new = {int(old): new for new, old in enumerate(new_to_old)}

        bytes_before = sum(path.stat().st_size for path in files)
        require_disk(out, bytes_before)
        with directory_atomic(out) as place, copy:  # whatever happens, the copying ends before the directory
            if layout is not None:
                copy.start(place, layout.names, new_to_old)
            write(place / "tokenizer.json", rebuild(content, new_to_old))
            companions.write(base, place, old_to_new, len(new_to_old))
            scripts, examples = _scripts(original(), sorted(tokens.values()), old_to_new)
            both = content, original()
            if layout is not None:
                proof = prove(
                    base,
                    place,
                    new_to_old,
                    layout.names,
                    sample,
                    prove_logits,
                    original=both,
                    opener=opener,
                    copy=copy,
                )
            else:
                proof = prove_tokenizer(base, place, new_to_old, sample, original=both)
                if opener is not None:
                    proof |= prove_opening(base, place, new_to_old, sample.texts[:AUTO_TEXTS], opener)
            inside = counts[new_to_old[new_to_old < len(counts)]].sum()
            result = PruneResult(
                output=str(out),
                vocab_before=rows,
                vocab_after=len(new_to_old),
                params_before=layout.params if layout else 0,
                params_after=layout.params_with(len(new_to_old)) if layout else 0,
                bytes_before=bytes_before,
                bytes_after=sum((place / path.name).stat().st_size for path in files),
                closure_size=closure_size,
                kept=keep.statistics,
                coverage=float(inside / counts.sum()) if counts.sum() else 1.0,
                scripts=scripts,
                dropped_examples=examples,
                dropped_added_tokens=list(keep.dropped_added),
                not_in_base=not_in_base,
                corpus_documents=sample.seen,
                corpus_tokens=int(counts.sum()),
                documents_checked=proof["documents_checked"],
                proof=proof,
            )
            record = result.to_json()
            del record["output"]  # the same model wherever it is written
            source = {
                name: sha256_file(base / f"{name}.json")
                for name in ("tokenizer", "config")
                if (base / f"{name}.json").is_file()
            }
            write_json(
                place / "prune.json", {**record, "source_sha256": source, "new_to_old": id_ranges(new_to_old)}
            )
        if chart is not None:
            curve = coverage_curve(content, counts, wanted | given)
            coverage_chart(chart, *curve, chosen=(len(new_to_old), result.coverage))
        parameters = (
            "" if tokenizer_only else f" {result.params_before:,} → {result.params_after:,} parameters,"
        )
        checked = "tokenizer" if tokenizer_only else f"{proof['logits']} logits"
        say(
            f"prune: {rows:,} → {len(new_to_old):,} tokens,{parameters} {result.coverage:.2%} of the corpus kept as it "
            f"was; proof passed ({checked})"
        )
        if keep.dropped_added:
            say(
                f"prune: {len(keep.dropped_added):,} added tokens are dropped, reserved or unused "
                f"({_some(keep.dropped_added)}); prune.json lists them"
            )
        return result


def _check_arguments(
    vocab_size: int | None, coverage: float | None, tokenizer: Path | None, pad_to_multiple: int
) -> None:
    if sum(choice is not None for choice in (vocab_size, coverage, tokenizer)) != 1:
        raise RecipeError("Say how much to keep in one way: --vocab-size, --coverage or --tokenizer.")
    if vocab_size is not None and vocab_size < 1:
        raise RecipeError(f"--vocab-size is {vocab_size}; choose 1 or more.")
    if coverage is not None and not 0 < coverage <= 1:
        raise RecipeError(f"--coverage is {coverage}; choose a share above 0 and up to 1, such as 0.9999.")
    if pad_to_multiple < 1:
        raise RecipeError(f"--pad-to-multiple is {pad_to_multiple}; choose 1 or more.")


def _require_rows(base: Path, rows: int, last_id: int) -> None:
    """Raise unless the embedding has a row for every token."""
    if last_id >= rows:
        raise ModelError(
            f"{base}: tokenizer.json has the id {last_id:,}, and the embeddings have only {rows:,} rows; "
            "the two do not belong together."
        )


def _count(
    original: Tokenizer, sample: Sample, corpus: list[Path], texts: Iterable[str], engine: Engine
) -> NDArray[np.int64]:
    """Token counts of the corpus and the texts, keeping a sample of the documents."""
    total = sum(1 for _ in corpus_texts(corpus))  # finds bad lines before the long work, and gives the ETA
    if isinstance(texts, Sequence):
        total += len(texts)
    elif not corpus:
        total = 0
    names = [path.name for path in corpus]
    corpora: list[tuple[str, Iterable[str]]] = [
        (path.name if names.count(path.name) == 1 else str(path), corpus_texts([path])) for path in corpus
    ]
    return count_corpora(original, [*corpora, ("texts", texts)], total or None, sample, engine)


def _tokens_of(directory: Path, tokens: dict[str, int]) -> tuple[set[int], list[str]]:
    """The ids of another tokenizer's tokens, and those of its tokens that the base lacks."""
    given = vocabulary(read(directory / "tokenizer.json"))
    missing = [token for token in given if token not in tokens]
    if 2 * len(missing) > len(given):
        raise InputError(
            f"{directory}: the base model lacks {len(missing):,} of its {len(given):,} tokens ({_some(missing)}); "
            "give a tokenizer that was made from the base model's."
        )
    if missing:
        warn(
            f"{directory}: the base lacks {len(missing):,} of its tokens ({_some(missing)}); they are left out"
        )
    return {tokens[token] for token in given if token in tokens}, missing


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _scripts(
    original: Tokenizer, ids: list[int], kept: dict[int, int]
) -> tuple[dict[str, list[int]], dict[str, list[str]]]:
    """Tokens before and after, by script, the largest first; and a few of the dropped ones."""
    table: dict[str, list[int]] = {}
    examples: dict[str, list[str]] = {}
    for token_id, text in zip(ids, token_texts(original, ids), strict=True):
        name = script(text)
        entry = table.setdefault(name, [0, 0])
        entry[0] += 1
        entry[1] += token_id in kept
        if token_id not in kept and len(shown := examples.setdefault(name, [])) < _NUM_EXAMPLES:
            shown.append(text)
    return dict(sorted(table.items(), key=lambda item: -item[1][0])), examples


def id_ranges(ids: NDArray[np.int64]) -> str:
    """Ids as a compact line, such as `0-258,300,302-310`; `parse_id_ranges` reads it back."""
    runs = np.split(ids, np.flatnonzero(np.diff(ids) != 1) + 1)
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def parse_id_ranges(line: str) -> NDArray[np.int64]:
    """The ids of `id_ranges`, in order: `new_to_old` [K] of a prune.json."""
    ends = [part.split("-") for part in line.split(",")]
    return np.concatenate([np.arange(int(end[0]), int(end[-1]) + 1, dtype=np.int64) for end in ends])


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
