"""`firefly evaluate` from the command line: which models, which data, and one sentence for each slip."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firefly import api
from firefly.cli import main
from firefly.recipe import Recipe
from tiny import recipe_table, save_model_dir, write_pairs


@pytest.fixture(scope="module")
def run(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's output directory."""
    folder = tmp_path_factory.mktemp("run")
    table = recipe_table(folder / "mine", tiny("bloom"), write_pairs(folder / "pairs.jsonl", 60), max_steps=2)
    return Path(api.train(Recipe.from_table(table)).output)


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """`evaluate("MODEL", …)`: what the command prints as JSON, or of a failure the sentence."""

    def command(*arguments: str | Path) -> Any:
        output = ["--output", str(tmp_path / "report"), "--json", "--quiet"]
        capsys.readouterr()
        try:
            main(["evaluate", *map(str, arguments), *output])
        except SystemExit as stop:
            if stop.code:
                told = capsys.readouterr().err.strip()
                assert stop.code == 1 and told.startswith("error: ") and "Traceback" not in told
                return told
        return json.loads(capsys.readouterr().out)

    return command


def test_models_side_by_side_on_what_a_run_held_out(
    run: Path, tiny: Callable[[str], Path], evaluate: Callable[..., Any], tmp_path: Path
) -> None:
    """The base has no chat template, and is asked in the run's format; overrides hold for all."""
    found = evaluate(f"base={tiny('bloom')}", run, "--tasks", "Couplet", "evaluate.generations_per_kind=3")
    assert list(found["models"]) == ["base", "mine"] and found["questions"] == {"Couplet": 3}
    assert set(found["models"]["mine"]["held_out"]) == {"Couplet", "all"}
    assert Path(found["report"]) == tmp_path / "report" / "report.html" and Path(found["report"]).is_file()
    again = evaluate(run / "model", "--tasks", "Couplet", "evaluate.generations_per_kind=3")
    assert again["models"]["model"] == found["models"]["mine"]


def test_questions_of_ones_own(run: Path, evaluate: Callable[..., Any], tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text('{"kind": "Couplet", "input": "对下联：白日依山尽", "target": "黄河入海流"}\n', "utf-8")
    assert evaluate(run, "--data", data)["questions"] == {"Couplet": 1}
    copied = shutil.copytree(run / "model", tmp_path / "alone")
    assert "name a dataset directory or a file of questions with --data" in evaluate(copied)
    assert evaluate(copied, "--data", data)["questions"] == {"Couplet": 1}
    (copied / "chat_template.jinja").unlink()
    assert "no chat template" in evaluate(copied, "--data", data)
    assert evaluate(copied, "--data", data, "--chat-format", "firefly")["questions"] == {"Couplet": 1}


def test_slips(run: Path, tiny: Callable[[str], Path], evaluate: Callable[..., Any], tmp_path: Path) -> None:
    assert "did you mean 'Couplet'" in evaluate(run, "--tasks", "Coupelt")
    assert "Two models would be called 'model'" in evaluate(run / "model", tiny("bloom"))
    assert "cannot name a model" in evaluate(f"a/b={run}")
    assert "neither a model directory" in evaluate(tmp_path)
    assert "does not exist" in evaluate(tmp_path / "nothing")
    assert "Unknown chat format 'fire'" in evaluate(run, "--chat-format", "fire")
    assert "did you mean 'batch_size'" in evaluate(run, "--tasks", "Couplet", "evaluate.batch_sise=3")
    assert "does not exist" in evaluate(run, "--data", tmp_path / "nothing.jsonl")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "precious.txt").write_text("mine")
    assert "holds other files" in evaluate(run, "--tasks", "Couplet")
    assert (tmp_path / "report" / "precious.txt").read_text() == "mine"
    other = save_model_dir(tmp_path / "gpt2", "llama")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    (tmp_path / "report" / "precious.txt").unlink()
    assert "family 'gpt2' is not supported" in evaluate(run, other, "--tasks", "Couplet")
