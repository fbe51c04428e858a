"""Who else hears of a run's figures, as `train.report_to` says: TensorBoard, Weights & Biases, SwanLab.

The last two are installed by whoever wants them, and send what they are given where their user set them up to.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from firefly.console import warn
from firefly.errors import RecipeError, TrainingError
from firefly.files import write_atomic, writing_to


class Reporter(Protocol):
    """Takes the scalars of one step."""

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        """Report `scalars` by name, such as "train/loss"."""

    def close(self) -> None:
        """Hand over what is still held back."""


def require_reporters(names: Sequence[str]) -> None:
    """Raise `RecipeError` for a reporter that is not installed, before any work is done."""
    for name in names:
        if find_spec(name) is None:
            raise RecipeError(
                f"train.report_to names '{name}', which is not installed; run `pip install {name}`, "
                "or take it out of report_to."
            )


def open_reporters(
    names: Sequence[str], run: Path, step: int, title: str, options: Mapping[str, Any]
) -> list[Reporter]:
    """Open the reporters of a run that goes on after `step`; `options` are what it was started with."""
    require_reporters(names)
    made: list[Reporter] = []
    for name in dict.fromkeys(names):
        made.append(_TensorBoard(run, step) if name == "tensorboard" else _Tracker(name, run, title, options))
    return made


class _TensorBoard:
    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run / "tensorboard"
        self.writer: Any = SummaryWriter(str(self.folder), purge_step=step + 1)

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        with writing_to(self.folder):
            for name, value in scalars.items():
                self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        with suppress(OSError):  # a full disk was told of when the row was written
            self.writer.close()


class _Tracker:
    """wandb and swanlab, whose functions init, log and finish are alike."""

    def __init__(self, name: str, run: Path, title: str, options: Mapping[str, Any]) -> None:
        self.name = name
        self.module: Any = import_module(name)
        if name == "wandb":
            named = {"name": title, "dir": str(run)}
        else:
            (run / "swanlab").mkdir(exist_ok=True)
            named = {"experiment_name": title, "logdir": str(run / "swanlab")}
        try:
            self.module.init(
                project="firefly", config=dict(options), id=_report_id(run), resume="allow", **named
            )
        except Exception as error:
            raise TrainingError(
                f"{name} does not start ({error}); log in with `{name} login`, or take '{name}' out of "
                "train.report_to. metrics.jsonl and curves.png are written in any case."
            ) from error

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        if self.module is None:
            return
        try:
            self.module.log(dict(scalars), step=step)
        except Exception as error:  # whatever it is, it must not end a long run, and metrics.jsonl has it all
            warn(
                f"{self.name} failed ({error}); training goes on without it, metrics.jsonl has every figure."
            )
            self.module = None

    def close(self) -> None:
        if self.module is not None:
            with suppress(Exception):  # as above
                self.module.finish()


def _report_id(run: Path) -> str:
    """The name under which a tracker knows this run, also after a resume; 21 characters, as SwanLab asks."""
    path = run / "report_id"
    if not path.is_file():
        write_atomic(path, uuid.uuid4().hex[:21])
    return path.read_text(encoding="utf-8").strip()
