"""A run's metrics: metrics.jsonl for machines, TensorBoard events, and loss.png for people."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from firefly.console import warn
from firefly.errors import DiskFullError, OutputError
from firefly.files import write_atomic, writing_to
from firefly.plots import BLUE, ORANGE, figure, label


class Metrics:
    """Appends rows to `run`/metrics.jsonl; rows after `step`, from a part of the run that is redone, are cut."""

    def __init__(self, run: Path, step: int, report_to: list[Any]) -> None:
        self.run, self.path = run, run / "metrics.jsonl"
        kept = [row for row in self.rows() if row["step"] <= step]
        write_atomic(self.path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
        self.handle: IO[bytes] = self.path.open("ab", buffering=0)
        self.waiting: list[str] = []  # lines that a full disk did not take
        self.board: Any = None
        if "tensorboard" in report_to:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def rows(self) -> list[dict[str, Any]]:
        """Every whole row on the disk; a line broken off by a crash is left out."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_bytes().splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def write(self, row: dict[str, Any]) -> None:
        """Append one row and hand it to TensorBoard; on a full disk rows wait for space, with a word."""
        self.waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        try:
            self._append()
            if self.board is not None:
                with writing_to(self.path):
                    for name, value in _scalars(row):
                        self.board.add_scalar(name, value, row["step"])
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

    def draw(self) -> None:
        """Draw loss.png from everything written so far, if the disk has room for it."""
        with suppress(OutputError):
            draw_loss(self.rows(), self.run / "loss.png")

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # a full disk was told of when the row was written
            self.handle.close()
        if self.board is not None:
            with suppress(OSError):
                self.board.close()


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    pairs = [(f"train/{name}", value) for name, value in row.items() if isinstance(value, float)]
    for kind, values in row.get("validation", {}).items():
        pairs += [(f"validation/{name}/{kind}", value) for name, value in values.items()]
    return pairs


def draw_loss(rows: list[dict[str, Any]], path: Path) -> None:
    """Training loss and, where measured, held-out loss over the steps."""
    with figure(path) as axes:
        trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
        axes.plot(
            *zip(*trained, strict=True), color=BLUE, linewidth=1, label=label("训练损失", "training loss")
        )
        held_out = [(row["step"], row["validation"]["all"]["loss"]) for row in rows if row.get("validation")]
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), "o-", color=ORANGE, label=label("验证损失", "held-out loss")
            )
        axes.set_xlabel(label("步数", "step"))
        axes.set_ylabel(label("损失（nat/词元）", "loss (nats per token)"))
        axes.legend(frameon=False)
