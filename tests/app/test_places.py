"""`firefly data`, `data stats` and `data peek` on everything that their argument may be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from firefly import api
from firefly.app.places import find_places
from firefly.cli import main
from firefly.errors import InputError, ModelError
from tiny import recipe_table, write_pairs


@pytest.fixture(scope="module")
def recipe(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose data is built in out/."""
    root = tmp_path_factory.mktemp("places")
    write_pairs(root / "pairs.jsonl")
    table = recipe_table(root / "out", tiny("bloom"), root / "pairs.jsonl")
    (root / "r.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
    api.data(root / "r.toml")
    return root / "r.toml"


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--quiet"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def stats(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    return json.loads(said(capsys, "data", "stats", *arguments, "--json"))


def test_build_may_be_left_out(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["data"], ["data", "build"], ["data", "--json"]):
        assert "tokens" in said(capsys, *words, str(recipe))


def test_stats_of_a_recipe_a_run_and_its_parts(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    by_recipe, by_run, by_tokens = (stats(capsys, str(place)) for place in (recipe, out, out / "tokens"))
    assert by_recipe == by_run and by_recipe["forecast"] == by_tokens["forecast"]
    assert by_recipe["unit"] == "token" and stats(capsys, str(out / "dataset"))["unit"] == "character"
    table = said(capsys, "data", "stats", str(recipe))
    assert "tokens/char" in table and "over 512" in table and "report.html" in table
    for name in ("dataset/README.md", "dataset/report.html", "tokens/report.html", "tokens/stats.json"):
        assert (out / name).is_file()
    api.train(recipe)  # what was written beside the data does not disturb it


def test_peek_of_a_recipe_a_run_and_its_tokens(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = recipe.parent / "out"
    page = recipe.parent / "page.html"
    shown = said(capsys, "data", "peek", str(recipe), "--num", "2", "--html", str(page))
    assert shown.count("[[") == shown.count("]]") == 2 and "\x1b" not in shown
    assert shown == said(capsys, "data", "peek", str(out), "--num", "2")
    assert shown == said(capsys, "data", "peek", str(out / "tokens"), "--num", "2")
    assert page.read_text("utf-8").count('class="sample"') == 2
    samples = json.loads(said(capsys, "data", "peek", str(out), "--num", "1", "--json"))
    assert samples[0]["tokens"][0] == {"text": "<s>", "learned": False, "special": True}


def test_tokens_on_their_own_need_a_model(
    recipe: Path, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "tokens"
    shutil.copytree(recipe.parent / "out" / "tokens", alone)
    assert stats(capsys, str(alone))["unit"] == "token"
    with pytest.raises(InputError, match="--model"):
        api.data_peek(alone)
    assert "line" in said(capsys, "data", "peek", str(alone), "--model", str(tiny("bloom")))
    with pytest.raises(ModelError, match="another tokenizer"):
        api.data_peek(alone, model="demo:base")


def test_a_moved_run_is_found(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(recipe.parent / "out", tmp_path / "moved")
    assert find_places(tmp_path / "moved").tokens == tmp_path / "moved" / "tokens"
    assert stats(capsys, str(tmp_path / "moved"))["output"] == str(tmp_path / "moved" / "tokens")


def test_what_is_no_such_place_is_one_sentence(recipe: Path, tmp_path: Path) -> None:
    for path, overrides, says in (
        (tmp_path / "nothing", [], "does not exist"),
        (tmp_path, [], "no run, dataset or tokens directory"),
        (recipe, [f"output_dir={tmp_path / 'new'}"], "no dataset yet"),
        (recipe.parent / "out", ["data.max_seq_length=9"], "go with a recipe"),
    ):
        with pytest.raises(InputError, match=says):
            api.data_stats(path, overrides)
    with pytest.raises(InputError, match="no tokens directory yet"):
        api.data_peek(recipe.parent / "out" / "dataset")
