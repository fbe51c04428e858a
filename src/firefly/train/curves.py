"""A run's metrics: metrics.jsonl for machines, reporters for those who watch, curves.png for people."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from firefly.console import warn
from firefly.errors import DiskFullError, OutputError
from firefly.files import write_atomic, writing_to
from firefly.plots import BLUE, ORANGE, label, panels
from firefly.train.reporters import Reporter

Row = dict[str, Any]
_DRAW_INTERVAL_S = 60.0  # a picture takes about a second
_MOST_KINDS_NOTED = 6  # in the line that a person reads while it trains


class Metrics:
    """Appends rows to `run`/metrics.jsonl; rows after `step`, from a part of the run that is redone, are cut."""

    def __init__(self, run: Path, step: int, reporters: Sequence[Reporter] = ()) -> None:
        self.run, self.path, self.reporters = run, run / "metrics.jsonl", reporters
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self.handle: IO[bytes] = self.path.open("ab", buffering=0)
        self.drawn_s = time.monotonic()
        self.waiting: list[str] = []  # lines that a full disk did not take

    def rows(self) -> list[Row]:
        """Every whole row on the disk; a line broken off by a crash is left out."""
        return read_rows(self.path)

    def write(self, row: Row) -> None:
        """Append one row and hand it to the reporters; on a full disk rows wait for space, with a word."""
        self.waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self._append()
            for reporter in self.reporters:
                reporter.log(scalars(row), row["step"])
        except DiskFullError as error:
            if len(self.waiting) <= 1:
                warn(f"{error} Training goes on; its metrics wait in memory.")

    def _append(self) -> None:
        """Write what waits, all of it or nothing, so that a later row never follows half a line."""
        end, data = self.path.stat().st_size, "".join(self.waiting).encode("utf-8")
        try:
            with writing_to(self.path):
                while data:  # a disk that fills up takes a part first
                    data = data[self.handle.write(data) :]
        except DiskFullError:
            self.handle.truncate(end)
            raise
        self.waiting.clear()

    def draw(self, at_once: bool = True) -> None:
        """Draw curves.png from all rows, if the disk has room; unless `at_once`, not again within a minute."""
        if not at_once and time.monotonic() - self.drawn_s < _DRAW_INTERVAL_S:
            return
        self.drawn_s = time.monotonic()
        with suppress(OutputError):
            draw_curves(self.rows(), self.run / "curves.png")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk was told of when the row was written
            self.handle.close()
        for reporter in self.reporters:
            reporter.close()


class UnwrittenMetrics(Metrics):
    """Keeps the rows in memory: for the processes that do not write."""

    def __init__(self) -> None:
        self._rows: list[Row] = []

    def rows(self) -> list[Row]:
        """All rows of this process."""
        return self._rows

    def write(self, row: Row) -> None:
        """Keep a row."""
        self._rows.append(row)

    def draw(self, at_once: bool = True) -> None:
        """Draw nothing."""

    def __exit__(self, *_: object) -> None:
        pass


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl up to the first that is none, or not whole; none where there is no such file."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            break
        rows.append(row)
    return rows


def scalars(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that reporters show: train/loss, train/loss_by_kind/Couplet, …"""
    names: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, (int, float)) and name != "step":
            names[f"train/{name}"] = value
        elif name == "validation":
            names |= {
                f"validation/{what}/{kind}": x for kind, one in value.items() for what, x in one.items()
            }
        elif isinstance(value, dict):
            names |= {f"train/{name}/{kind}": x for kind, x in value.items()}
    return names


