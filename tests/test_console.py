"""Progress tells rate and ETA on stderr, stays out of stdout, and is silent when asked; pictures always render."""

from __future__ import annotations

import io
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


def test_the_last_note_stays_in_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.quiet(False)
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    with console.progress("train", 100, "steps") as bar:
        bar.advance(1, "loss 2.5")
        bar.advance(1)
        bar.advance(1, "loss 2.4")
    notes = [line.rpartition(" · ")[2] for line in capsys.readouterr().err.splitlines()]
    assert notes[:3] == ["loss 2.5", "loss 2.5", "loss 2.4"]


def test_watched_items_pass_through_and_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    console.quiet(False)
    assert list(console.watched(["ab", "c"], "validate", 3, "tokens", len)) == ["ab", "c"]
    assert capsys.readouterr().err.startswith("validate: 3 tokens in ")


def test_a_terminal_shows_work_within_work(monkeypatch: pytest.MonkeyPatch) -> None:
    console.quiet(False)
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with console.progress("train", 4, "steps") as bar:
        bar.advance(1, "loss 2.5")
        list(console.watched(range(3), "validate", 3, "tokens", lambda _: 1))
        bar.advance(3)
    shown = terminal.getvalue()
    assert "4/4 steps" in shown and "loss 2.5" in shown
    with pytest.raises(KeyError), console.progress("train", 4, "steps"):  # and an error leaves no bar behind
        {}["x"]
    assert console._screen is None


def test_quiet_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("train", 100, "steps") as bar:
        bar.advance(1)
    console.say("x")
    console.warn("x")
    said = capsys.readouterr()
    assert said.out == said.err == ""


@pytest.mark.pictures
@pytest.mark.filterwarnings("error:Glyph")
def test_pictures_have_no_missing_glyphs(tmp_path: Path) -> None:
    with plots.figure(tmp_path / "x.png") as axes:
        axes.plot([1, 2], [1, 2])
        axes.set_xlabel(plots.label("步数", "step"))
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
