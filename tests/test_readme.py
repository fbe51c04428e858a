"""The README's commands work: those of the shell blocks are run on a short demo, the GPU ones are read."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from firefly import api
from firefly.cli import main
from firefly.recipe import Recipe

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh.md")


def commands(readme: str, block: str) -> list[str]:
    """Lines of the ```block parts, comments off."""
    text = (ROOT / readme).read_text("utf-8")
    found = "\n".join(re.findall(rf"^```{block}\n(.*?)^```", text, re.M | re.S))
    return [line.split(" #")[0].strip() for line in found.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished short demo in out/demo."""
    from firefly.console import quiet

    quiet()
    folder = tmp_path_factory.mktemp("demo")
    short = ["train.max_steps=3", "train.warmup_steps=1", "evaluate.generations_per_kind=1"]
    api.demo(str(folder / "out" / "demo"), short)
    return folder


@pytest.mark.parametrize(
    "line", sorted({line for name in READMES for line in commands(name, "sh") if line.startswith("firefly ")})
)
def test_shell_commands_run(
    line: str, demo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(line)[1:])
    assert not stopped.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", READMES)
def test_nothing_is_left_to_fill_in(name: str) -> None:
    assert "@@" not in (ROOT / name).read_text("utf-8")


def test_both_begin_with_the_two_commands() -> None:
    targets = (ROOT / "Makefile").read_text("utf-8")
    for name in READMES:
        assert commands(name, "sh")[:2] == ["make demo", "make test"]
    assert "\ndemo:" in targets and "\ntest:" in targets


def test_both_say_the_same() -> None:
    """The two READMEs show the same commands, recipe and pictures of the layout."""
    blocks = [
        [re.sub(r"\s*#.*", "", line) for block in ("sh", "sh gpu", "toml") for line in commands(name, block)]
        for name in READMES
    ]
    assert blocks[0] == blocks[1]
    figures = [
        re.findall(r"\d[\d.,%]*\d", re.sub(r"```.*?```", "", (ROOT / name).read_text("utf-8"), flags=re.S))
        for name in READMES
    ]
    assert sorted(figures[0]) == sorted(figures[1])


@pytest.mark.parametrize("line", commands("README.md", "sh gpu")[1:])
def test_gpu_commands_are_well_formed(line: str) -> None:
    verb, target, *overrides = shlex.split(line)[1:]
    assert hasattr(api, verb)
    if target.endswith(".toml"):
        Recipe.load(ROOT / target, overrides)


def test_the_recipe_shown_is_valid(tmp_path: Path) -> None:
    for name in READMES:
        text = re.findall(r"^```toml\n(.*?)^```", (ROOT / name).read_text("utf-8"), re.M | re.S)[0]
        (tmp_path / "shown.toml").write_text(text, encoding="utf-8")
        assert Recipe.load(tmp_path / "shown.toml").name == "mine"


def test_the_demo_tells_its_story(demo: Path) -> None:
    import json

    summary = json.loads((demo / "out" / "demo" / "summary.json").read_text("utf-8"))
    assert summary["proof_passed"] is True
    assert (summary["vocab_before"], summary["vocab_after"]) == (16_384, 8192)
    assert summary["params_before"] - summary["params_after"] == 8192 * 256  # the tied matrix, once
    kinds = {
        "Couplet",
        "AncientPoem",
        "ClassicalChinese",
        "Dictionary",
        "SentimentAnalyze",
        "StoryGeneration",
    }
    assert set(summary["examples"]) == kinds
    for name in ("bits_per_byte_before", "bits_per_byte_after"):
        assert set(summary[name]) == kinds | {"all"}
    assert set(summary["wall_s"]) == {"dataset", "prune", "tokens", "train", "evaluate"}
    assert summary["train_tokens_per_s"] > 0 and len(summary["final_weights_sha256"]) == 64
    assert len(summary["answers"]) == 4 and 0 <= summary["same_answers"] <= summary["num_answers"] == 6