def note(row: Row) -> str:
    """A training row in one line for a person: where it stands, how fast it goes, and what each task loses."""
    parts = [f"loss {row['loss']:.3f}", f"lr {row['learning_rate']:.2e}", f"grad norm {row['grad_norm']:.2f}"]
    parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if "mfu" in row:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / 1e9:.1f} GB")
    if row["padding_share"]:
        parts.append(f"padding {row['padding_share']:.1%}")
    parts.append(f"epoch {row['epoch']:.2f}")
    losses = sorted(row["loss_by_kind"].items(), key=lambda item: -item[1])
    shown = [f"{kind} {loss:.2f}" for kind, loss in losses[:_MOST_KINDS_NOTED]]
    parts += [*shown, f"{len(losses) - len(shown)} kinds below"] if len(losses) > len(shown) else shown
    return " · ".join(parts)


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Loss in total and by kind, learning rate, gradient norm, speed and memory over the steps, on six panels."""
    with panels(path, 2, 3, 15, 8) as (loss, kinds, rate, norm, speed, memory):
        _line(loss, rows, "loss", label("训练损失", "training loss"), BLUE)
        held_out = _held_out(rows)
        if held_out:
            loss.plot(
                *zip(*held_out, strict=True), "o-", color=ORANGE, label=label("验证损失", "held-out loss")
            )
        loss.legend(frameon=False)
        for place, kind in enumerate(sorted({kind for row in rows for kind in row.get("loss_by_kind", ())})):
            points = [(row["step"], row["loss_by_kind"].get(kind)) for row in rows if "loss_by_kind" in row]
            _smooth_line(
                kinds, points, label(kind, ascii(kind)), f"C{place % 10}", ("-", "--", ":")[place // 10 % 3]
            )
        if kinds.lines:
            kinds.legend(frameon=False, fontsize="x-small", ncols=2)
        _line(rate, rows, "learning_rate")
        _line(norm, rows, "grad_norm")
        _line(speed, rows, "tokens_per_s")
        _line(memory, rows, "memory_bytes", scale=1e-9)
        for one in (norm, speed, memory):
            one.set_ylim(bottom=0)
        _titles((loss, kinds, rate, norm, speed, memory))


def _titles(axes: Sequence[Any]) -> None:
    titles = (
        label("损失（nat/词元）", "loss (nats per token)"),
        label("各任务的损失（滑动平均）", "loss by kind (moving average)"),
        label("学习率", "learning rate"),
        label("梯度范数", "gradient norm"),
        label("速度（词元/秒）", "speed (tokens per second)"),
        label("内存峰值（GB）", "peak memory (GB)"),
    )
    for one, title in zip(axes, titles, strict=True):
        one.set_title(title, fontsize="medium")
        one.set_xlabel(label("步数", "step"))


def draw_comparison(runs: Mapping[str, Sequence[Row]], path: Path) -> None:
    """The curves of several runs, by name, over each other: training and held-out loss, learning rate, speed."""
    with panels(path, 2, 2, 12, 8) as (loss, held_out, rate, speed):
        for place, (name, rows) in enumerate(runs.items()):
            title, color = label(name, ascii(name)), f"C{place % 10}"
            points = [(row["step"], row["loss"]) for row in rows if "loss" in row]
            _smooth_line(loss, points, title, color)
            if measured := _held_out(rows):
                held_out.plot(*zip(*measured, strict=True), "o-", color=color)
            _line(rate, rows, "learning_rate", color=color)
            _line(speed, rows, "tokens_per_s", color=color)
        speed.set_ylim(bottom=0)
        loss.legend(frameon=False, fontsize="small")
        loss.set_title(label("训练损失（滑动平均）", "training loss (moving average)"), fontsize="medium")
        held_out.set_title(label("验证损失", "held-out loss"), fontsize="medium")
        rate.set_title(label("学习率", "learning rate"), fontsize="medium")
        speed.set_title(label("速度（词元/秒）", "speed (tokens per second)"), fontsize="medium")
        for one in (loss, held_out, rate, speed):
            one.set_xlabel(label("步数", "step"))


def _held_out(rows: Sequence[Row]) -> list[tuple[int, float]]:
    return [(row["step"], row["validation"]["all"]["loss"]) for row in rows if row.get("validation")]


def _line(
    axes: Any, rows: Sequence[Row], name: str, title: str | None = None, color: str = BLUE, scale: float = 1
) -> None:
    points = [(row["step"], row[name] * scale) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1, label=title)


def _smooth_line(
    axes: Any, points: Sequence[tuple[int, float | None]], title: str, color: str, style: str = "-"
) -> None:
    """Each point is the mean of a fiftieth of the curve up to it; rows without this kind are left out."""
    known = [(step, value) for step, value in points if value is not None]
    width = max(1, len(known) // 50)
    values = [value for _, value in known]
    means = [
        sum(part) / len(part)
        for end in range(1, len(values) + 1)
        if (part := values[max(0, end - width) : end])
    ]
    axes.plot([step for step, _ in known], means, style, color=color, linewidth=1, label=title)
