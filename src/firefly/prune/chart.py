"""What pruning keeps, as a picture: the share of the corpus that a vocabulary covers, against its size."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firefly import plots
from firefly.errors import InputError
from firefly.files import writing_to
from firefly.prune import companions
from firefly.prune.counting import corpus_texts, count_tokens
from firefly.prune.tokenizer import Json, added_tokens, load, read, referenced_ids, vocabulary
from firefly.prune.vocabulary import base_symbols, choose, closure

_MARKS = (0.99, 0.999, 0.9999)


def coverage_beforehand(
    base: Path, corpus: Sequence[Path], vocab_size: int, chart: Path | None = None
) -> tuple[float, dict[str, int]]:
    """What `vocab_size` tokens would cover of a corpus, and the sizes that cover 99, 99.9, 99.99 and 100 %.

    Counts without pruning; of `base`, the tokenizer and the configs are enough. `chart`: a PNG file to draw.
    """
    content = read(base / "tokenizer.json")
    counts = count_tokens(load(content), corpus_texts(corpus))
    if not counts.sum():
        raise InputError("The corpus holds no tokens; give corpus files with text.")
    tokens = vocabulary(content)
    wanted = companions.required_ids(base, tokens, {token["content"] for token in added_tokens(content)})
    sizes, coverages = coverage_curve(content, counts, wanted)
    kept = choose(content, counts, vocab_size, wanted).new_to_old
    covered = float(counts[kept[kept < len(counts)]].sum() / counts.sum())
    if chart is not None:
        coverage_chart(chart, sizes, coverages, (vocab_size, covered))
    return covered, {f"{100 * mark:g} %": int(sizes[np.argmax(coverages >= mark)]) for mark in (*_MARKS, 1.0)}


def coverage_curve(
    content: Json, counts: NDArray[np.int64], wanted: Iterable[int] = ()
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Sizes [P] and coverages [P] as the corpus' tokens come in by descending frequency, each with its closure.

    The first point is what always stays (base symbols, special, referenced and `wanted` tokens), the last one
    all that the corpus uses. `choose` walks the same way.
    """
    frequency = np.zeros(max(vocabulary(content).values()) + 1, dtype=np.int64)
    frequency[: len(counts)] = counts[: len(frequency)]
    needs = closure(content)
    kept = set(base_symbols(content))
    for token_id in referenced_ids(content) | set(wanted):
        kept.update(needs(token_id))
    covered = int(frequency[list(kept)].sum())
    sizes, sums = [len(kept)], [covered]
    for token_id in np.argsort(-frequency, kind="stable")[: np.count_nonzero(frequency)].tolist():
        if token_id not in kept:
            new = [part for part in needs(token_id) if part not in kept]
            kept.update(new)
            covered += int(frequency[new].sum())
            sizes.append(len(kept))
            sums.append(covered)
    return np.array(sizes, dtype=np.int64), np.array(sums) / max(1, int(frequency.sum()))


def coverage_chart(
    path: Path, sizes: NDArray[np.int64], coverages: NDArray[np.float64], chosen: tuple[int, float]
) -> None:
    """Draw the curve with the `chosen` (size, coverage), and the sizes that reach 99, 99.9 and 99.99 %."""
    reached = {mark: int(sizes[np.argmax(coverages >= mark)]) for mark in _MARKS if coverages[-1] >= mark}
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with plots.figure(path) as axes:
        # Beyond the last token that the corpus uses, a larger vocabulary covers no more.
        axes.plot(
            [*sizes, max(chosen[0], sizes[-1])], 100 * np.append(coverages, coverages[-1]), color=plots.BLUE
        )
        axes.plot(
            list(reached.values()), [100 * mark for mark in reached], "o", color=plots.GREY, markersize=4
        )
        lines = [f"{100 * mark:g} %: {size:,}" for mark, size in reached.items()]
        axes.text(0.98, 0.05, "\n".join(lines), transform=axes.transAxes, ha="right", color=plots.GREY)
        axes.plot([chosen[0]], [100 * chosen[1]], "o", color=plots.ORANGE)
        axes.axvline(chosen[0], color=plots.ORANGE, linewidth=1, linestyle=":")
        axes.set_xlabel(plots.label("词表大小（含合并所需的中间词）", "vocabulary size (closure included)"))
        axes.set_ylabel(plots.label("语料覆盖率（%）", "share of the corpus' tokens kept (%)"))
        axes.set_title(
            plots.label(
                f"选定 {chosen[0]:,} 个词，覆盖 {chosen[1]:.3%}",
                f"Chosen: {chosen[0]:,} tokens cover {chosen[1]:.3%}",
            )
        )
