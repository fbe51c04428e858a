"""One self-contained HTML page, its plots, and a table for the terminal, all made from one `EvaluateResult`.

Everything that a model or a dataset wrote is escaped. The page needs no network and no other file.
"""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from firefly.data.tasks import load_tasks
from firefly.evaluate.forms import FORMS, line_lengths
from firefly.evaluate.result import EvaluateResult
from firefly.files import write_atomic
from firefly.plots import BLUE, GREY, ORANGE, figure, label

_COLOURS = (GREY, BLUE, ORANGE)


@dataclass(frozen=True)
class Row:
    """One task in the table: a number a model, None where it has none; `change` is relative, last to first."""

    kind: str
    title: str
    bits_per_byte: list[float | None]
    change: float | None
    headline: str
    scores: list[dict[str, float]]


def rows(result: EvaluateResult) -> list[Row]:
    """The table's rows: every task, then `all`."""
    models = result.models.values()
    names = {name for model in models for name in (*model.held_out, *model.answers)}
    made = []
    for kind in [*sorted(names - {"all"}), "all"]:
        bits = [model.held_out.get(kind, {}).get("bits_per_byte") for model in models]
        scores = [model.answers.get(kind, {}) for model in models]
        first, last = bits[0], bits[-1]
        change = last / first - 1 if first and last is not None and len(bits) > 1 else None
        task = load_tasks().get(kind)
        title = f"{task.title_zh} · {task.title_en}" if task else ""
        made.append(Row(kind, title, bits, change, next(iter(scores[0]), ""), scores))
    return made


def text_table(result: EvaluateResult) -> str:
    """The table as lines of text: bits per byte, and each task's headline, from model to model."""
    lines = [f"{'task':<18}{'bits per byte, ' + ' → '.join(result.models):<32}headline metric"]
    for row in rows(result):
        bits = " → ".join("–" if value is None else f"{value:.3f}" for value in row.bits_per_byte)
        found = " → ".join(f"{table[row.headline]:.3g}" for table in row.scores if row.headline in table)
        lines.append(f"{row.kind:<18}{bits:<32}{row.headline.replace('_', ' ')} {found}".rstrip())
    return "\n".join(lines)


def write_report(result: EvaluateResult, out: Path) -> None:
    """Write the plots and report.html into `out`, each file atomically."""
    table = rows(result)
    bits = {row.kind: row.bits_per_byte for row in table}
    plots = {"bits_per_byte.png": _bars(list(result.models), bits, label("每字节比特数", "bits per byte"))}
    answered = {
        row.kind: [_percent(row.headline, scores) for scores in row.scores] for row in table if row.headline
    }
    if answered:
        plots["scores.png"] = _bars(
            list(result.models), answered, label("任务得分（%）", "headline score (%)")
        )
    for name, picture in plots.items():
        write_atomic(out / name, picture)
    write_atomic(out / "report.html", render(result, table, plots))


def render(result: EvaluateResult, table: Sequence[Row], plots: Mapping[str, bytes]) -> str:
    """The page: plots embedded as base64 PNG, the table, the samples side by side; every value escaped."""
    from jinja2 import Environment, StrictUndefined

    page = Path(__file__).with_name("report.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(page).render(
        models=list(result.models),
        table=table,
        plots={name: base64.b64encode(picture).decode("ascii") for name, picture in plots.items()},
        samples=result.samples,
        form=lambda text: FORMS.get(line_lengths(text), ""),
    )


def _percent(name: str, scores: Mapping[str, float]) -> float | None:
    """A headline on a scale to 100, as chrF and BLEU have it already."""
    if name not in scores:
        return None
    return scores[name] * (1 if name in ("chrf", "bleu") else 100)


def _bars(models: Sequence[str], groups: Mapping[str, Sequence[float | None]], title: str) -> bytes:
    """Grouped bars as PNG: a group a task, a bar a model."""
    width = 0.8 / len(models)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bars.png"
        with figure(path) as axes:
            for number, model in enumerate(models):
                places = [place + (number - (len(models) - 1) / 2) * width for place in range(len(groups))]
                heights = [values[number] or 0.0 for values in groups.values()]
                axes.bar(places, heights, width, label=model, color=_COLOURS[number % len(_COLOURS)])
            axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right")
            axes.set_ylabel(title)
            axes.legend(frameon=False)
        return path.read_bytes()
