"""Every label that a chart may show has its glyphs in the shipped font; a label beyond it falls back to English."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont

from firefly import plots
from firefly.data.stats import draw_lengths, length_summary, task_chart
from firefly.data.tasks import load_tasks

pytestmark = pytest.mark.pictures
TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "make_font.py"))


@pytest.fixture
def only_our_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without an installed Chinese font."""
    plots.fonts()  # registers ours
    monkeypatch.setattr(plots, "fonts", lambda: (plots.FONT_NAME, "DejaVu Sans"))


def test_the_font_has_every_label() -> None:
    """When this fails, a chart or a task has a new label: run tools/make_font.py again."""
    font = TTFont(plots.FONT)
    missing = TOOL["characters"]() - set(map(chr, font.getBestCmap()))
    assert not missing, f"run tools/make_font.py: no glyph for {''.join(sorted(missing))}"
    assert {"各", "峰", "中"} <= TOOL["characters"]()  # the collector does find labels


def test_the_font_is_small_free_and_bears_its_own_name() -> None:
    font = TTFont(plots.FONT)
    names = {record.nameID: record.toUnicode() for record in font["name"].names}
    assert plots.FONT.stat().st_size < 200_000
    assert (
        names[1] == names[4] == plots.FONT_NAME
        and names[6] == font["CFF "].cff.fontNames[0] == "FireflyChart"
    )
    for number in (1, 3, 4, 6):
        assert not any(reserved in names[number] for reserved in ("Noto", "Source", "Adobe"))
    assert "SIL Open Font License" in names[13] and "Adobe" in names[0]
    assert "SIL OPEN FONT LICENSE" in (plots.FONT.parent / "OFL.txt").read_text("utf-8")


@pytest.mark.usefixtures("only_our_font")
def test_charts_draw_without_a_missing_glyph(tmp_path: Path) -> None:
    titles = {kind: task.title_zh for kind, task in load_tasks().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each missing glyph
        task_chart(tmp_path / "tasks.png", {kind: 1000 + len(kind) for kind in titles}, titles)
        for unit in ("token", "character"):
            draw_lengths(tmp_path / f"{unit}.png", length_summary(range(300)), unit)
            assert (tmp_path / f"{unit}.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["character.png", "tasks.png", "token.png"]


@pytest.mark.usefixtures("only_our_font")
def test_a_label_beyond_the_font_is_english(tmp_path: Path) -> None:
    assert plots.label("对联 Couplet", "Couplet") == "对联 Couplet"
    assert plots.label("鱻𰻝 Mine", "Mine") == "Mine"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task_chart(tmp_path / "tasks.png", {"Mine": 3}, {"Mine": "鱻𰻝"})


def test_the_same_figures_give_the_same_picture(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        task_chart(tmp_path / name, {"Couplet": 3, "Mine": 5}, {"Couplet": "对联"})
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
