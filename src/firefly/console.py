"""What a person sees while a job runs: rich progress on a terminal, plain lines in a log, silence when asked.

Everything goes to stderr, so that stdout carries results alone (`--json`). Long work always shows its rate
and ETA. `quiet()` turns all of it off; tests do.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol, TypeVar

Item = TypeVar("Item")

_LOG_INTERVAL_S = 5.0
_quiet = False
_prefix = ""  # before every line, where several processes share a terminal
_log: IO[str] | None = None  # a file that gets every message, too
_listener: Callable[[], None] | None = None  # is called whenever a bar advances, shown or not
_screen: Any = None  # the terminal's bars while some are shown; work inside other work adds its own there


def quiet(on: bool = True) -> None:
    """Silence (or restore) every message and progress bar of this process."""
    global _quiet
    _quiet = on


def share(log: IO[str], prefix: str = "") -> None:
    """Copy every message to `log`; a `prefix` says which process of several speaks, and then no bar is drawn."""
    global _log, _prefix
    _log, _prefix = log, prefix


def when_advancing(call: Callable[[], None]) -> None:
    """Let `call` know whenever any progress advances: the sign that this process still works."""
    global _listener
    _listener = call


def _advanced() -> None:
    if _listener is not None:
        _listener()


def say(message: str) -> None:
    """Print one line for the user on stderr."""
    if _log is not None:
        print(time.strftime("%H:%M:%S"), message, file=_log, flush=True)
    if _quiet:
        return
    if _on_terminal():
        from rich.console import Console

        Console(stderr=True, highlight=False).print(message, markup=False)
    else:
        print(_prefix + message, file=sys.stderr, flush=True)


def _on_terminal() -> bool:
    return sys.stderr.isatty() and not _prefix


def warn(message: str) -> None:
    """Print one warning for the user on stderr."""
    say(f"warning: {message}")


def has_colours() -> bool:
    """Whether stdout is a terminal that shows colours, and nobody asked for none (NO_COLOR)."""
    from rich.console import Console

    screen = Console()
    return screen.is_terminal and not screen.no_color and screen.color_system is not None


def show(*results: Any) -> None:
    """Print tables and coloured texts of `rich` on stdout, as wide as they are where it is no terminal."""
    from rich.console import Console

    screen = Console(highlight=False, width=None if sys.stdout.isatty() else 220)
    for result in results:
        screen.print(result)


class Progress(Protocol):
    """A running job's progress."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count `amount` more units as done; `note` says how it goes and is shown until the next one."""


@contextmanager
def progress(label: str, total: float | None, unit: str, done: float = 0) -> Iterator[Progress]:
    """Show progress with rate and ETA while the block runs.

    Args:
        label: what is being done, such as "train".
        total: how many units there are in all, or None when unknown.
        unit: plural noun of what is counted, such as "steps".
        done: units already done before (a resumed run).
    """
    if _quiet:
        yield _Silent()
    elif _on_terminal():
        with _bar(label, total, unit, done) as bar:
            yield bar
    else:
        lines = _Lines(label, total, unit, done)
        yield lines
        lines.finish()


def watched(
    items: Iterable[Item], label: str, total: float | None, unit: str, size: Callable[[Item], float]
) -> Iterator[Item]:
    """Pass `items` through while `progress` counts `size` of each one that is done with."""
    with progress(label, total, unit) as bar:
        for item in items:
            yield item
            bar.advance(size(item))


class _Silent:
    def advance(self, amount: float = 1, note: str = "") -> None:  # noqa: ARG002 - as the others'
        _advanced()


class _Lines:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, label: str, total: float | None, unit: str, done: float) -> None:
        self.label, self.total, self.unit, self.done, self.first = label, total, unit, done, done
        self.note = ""
        self.start_s = self.last_s = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        _advanced()
        self.done += amount
        self.note = note or self.note
        now_s = time.monotonic()
        if now_s - self.last_s >= _LOG_INTERVAL_S:
            self.last_s = now_s
            self._print()

    def _print(self) -> None:
        rate = (self.done - self.first) / max(time.monotonic() - self.start_s, 1e-9)
        total = f"/{self.total:,.0f}" if self.total else ""
        eta = f" · ETA {_clock((self.total - self.done) / rate)}" if self.total and rate > 0 else ""
        tail = f" · {self.note}" if self.note else ""
        say(f"{self.label}: {self.done:,.0f}{total} {self.unit} · {_rate(rate)} {self.unit}/s{eta}{tail}")

    def finish(self) -> None:
        elapsed_s = time.monotonic() - self.start_s
        rate = (self.done - self.first) / max(elapsed_s, 1e-9)
        say(f"{self.label}: {self.done:,.0f} {self.unit} in {elapsed_s:.1f} s ({_rate(rate)} {self.unit}/s)")


@contextmanager
def _bar(label: str, total: float | None, unit: str, done: float) -> Iterator[Progress]:
    """A rich bar with count, rate and ETA, its note on a line of its own below."""
    global _screen
    outermost = _screen is None
    if outermost:
        _screen = _bars()
        _screen.start()
    try:
        bar = _Bar(_screen, label, total, unit, done)
        yield bar
        if not outermost:
            _screen.remove_task(bar.task)
    finally:
        if outermost:
            _screen.stop()
            _screen = None


class _Bar:
    def __init__(self, bars: Any, label: str, total: float | None, unit: str, done: float) -> None:
        self.bars, self.unit, self.done = bars, unit, 0.0
        self.of = f"/{total:,.0f}" if total else ""
        self.task = bars.add_task(
            label, total=total, completed=int(done), of=self.of, unit=unit, rate="", note=""
        )
        self.start_s = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        _advanced()
        self.done += amount
        rate = self.done / max(time.monotonic() - self.start_s, 1e-9)
        changes = {"note": note} if note else {}
        self.bars.update(self.task, advance=amount, rate=f"{_rate(rate)} {self.unit}/s", **changes)


def _bars() -> Any:
    """The terminal's bars, one line each; under them what the jobs noted last."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Bars(RichProgress):
        def get_renderables(self) -> Iterator[Any]:
            yield self.make_tasks_table(self.tasks)
            yield from (Text(f"  {task.fields['note']}") for task in self.tasks if task.fields["note"])

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}{task.fields[of]} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
