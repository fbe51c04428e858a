"""Pictures for people: matplotlib figures whose Chinese always renders.

The glyphs of every label that the charts use lie in fonts/, a small subset of an open font; a label beyond them,
such as the title of a user's own task, needs an installed Chinese font, or falls back to English.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from firefly.errors import OutputError

FONT = Path(__file__).parent / "fonts" / "FireflyChart.otf"
FONT_NAME = "Firefly Chart"
_INSTALLED_FONTS = (
    "Noto Sans CJK SC", "Source Han Sans SC", "Noto Sans SC", "WenQuanYi Zen Hei", "WenQuanYi Micro Hei",
    "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB", "Heiti SC", "Arial Unicode MS",
    "Noto Sans CJK JP", "AR PL UMing CN", "Droid Sans Fallback",
)  # fmt: skip
BLUE, ORANGE, GREY = "#2f6f9f", "#d9822b", "#8a8f98"


@cache
def fonts() -> tuple[str, ...]:
    """The families to draw with, the first that has a glyph wins: ours, an installed Chinese one, matplotlib's own."""
    from matplotlib import font_manager

    font_manager.fontManager.addfont(str(FONT))
    installed = {font.name for font in font_manager.fontManager.ttflist}
    return (FONT_NAME, *[name for name in _INSTALLED_FONTS if name in installed][:1], "DejaVu Sans")


def drawable(text: str) -> bool:
    """Whether one of the `fonts` has a glyph for each character."""
    missing = set(text)
    for name in fonts():
        missing -= _characters(name)
    return not missing


@cache
def _characters(font: str) -> frozenset[str]:
    """The characters that a font can draw."""
    from matplotlib import font_manager, ft2font

    return frozenset(map(chr, ft2font.FT2Font(font_manager.findfont(font)).get_charmap()))


def label(chinese: str, english: str) -> str:
    """The Chinese label when it can be drawn, else the English one."""
    return chinese if drawable(chinese) else english


@contextmanager
def figure(path: Path, width: float = 8, height: float = 4.5) -> Iterator[Any]:
    """Yield a matplotlib `Axes`; the figure is written to `path` as PNG, whole or not at all, when the block ends.

    Raises `OutputError` when `path` cannot be written.
    """
    with panels(path, 1, 1, width, height) as axes:
        yield axes[0]


@contextmanager
def panels(path: Path, rows: int, columns: int, width: float, height: float) -> Iterator[list[Any]]:
    """As `figure`, with `rows` × `columns` axes, row by row."""
    import matplotlib
    from matplotlib.figure import Figure  # not pyplot, which keeps global state

    style = {"font.sans-serif": list(fonts()), "font.family": "sans-serif", "axes.unicode_minus": False}
    with matplotlib.rc_context(style):
        canvas = Figure(figsize=(width, height), layout="constrained")
        axes = [canvas.add_subplot(rows, columns, number + 1) for number in range(rows * columns)]
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
        yield axes
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="png", dpi=120)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"Cannot write the picture {path}: {error.strerror or error}.") from error
    finally:
        temporary.unlink(missing_ok=True)
