"""Recipes: every shipped one loads, all mistakes come at once with their cure, overrides and freezing round-trip."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.errors import RecipeError
from firefly.recipe import Recipe, TrainSection

ROOT = Path(__file__).parents[1]
RECIPES = sorted([*ROOT.glob("recipes/*.toml"), *ROOT.glob("src/firefly/demo/*.toml")])


def table(**train: Any) -> dict[str, Any]:
    data = {"sources": [{"path": "a.jsonl"}]}
    return {"name": "x", "output_dir": "o", "model": {"base": "demo:base"}, "data": data, "train": train}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = Recipe.load(path)
    assert Recipe.from_table(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("name", "batch", "steps"), [("firefly-1b4", 16, 90_000), ("firefly-2b6", 8, 260_000)]
)
def test_article_recipes_hold_the_articles_table(name: str, batch: int, steps: int) -> None:
    recipe = Recipe.load(ROOT / "recipes" / f"{name}.toml")
    train = recipe.train
    assert (train.per_device_train_batch_size, train.max_steps) == (batch, steps)
    assert (train.learning_rate, train.warmup_steps, train.lr_scheduler_type) == (3e-5, 3000, "cosine")
    assert recipe.data.max_seq_length == 512 and train.gradient_accumulation_steps == 1
    assert recipe.prune is not None and recipe.prune.vocab_size == 46_145


def test_all_mistakes_at_once_with_cures() -> None:
    wrong = table(learning_rat=1, warmup_steps=-1, objective="stf", max_grad_norm="much")
    wrong["data"]["sources"][0]["taks"] = "Couplet"
    wrong["trian"] = {}
    with pytest.raises(RecipeError) as caught:
        Recipe.from_table(wrong, "my.toml")
    message = str(caught.value)
    assert message.startswith("my.toml: 6 mistakes")
    for part in (
        "train.learning_rat = 1: unknown key; did you mean 'learning_rate'?",
        "train.warmup_steps = -1: must be ≥ 0",
        "train.objective = 'stf': allowed: 'sft', 'pretrain', 'dpo'; did you mean 'sft'?",
        "train.max_grad_norm = 'much': should be a valid number",
        "data.sources.0.taks = 'Couplet': unknown key; did you mean 'task'?",
        "trian = {}: unknown key; did you mean 'train'?",
    ):
        assert part in message


def test_missing_parts_are_named() -> None:
    with pytest.raises(RecipeError, match=r"model: missing(.|\n)*data: missing"):
        Recipe.from_table({"name": "x", "output_dir": "o"})


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'name = "x"\noutput_dir = "o"\nmodel.base = "m"\n[data]\nsources = [{path = "a"}]\n', "utf-8"
    )
    recipe = Recipe.load(path, ["train.learning_rate=2e-5", "output_dir=out/mine", "data.deduplicate=off"])
    assert (recipe.train.learning_rate, recipe.output_dir, recipe.data.deduplicate) == (
        2e-5,
        "out/mine",
        "off",
    )
    with pytest.raises(RecipeError, match=r"not of the form section\.key=value"):
        Recipe.load(path, ["train.learning_rate"])
    with pytest.raises(RecipeError, match="did you mean 'learning_rate'"):
        Recipe.load(path, ["train.learning_rte=1"])
    with pytest.raises(RecipeError, match="'name', which is a value"):
        Recipe.load(path, ["name.first=1"])


@given(
    st.builds(
        TrainSection,
        seed=st.integers(0, 99),
        max_steps=st.none() | st.integers(1, 9),
        weight_decay=st.floats(0, 1),
    )
)
def test_freezing_round_trips(train: TrainSection) -> None:
    recipe = Recipe.from_table(table()).model_copy(update={"train": train})
    assert Recipe.from_table(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"name = ", "not valid TOML"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_unreadable_recipes(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        Recipe.load(path)
    with pytest.raises(RecipeError, match="does not exist"):
        Recipe.load(tmp_path / "other.toml")


def test_bom_and_crlf_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    text = 'name = "x"\r\noutput_dir = "o"\r\nmodel.base = "m"\r\n[data]\r\nsources = [{path = "a"}]\r\n'
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert Recipe.load(path).name == "x"


def test_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    path = tmp_path / "r.toml"
    path.write_text(
        'name = "x"\noutput_dir = "o"\nmodel.base = "m"\n[data]\nsources = [{path = "a.jsonl"}, {path = "b"}]\n',
        "utf-8",
    )
    assert [source.path for source in Recipe.load(path).data.sources] == [str(tmp_path / "a.jsonl"), "b"]


def test_defaults_read_back_as_the_same_json() -> None:
    """A default of 32 for a float reads back as 32.0; a run's fingerprint would then change on going on."""
    train = TrainSection()
    assert json.dumps(TrainSection.model_validate(train.model_dump()).model_dump()) == json.dumps(
        train.model_dump()
    )


@pytest.mark.parametrize("path", sorted(ROOT.glob("recipes/*lora.toml")), ids=lambda path: path.name)
def test_recipes_of_adapters_differ_from_the_full_one_in_training_alone(path: Path) -> None:
    full_name, _, method = path.stem.rpartition("-")
    adapters, full = Recipe.load(path), Recipe.load(path.with_name(f"{full_name}.toml"))
    assert adapters.train.method == method and full.train.method == "full"
    assert adapters.train.learning_rate >= 4 * full.train.learning_rate
    assert (adapters.name, adapters.output_dir) == (path.stem, f"out/{path.stem}")
    assert adapters.model_dump(exclude={"name", "output_dir", "train"}) == full.model_dump(
        exclude={"name", "output_dir", "train"}
    )
