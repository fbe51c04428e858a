"""Past and present runs: which there are, how far they came, and what tells two of them apart.

Everything is read from what a run leaves behind (OUT/run/recipe.toml, environment.json, metrics.jsonl), as it was
written: a recipe of an older version is shown although it would not load any more. No torch here: listing is instant.
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from firefly.data.table import Table
from firefly.errors import InputError
from firefly.files import is_held
from firefly.train.curves import Row, draw_comparison, read_rows

State = Literal["running", "finished", "interrupted"]
_DEEPEST = 4  # levels of folders in which runs are looked for
_OF_THE_PLACE = ("name", "output_dir")  # differ anyway, and change nothing


@dataclass(frozen=True)
class RunSummary:
    """One run: `loss` and `validation_loss` in nats a token, `when` is its last sign of life (local time, ISO 8601).

    What was not measured yet is None. `running` is a run whose output directory a process holds.
    """

    name: str
    path: str
    state: State
    steps: int
    total_steps: int | None
    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    when: str


@dataclass(frozen=True)
class RunsResult:
    """The runs. Where two or more were named, `differences` has an option's value in each; `picture` is a PNG."""

    runs: list[RunSummary]
    differences: dict[str, list[Any]] = field(default_factory=dict)
    picture: str | None = None

    def tables(self) -> list[Table]:
        """The runs and, where there are some, their differences."""
        columns = {"run": "", "state": "", "steps": ",d", "of": ",d", "loss": ".3f", "held out": ".3f"}
        columns |= {"tokens/s": ",.0f", "last sign of life": "", "where": ""}
        rows = []
        for one in self.runs:
            figures = (one.steps, one.total_steps, one.loss, one.validation_loss, one.tokens_per_s)
            rows.append([one.name, one.state, *figures, one.when.replace("T", " "), one.path])
        tables = [Table("", columns, rows)]
        if self.differences:
            # Folders are as unique as they must be where two runs bear one name.
            heads = {"option": "", **dict.fromkeys(_short_names(self.runs), "")}
            values = [[name, *map(_text, row)] for name, row in self.differences.items()]
            tables.append(Table("differences", heads, values))
        return tables


def list_runs(places: Sequence[Path] = (), png: Path | None = None) -> RunsResult:
    """Find the runs under `places` (default: the current folder), the latest last; `png` draws their curves.

    Where `places` are two or more runs themselves, they stay in that order, and their options are compared.
    Raises `InputError` for a folder that does not exist, or when there is no run at all.
    """
    places = places or [Path()]
    if missing := [place for place in places if not place.is_dir()]:
        raise InputError(f"{missing[0]} is not a folder; give runs' output directories, or a folder of them.")
    compared = len(places) > 1 and all(map(_run_of, places))
    found = list(dict.fromkeys(run for place in places for run in _find(place)))
    if not found:
        raise InputError(
            f"There is no run under {', '.join(map(str, places))}; give an output_dir, or a folder of them."
        )
    rows = {run: read_rows(run / "metrics.jsonl") for run in found}
    runs = {run: _summary(run, rows[run]) for run in found}
    if not compared:
        runs = dict(sorted(runs.items(), key=lambda item: item[1].when))
    if png is not None:
        names = _short_names(list(runs.values()))
        draw_comparison({name: rows[run] for name, run in zip(names, runs, strict=True)}, png)
    return RunsResult(
        list(runs.values()), _differences(list(runs)) if compared else {}, str(png) if png else None
    )


def _run_of(place: Path) -> Path | None:
    """The run directory that `place` is, or holds as an output directory."""
    for run in (place / "run", place):
        if (run / "recipe.toml").is_file() and (run / "environment.json").is_file():
            return run
    return None


def _find(place: Path) -> Iterator[Path]:
    """The run directories at and below `place`."""
    for folder, below, _ in os.walk(place):
        here = Path(folder)
        run = _run_of(here)
        if run is not None:
            yield run
        if run is not None or len(here.relative_to(place).parts) >= _DEEPEST:
            below.clear()
        below[:] = sorted(name for name in below if not name.startswith("."))


def _summary(run: Path, rows: Sequence[Row]) -> RunSummary:
    out = run.absolute().parent
    trained = [row for row in rows if "loss" in row]
    last = trained[-1] if trained else {}
    stamp = out / ".stages" / "train.json"  # the pipeline's word that training has ended
    state: State = "running" if is_held(out) else "finished" if stamp.is_file() else "interrupted"
    written = [
        path.stat().st_mtime for path in (run / "metrics.jsonl", run / "recipe.toml") if path.is_file()
    ]
    return RunSummary(
        name=str(_options(run).get("name", out.name)),
        path=str(run.parent),
        state=state,
        steps=last.get("step", 0),
        total_steps=last.get("total_steps"),
        loss=last.get("loss"),
        validation_loss=next(
            (row["validation"]["all"]["loss"] for row in reversed(rows) if row.get("validation")), None
        ),
        tokens_per_s=last.get("tokens_per_s"),
        when=datetime.fromtimestamp(max(written)).isoformat(timespec="seconds"),
    )


def _options(run: Path) -> dict[str, Any]:
    """The options a run was started with, `section.key` → value, and its environment."""
    try:
        recipe = tomllib.loads((run / "recipe.toml").read_text(encoding="utf-8"))
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{run} holds a damaged recipe.toml or environment.json ({error}).") from error
    return _flat(recipe) | _flat({"environment": environment})


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _differences(runs: Sequence[Path]) -> dict[str, list[Any]]:
    """Options that are not the same in all runs; None where a run does not have one."""
    options = [_options(run) for run in runs]
    names = [
        name for name in dict.fromkeys(name for one in options for name in one) if name not in _OF_THE_PLACE
    ]
    values = {name: [one.get(name) for one in options] for name in names}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row)}


def _short_names(runs: Sequence[RunSummary]) -> list[str]:
    """Each run's name, with its folder where the name is not its own."""
    names = [one.name for one in runs]
    return [one.name if names.count(one.name) == 1 else f"{one.name} ({one.path})" for one in runs]


def _text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
