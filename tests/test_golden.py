"""Golden files: what the tasks render and how a tiny run learns. A change here is a change for every user.

To renew them on purpose: python tests/test_golden.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import firefly.data.corpora
import firefly.data.literature  # noqa: F401
from firefly import api
from firefly.data.importers import IMPORTERS, Origin, Skipped, Whole
from firefly.data.readers import read_records
from firefly.data.tasks import load_tasks, task
from firefly.recipe import Recipe
from tiny import recipe_table, save_model_dir, write_pairs

GOLDEN = Path(__file__).parent / "golden"
RAW = Path(__file__).parent / "data" / "raw_samples"


def rendered(kind: str) -> str:
    """What becomes of a kind's three raw records: importer, direction, template, answer; one example a line.

    Each line of raw_samples/KIND.jsonl names the importer and holds a record as it stands in a source, with the
    source's renamed `fields` where it has some.
    """
    path = RAW / f"{kind}.jsonl"
    lines = []
    for number, sample in read_records(path):
        record = sample["record"]
        record |= {name: record[there] for name, there in sample.get("fields", {}).items()}
        item = next(iter(IMPORTERS[sample["importer"]](record, Origin(path, number, kind))))
        assert not isinstance(item, Skipped), f"{path}, line {number}: skipped as {item.reason}"
        example = item.example if isinstance(item, Whole) else task(kind).render(item.fields, source="golden")
        lines.append(example.to_json() + "\n")
    return "".join(lines)


def hundred_losses(model: Path, folder: Path) -> list[float]:
    source = folder / "pairs.jsonl"
    write_pairs(source)
    table = recipe_table(folder / "out", model, source, max_steps=100, save_steps=100, learning_rate=2e-3)
    table["data"]["overlong"] = "right-of-target"
    api.train(Recipe.from_table(table))
    lines = (folder / "out" / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.parametrize("kind", load_tasks())
def test_a_task_renders_as_before(kind: str) -> None:
    expected = (GOLDEN / "tasks" / f"{kind}.jsonl").read_text("utf-8")
    assert expected.count("\n") == 3
    assert rendered(kind) == expected


def test_every_golden_file_has_its_task() -> None:
    assert {path.stem for path in (GOLDEN / "tasks").iterdir()} == set(load_tasks())


def test_a_hundred_losses_as_before(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Equal up to what another processor's arithmetic may add up to over a hundred steps."""
    expected = json.loads((GOLDEN / "losses.json").read_text("utf-8"))
    assert hundred_losses(tiny("bloom"), tmp_path) == pytest.approx(expected, abs=5e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        base = save_model_dir(Path(place) / "bloom", "bloom")
        losses = hundred_losses(base, Path(place))
    (GOLDEN / "losses.json").write_text(json.dumps(losses, indent=0) + "\n", encoding="utf-8")
    for name in load_tasks():
        (GOLDEN / "tasks" / f"{name}.jsonl").write_text(rendered(name), encoding="utf-8")
