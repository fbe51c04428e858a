"""Pictures for people: matplotlib figures whose Chinese renders, or whose labels fall back to English."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from firefly.errors import OutputError

_CJK_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS",
    "Noto Sans CJK JP", "AR PL UMing CN", "Droid Sans Fallback",
)  # fmt: skip
BLUE, ORANGE, GREY = "#2f6f9f", "#d9822b", "#8a8f98"


@cache
def chinese_font() -> str | None:
    """The first installed font that has Chinese glyphs, or None."""
    from matplotlib import font_manager

    installed = {font.name for font in font_manager.fontManager.ttflist}
    return next((name for name in _CJK_FONTS if name in installed), None)


def label(chinese: str, english: str) -> str:
    """The Chinese label when it can be drawn, else the English one."""
    return chinese if chinese_font() else english


@contextmanager
def figure(path: Path, width: float = 8, height: float = 4.5) -> Iterator[Any]:
    """Yield a matplotlib `Axes`; the figure is written to `path` as PNG when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    fonts = [name for name in (chinese_font(), "DejaVu Sans") if name]
    with matplotlib.rc_context(
        {"font.sans-serif": fonts, "font.family": "sans-serif", "axes.unicode_minus": False}
    ):
        canvas, axes = pyplot.subplots(figsize=(width, height), layout="constrained")
        axes.spines[["top", "right"]].set_visible(False)
        try:
            yield axes
            buffer = io.BytesIO()
            canvas.savefig(buffer, format="png", dpi=120)
        finally:
            pyplot.close(canvas)
    try:
        path.write_bytes(buffer.getvalue())
    except OSError as error:
        raise OutputError(f"Cannot write the picture {path}: {error.strerror or error}.") from error
