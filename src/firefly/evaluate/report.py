"""One self-contained HTML page, its plots, and a table for the terminal, all made from one `EvaluateResult`.

Everything that a model or a dataset wrote is escaped. The page needs no network and no other file.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from firefly.data.tasks import load_tasks
from firefly.evaluate.forms import FORMS, line_lengths
from firefly.evaluate.result import EvaluateResult
from firefly.files import write_atomic
from firefly.plots import BLUE, GREY, ORANGE, figure, label

_COLOURS = (GREY, BLUE, ORANGE, "#5a9e6f", "#a45ca8")
_SHOWCASE = (
    "Couplet", "AncientPoem", "LyricGeneration", "ProseGeneration", "ClassicalChinese", "SentimentAnalyze",
    "JinYongGeneration", "Composition", "StoryGeneration", "Dictionary",
)  # fmt: skip
"""Tasks whose answers are shown first: those that the article shows, and what a reader enjoys."""
_OUT_OF_100 = ("chrf", "bleu")


@dataclass(frozen=True)
class Cell:
    """One number of one model and its confidence interval, None where there is none."""

    value: float | None
    interval: tuple[float, float] | None

    def __str__(self) -> str:
        if self.value is None:
            return "–"
        ends = f" [{self.interval[0]:.3g}, {self.interval[1]:.3g}]" if self.interval else ""
        return f"{self.value:.3g}{ends}"


@dataclass(frozen=True)
class Row:
    """One number of one task, a cell a model; `change` is relative, last to first. The first after bits per byte is the
    task's headline."""

    kind: str
    name: str
    cells: list[Cell]

    @property
    def title(self) -> str:
        """The task's title in both languages."""
        task = load_tasks().get(self.kind)
        return f"{task.title_zh} · {task.title_en}" if task else ""

    @property
    def change(self) -> float | None:
        """Bits per byte of the last model against the first."""
        first, last = self.cells[0].value, self.cells[-1].value
        if self.name != "bits_per_byte" or len(self.cells) < 2 or not first or last is None:
            return None
        return last / first - 1


def rows(result: EvaluateResult) -> list[Row]:
    """The table's rows: every task's, then those of `all`."""
    models = list(result.models.values())
    kinds = {kind for model in models for kind in (*model.held_out, *model.answers)}
    made = []
    for kind in [*sorted(kinds - {"all"}), "all"]:
        scores = [
            {name: model.held_out[kind][name] for name in ("bits_per_byte",) if kind in model.held_out}
            | model.answers.get(kind, {})
            for model in models
        ]
        for name in dict.fromkeys(name for table in scores for name in table):
            bounds = (model.intervals.get(kind, {}).get(name) for model in models)
            cells = (Cell(table.get(name), bound) for table, bound in zip(scores, bounds, strict=True))
            made.append(Row(kind, name, list(cells)))
    return made


def headlines(table: Sequence[Row]) -> list[Row]:
    """Of each task bits per byte, and the first number that judges its answers."""
    tasks = (list(group) for _, group in groupby(table, key=lambda row: row.kind))
    return [row for group in tasks for row in group[:2]]


def text_table(result: EvaluateResult) -> str:
    """The headlines as lines of text, with confidence intervals, a column a model."""
    lines = [["task", "metric", *result.models]]
    for row in headlines(rows(result)):
        lines.append([row.kind, row.name.replace("_", " "), *map(str, row.cells)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def write_report(result: EvaluateResult, out: Path) -> None:
    """Write the plots and report.html into `out`, each file atomically."""
    table = rows(result)
    bits = [row for row in table if row.name == "bits_per_byte"]
    answered = [row for row in headlines(table) if row.name != "bits_per_byte"]
    plots = {}
    if bits:
        plots["bits_per_byte.png"] = _bars(list(result.models), bits, label("每字节比特数", "bits per byte"))
    if answered:
        plots["scores.png"] = _bars(
            list(result.models), answered, label("任务得分（%）", "headline score (%)")
        )
    for name, picture in plots.items():
        write_atomic(out / name, picture)
    write_atomic(out / "report.html", render(result, table, plots))


def render(result: EvaluateResult, table: Sequence[Row], plots: Mapping[str, bytes]) -> str:
    """The page: the table, plots embedded as base64 PNG, the samples side by side; every value escaped."""
    from jinja2 import Environment, StrictUndefined

    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    order = {kind: number for number, kind in enumerate(_SHOWCASE)}
    samples = sorted(result.samples, key=lambda sample: order.get(sample.kind, len(order)))
    return environment.from_string(page).render(
        models=list(result.models),
        tasks=[list(group) for _, group in groupby(table, key=lambda row: row.kind)],
        plots={name: base64.b64encode(picture).decode("ascii") for name, picture in plots.items()},
        num_questions=sum(result.questions.values()),
        same_answers=result.same_answers,
        samples=[list(group) for _, group in groupby(samples, key=lambda sample: sample.kind)],
        titles={row.kind: row.title for row in table},
        form=lambda text: FORMS.get(line_lengths(text), ""),
    )


def _bars(models: Sequence[str], table: Sequence[Row], title: str) -> bytes:
    """Grouped bars with confidence intervals as PNG: a group a row, a bar a model; shares as per cent."""
    width = 0.8 / len(models)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bars.png"
        with figure(path, width=max(8.0, 1.1 * len(table))) as axes:
            for number, model in enumerate(models):
                colour = _COLOURS[number % len(_COLOURS)]
                for place, row in enumerate(table):
                    scale = 1 if row.name in (*_OUT_OF_100, "bits_per_byte") else 100
                    value, interval = row.cells[number].value or 0.0, row.cells[number].interval
                    low, high = interval or (value, value)
                    axes.bar(
                        place + (number - (len(models) - 1) / 2) * width,
                        scale * value,
                        width,
                        yerr=[[scale * max(value - low, 0)], [scale * max(high - value, 0)]],
                        error_kw={"elinewidth": 0.8, "alpha": 0.6},
                        label=model if place == 0 else None,
                        color=colour,
                    )
            axes.set_xticks(range(len(table)), [row.kind for row in table], rotation=20, ha="right")
            axes.set_ylabel(title)
            axes.legend(frameon=False)
        return path.read_bytes()
