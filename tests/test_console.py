"""Progress tells rate and ETA on stderr, stays out of stdout, and is silent when asked; pictures always render."""

from __future__ import annotations

from pathlib import Path

import pytest

from firefly import console, plots


def test_a_log_gets_lines_with_rate_and_eta(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.quiet(False)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("train", 100, "steps", done=40) as bar:
        bar.advance(30, "loss 2.5")
    said = capsys.readouterr()
    assert said.out == ""
    first, last = said.err.splitlines()
    assert (
        first.startswith("train: 70/100 steps · ")
        and "steps/s · ETA 0:" in first
        and first.endswith("loss 2.5")
    )
    assert last.startswith("train: 70 steps in ")


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 100, "steps") as bar:
        bar.advance(1)
    console.say("x")
    console.warn("x")
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.filterwarnings("error:Glyph")
def test_pictures_have_no_missing_glyphs(tmp_path: Path) -> None:
    with plots.figure(tmp_path / "x.png") as axes:
        axes.plot([1, 2], [1, 2])
        axes.set_xlabel(plots.label("步数", "step"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
