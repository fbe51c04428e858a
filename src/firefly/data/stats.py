"""Numbers and pictures of lengths and tasks: how much of each task there is, and how long the samples are.

Lengths come as a plain list or, where memory must stay bounded, as a `Counter` of length → samples; the summary is
exact either way. Everything takes plain data, so that the same functions serve characters and tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from firefly import plots

Lengths = Mapping[int, int] | ArrayLike
PERCENTILES = (5, 25, 50, 75, 90, 95, 99)
_NUM_BINS = 80


def length_summary(lengths: Lengths) -> dict[str, Any]:
    """Count, total, mean, extremes, percentiles and a histogram of lengths; without lengths, only the count 0.

    `histogram` is {"width", "counts"}: bin i holds lengths from i × width on; it ends with the longest 1 %.
    """
    values, counts = _counted(lengths)
    count = int(counts.sum())
    if count == 0:
        return {"count": 0}
    total = int((values * counts).sum())
    percentiles = {f"p{share}": round(_percentile(values, counts, share), 1) for share in PERCENTILES}
    width = max(1, round(max(percentiles["p99"], 10) / _NUM_BINS))
    num_bins = int(percentiles["p99"]) // width + 1
    bins = np.bincount(np.minimum(values // width, num_bins), weights=counts, minlength=num_bins + 1)
    return {
        "count": count,
        "total": total,
        "min": int(values[0]),
        **percentiles,
        "max": int(values[-1]),
        "mean": round(total / count, 2),
        "histogram": {"width": width, "counts": bins[:num_bins].astype(int).tolist()},
    }


def _counted(lengths: Lengths) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The distinct lengths in ascending order, and how many samples have each."""
    if isinstance(lengths, Mapping):
        pairs = np.asarray(sorted(pair for pair in lengths.items() if pair[1]), np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]
    return np.unique(np.asarray(lengths, np.int64), return_counts=True)


def _percentile(values: NDArray[np.int64], counts: NDArray[np.int64], share: float) -> float:
    """As `np.percentile` has it: linear between the two nearest samples."""
    ends = np.cumsum(counts)
    place = share / 100 * (int(ends[-1]) - 1)
    low, high = values[np.searchsorted(ends, [int(place), int(np.ceil(place))], side="right")]
    return float(low + (high - low) * (place - int(place)))


def task_chart(path: Path, counts: Mapping[str, int], titles: Mapping[str, str]) -> None:
    """Draw one horizontal bar a task that has any, the largest on top; `titles` holds Chinese names by kind."""
    kinds = sorted((kind for kind in counts if counts[kind]), key=lambda kind: (counts[kind], kind))
    chinese = {kind: title for kind, title in titles.items() if title.lower() != kind.lower()}
    names = [plots.label(f"{chinese.get(kind, '')} {kind}".strip(), kind) for kind in kinds]
    total = sum(counts.values())
    with plots.figure(path, height=max(2.5, 1 + 0.32 * len(kinds))) as axes:
        bars = axes.barh(names, [counts[kind] for kind in kinds], color=plots.BLUE)
        axes.bar_label(bars, [f"{counts[kind]:,}" for kind in kinds], padding=4, color=plots.GREY)
        axes.margins(x=0.12, y=0.01)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(plots.label("条数", "examples"))
        axes.set_title(
            plots.label(
                f"各任务的数据量（{len(kinds)} 种，共 {total:,} 条）",
                f"Examples per task ({len(kinds)} kinds, {total:,} in all)",
            )
        )


def length_chart(path: Path, lengths: Lengths, unit: str = "token") -> None:
    """Draw the histogram of lengths with its peak and median; `unit` is "token" or "character"."""
    draw_lengths(path, length_summary(lengths), unit)


def draw_lengths(path: Path, summary: Mapping[str, Any], unit: str = "token") -> None:
    """`length_chart` from a `length_summary`; the longest 1 % are told, not drawn."""
    summary = summary if summary["count"] else length_summary([0])
    width, counts = summary["histogram"]["width"], summary["histogram"]["counts"]
    peak, median = int(np.argmax(counts)), summary["p50"]
    low, high, top = peak * width, (peak + 1) * width - 1, max(counts)
    beyond, longest = summary["count"] - sum(counts), summary["max"]
    peak_range = f"{low}–{high}" if high > low else f"{low}"
    measure = plots.label("词元数", "tokens") if unit == "token" else plots.label("字符数", "characters")
    with plots.figure(path) as axes:
        places = np.arange(len(counts)) * width
        axes.bar(places, counts, width=width, align="edge", color=plots.BLUE)
        label = f"{plots.label('峰值', 'peak')} {peak_range}"
        axes.bar([low], [top], width=width, align="edge", color=plots.ORANGE, label=label)
        label = f"{plots.label('中位数', 'median')} {median:g}"
        axes.axvline(median, color=plots.GREY, linewidth=1.5, linestyle="--", label=label)
        axes.legend(frameon=False, loc="upper right")
        axes.margins(x=0.01)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(plots.label(f"样本长度（{measure}）", f"length of a sample ({measure})"))
        axes.set_ylabel(plots.label("条数", "samples"))
        axes.set_title(
            plots.label(
                f"样本长度分布（最长 {longest:,}，图外 {beyond:,} 条）",
                f"Lengths of the samples (longest {longest:,}, {beyond:,} beyond the picture)",
            )
        )
