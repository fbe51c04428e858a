"""`firefly runs` finds what lies under a folder, knows its state, and tells what differs between runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from firefly import api
from firefly.cli import main
from firefly.errors import InputError
from firefly.files import exclusive
from firefly.recipe import Recipe
from tiny import recipe_table, write_pairs


def a_run(out: Path, name: str, age_s: float = 0, finished: bool = True, **train: Any) -> Path:
    """What a run leaves behind, with rows of two logged steps and one validation."""
    run = out / "run"
    run.mkdir(parents=True)
    table = {"name": name, "output_dir": str(out), "model": {"base": "demo:base"}, "train": train}
    (run / "recipe.toml").write_text(tomli_w.dumps(table | {"of_an_older_version": True}), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"torch": "2.13.0"}), encoding="utf-8")
    rows: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 4.0 / step,
            "learning_rate": 1e-3,
            "tokens_per_s": 100.0 * step,
            "total_steps": 30,
        }
        for step in (10, 20)
    ]
    rows.insert(1, {"step": 10, "validation": {"all": {"loss": 1.25}, "Couplet": {"loss": 1.5}}})
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 30, "lo'  # broken off by a kill
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    for path in run.iterdir():
        os.utime(path, (1.7e9 - age_s, 1.7e9 - age_s))
    if finished:
        (out / ".stages").mkdir()
        (out / ".stages" / "train.json").write_text("{}", encoding="utf-8")
    return out


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """A finished run, an older one that stopped, and one deep below; and a hidden one, which is nobody's."""
    a_run(tmp_path / ".cache" / "d", "hidden")
    return [
        a_run(tmp_path / "a", "first", learning_rate=1e-3, seed=1),
        a_run(tmp_path / "b", "second", 60, finished=False, learning_rate=2e-3, seed=1, report_to=["wandb"]),
        a_run(tmp_path / "deep" / "er" / "c", "third", 120, learning_rate=1e-3, seed=1),
    ]


def test_runs_are_found_with_their_figures_the_latest_last(three: list[Path], tmp_path: Path) -> None:
    result = api.runs(tmp_path)
    assert [one.name for one in result.runs] == ["third", "second", "first"] and result.differences == {}
    assert [one.state for one in result.runs] == ["finished", "interrupted", "finished"]
    last = result.runs[-1]
    assert (last.steps, last.total_steps, last.loss, last.validation_loss) == (20, 30, 0.2, 1.25)
    assert last.tokens_per_s == 2000.0 and last.path == str(three[0]) and last.when > result.runs[0].when


@pytest.mark.parametrize("place", [".", "run"])
def test_a_run_is_known_by_its_own_folder_too(
    three: list[Path], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0] / place)
    (one,) = api.runs().runs
    assert (one.name, one.state) == ("first", "finished")


def test_a_held_run_is_running_and_asking_changes_nothing(three: list[Path], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    api.runs(tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    with exclusive(three[1], "a test"):
        assert [one.state for one in api.runs(*three).runs] == ["finished", "running", "finished"]
    assert api.runs(three[1]).runs[0].state == "interrupted"
    with exclusive(three[1], "a test"):  # and the question holds nothing itself
        pass


@pytest.mark.pictures
def test_named_runs_are_compared_in_their_order(three: list[Path], tmp_path: Path) -> None:
    result = api.runs(three[1], three[0], three[2], png=tmp_path / "curves.png")
    assert [one.name for one in result.runs] == ["second", "first", "third"]
    assert result.differences == {
        "train.learning_rate": [2e-3, 1e-3, 1e-3],
        "train.report_to": [["wandb"], None, None],
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert result.picture == str(tmp_path / "curves.png")


def test_a_run_that_has_just_begun_has_no_figures(tmp_path: Path) -> None:
    out = a_run(tmp_path / "new", "new", finished=False)
    (out / "run" / "metrics.jsonl").unlink()
    (one,) = api.runs(tmp_path, png=tmp_path / "x.png").runs
    assert (one.steps, one.loss, one.validation_loss, one.tokens_per_s) == (0, None, None, None)


def test_what_cannot_be_listed_is_said(three: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="There is no run under"):
        api.runs(tmp_path / "empty")
    with pytest.raises(InputError, match="nowhere is not a folder"):
        api.runs(three[0], tmp_path / "nowhere")
    (three[0] / "run" / "environment.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="damaged"):
        api.runs(three[0])


def test_the_command_prints_tables_and_json(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(["runs", *arguments])
        assert not stopped.value.code
        return capsys.readouterr().out

    assert len(json.loads(printed(str(tmp_path), "--json"))["runs"]) == 3
    text = printed(str(three[0]), str(three[1]))
    assert "interrupted" in text and "train.learning_rate" in text and "0.002" in text
    assert "third" not in text and "1.250" in text


def test_a_real_run_is_listed_as_its_result_says(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "pairs.jsonl")
    made = Recipe.from_table(recipe_table(tmp_path / "out", tiny("bloom"), source, max_steps=4))
    result = api.train(made).stages["train"].result
    (one,) = api.runs(tmp_path).runs
    assert (one.name, one.state, one.steps, one.total_steps) == ("tiny", "finished", 4, 4)
    assert (one.loss, one.validation_loss) == (result["train_loss"], result["validation"]["all"]["loss"])
