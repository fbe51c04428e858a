"""Numbers and pictures of a dataset: how much of each task, and how long the samples are.

Everything takes plain data, so that the same functions serve characters here and tokens after encoding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from firefly import plots


def length_summary(lengths: ArrayLike) -> dict[str, float]:
    """Count, mean, extremes and quantiles of lengths; an empty list has count 0 and nothing else."""
    values = np.asarray(lengths)
    if values.size == 0:
        return {"count": 0}
    quantiles = {f"p{share}": float(np.percentile(values, share)) for share in (25, 50, 75, 90, 99)}
    summary = {
        "min": float(values.min()),
        **quantiles,
        "max": float(values.max()),
        "mean": float(values.mean()),
    }
    return {"count": int(values.size)} | {name: round(value, 1) for name, value in summary.items()}


def task_chart(path: Path, counts: Mapping[str, int], titles: Mapping[str, str]) -> None:
    """Draw one horizontal bar a task, the largest on top; `titles` holds Chinese names by kind."""
    kinds = sorted(counts, key=lambda kind: (counts[kind], kind))
    names = [plots.label(f"{titles.get(kind, '')} {kind}".strip(), kind) for kind in kinds]
    with plots.figure(path, height=max(2.5, 1 + 0.35 * len(kinds))) as axes:
        bars = axes.barh(names, [counts[kind] for kind in kinds], color=plots.BLUE)
        axes.bar_label(bars, [f"{counts[kind]:,}" for kind in kinds], padding=4, color=plots.GREY)
        axes.margins(x=0.12)
        axes.set_xlabel(plots.label("条数", "examples"))
        axes.set_title(plots.label("各任务的数据量", "Examples per task"))


def length_chart(path: Path, lengths: Sequence[int] | np.ndarray, unit: str = "token") -> None:
    """Draw the histogram of sample lengths with its peak and median; the longest 1 % are told, not drawn.

    `unit` is "token" or "character".
    """
    values = np.asarray(lengths)
    if values.size == 0:
        values = np.zeros(1, dtype=int)
    limit = max(int(np.percentile(values, 99)), 10)
    width = max(1, limit // 80)
    counts, edges = np.histogram(values, bins=np.arange(0, limit + 2 * width, width))
    peak = int(counts.argmax())
    median, beyond = float(np.median(values)), int((values >= edges[-1]).sum())
    chinese = {"token": "token 数", "character": "字符数"}.get(unit, unit)
    with plots.figure(path) as axes:
        axes.bar(edges[:-1], counts, width=width, align="edge", color=plots.BLUE)
        axes.axvline(median, color=plots.ORANGE, linewidth=1)
        axes.text(
            median, counts.max(), f" {plots.label('中位数', 'median')} {median:.0f}", color=plots.ORANGE
        )
        axes.set_xlabel(plots.label(f"样本长度（{chinese}）", f"length of a sample ({unit}s)"))
        axes.set_ylabel(plots.label("条数", "samples"))
        low, high, longest = int(edges[peak]), int(edges[peak + 1]), int(values.max())
        axes.set_title(
            plots.label(
                f"长度分布：峰值 {low}–{high}，最长 {longest:,}（{beyond:,} 条在图外）",
                f"Lengths: peak {low}–{high}, longest {longest:,} ({beyond:,} beyond the picture)",
            )
        )
