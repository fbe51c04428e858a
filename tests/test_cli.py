"""The command line: help, JSON on stdout, and for every kind of bad input one sentence and a non-zero exit."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from firefly import api
from firefly.cli import main
from tiny import recipe_table, write_pairs

VERBS = ("demo", "prune", "data", "plan", "train", "run", "runs", "evaluate", "chat", "verse", "version")
GOLDEN = Path(__file__).parent / "golden"


def firefly(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m firefly` in a process of its own."""
    environment = os.environ | {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "firefly", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run in this process; returns the error, which is one sentence and no traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    said = capsys.readouterr()
    assert stopped.value.code == 1, said.err
    *progress, error = said.err.strip().split("error: ")
    assert said.out == "" and len(progress) == 1 and "Traceback" not in said.err
    return error


def test_help_is_the_golden_one() -> None:
    """When a verb or its help changes on purpose: firefly --help > tests/golden/help.txt, COLUMNS=100 TERM=dumb."""
    assert firefly("--help").stdout == (GOLDEN / "help.txt").read_text("utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_examples_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert f"firefly {verb}" in text.split("Examples")[1] and "--json" in text


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_are_functions_too(verb: str) -> None:
    assert callable(getattr(api, verb))


def test_version_json() -> None:
    done = firefly("version", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == dataclasses.asdict(api.version())


@pytest.fixture
def toml(tiny: Callable[[str], Path], tmp_path: Path) -> Callable[..., str]:
    def write(change: Callable[[dict[str, Any]], object] = lambda _: None) -> str:
        source = tmp_path / "pairs.jsonl"
        if not source.exists():
            write_pairs(source)
        table = recipe_table(tmp_path / "out", tiny("bloom"), source)
        change(table)
        (tmp_path / "r.toml").write_text(tomli_w.dumps(table), encoding="utf-8")
        return str(tmp_path / "r.toml")

    return write


def test_json_goes_to_stdout_alone(toml: Callable[..., str], tmp_path: Path) -> None:
    done = firefly("run", toml(), "--json", "train.max_steps=2")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert list(result["stages"]) == ["dataset", "tokens", "train", "evaluate"]
    assert "train: 2 steps" in done.stderr  # progress is told, elsewhere
    assert (tmp_path / "out" / "recipe.toml").is_file()


BAD_SOURCES: dict[str, tuple[bytes | None, str]] = {
    "missing file": (None, "does not exist"),
    "empty file": (b"", "is empty"),
    "bad JSON": (b'{"kind": "K", "input": "a", "target": "b"}\n{"kind": \n', "line 2: not valid JSON"),
    "invalid UTF-8": (
        b'{"kind": "K", "input": "a", "target": "b"}\n\xff\xfe\n',
        "line 2: byte 0 is not valid UTF-8",
    ),
    "wrong field": (b'{"kind": "K", "input": "a", "output": "b"}\n', "line 1: field 'target' is missing"),
    "garbage": (os.urandom(64).replace(b"\n", b"") + b"\x80\xff", "line 1"),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
@pytest.mark.parametrize("verb", ["data", "run"])
def test_bad_sources(
    name: str, verb: str, toml: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, says = BAD_SOURCES[name]
    recipe = toml()
    source = tmp_path / "pairs.jsonl"
    source.unlink()
    if content is not None:
        source.write_bytes(content)
    said = fails(capsys, verb, recipe)
    assert says in said and "pairs.jsonl" in said
    assert not (tmp_path / "out" / "dataset").exists()


def test_bom_and_crlf_are_read(toml: Callable[..., str], tmp_path: Path) -> None:
    recipe = toml()
    source = tmp_path / "pairs.jsonl"
    source.write_bytes(b"\xef\xbb\xbf" + source.read_bytes().replace(b"\n", b"\r\n"))
    assert api.data(recipe).stages["dataset"].result["train"] > 90


def test_ctrl_c_says_that_what_is_done_is_kept(
    toml: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("firefly.app.pipeline.encode_dataset", interrupted)
    with pytest.raises(SystemExit) as stopped:
        main(["run", toml()])
    assert stopped.value.code == 130
    assert "run the same command to go on" in capsys.readouterr().err


def test_small_slips(
    toml: Callable[..., str],
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert "is a directory" in fails(capsys, "run", str(tmp_path))
    assert "prompt is empty" in fails(capsys, "chat", str(tiny("bloom")), "--prompt", " ")
    assert "run `firefly train`" in fails(capsys, "evaluate", toml())
    assert "train.adam_epsilon" in fails(capsys, "train", toml(), "train.adam_epsilon=inf")
    assert "train.seed" in fails(capsys, "train", toml(), "train.seed=99999999999999999999")


def test_bad_recipes(toml: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean 'learning_rate'" in fails(capsys, "train", toml(), "train.learning_rat=1")
    assert "does not exist" in fails(capsys, "run", str(tmp_path / "nothing.toml"))

    def task(table: dict[str, Any]) -> None:
        table["data"]["sources"][0] |= {"task": "Couplets", "importer": "records"}

    assert "did you mean 'Couplet'" in fails(capsys, "data", toml(task))

    def importer(table: dict[str, Any]) -> None:
        table["data"]["sources"][0]["importer"] = "fireflies"

    assert "did you mean 'firefly'" in fails(capsys, "data", toml(importer))


def test_bad_models(
    toml: Callable[..., str], tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in fails(capsys, "run", toml(), f"model.base={tmp_path / 'nothing'}")
    model = tmp_path / "model"
    shutil.copytree(tiny("bloom"), model)
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").unlink()
    for verb in ("run", "train", "data"):
        assert "no weights" in fails(capsys, verb, toml(), f"model.base={model}")
    assert "no weights" in fails(capsys, "chat", str(model), "--prompt", "你好")
    assert "no weights" in fails(
        capsys, "prune", str(model), str(tmp_path / "p"), "-c", str(tmp_path / "pairs.jsonl"), "-n", "400"
    )
    for index in ("{}", "[", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../x"}}'):
        (model / "model.safetensors.index.json").write_text(index)
        assert "model.safetensors.index.json" in fails(capsys, "chat", str(model), "--prompt", "你好")
    (model / "model.safetensors.index.json").unlink()
    (model / "pytorch_model.bin").touch()
    assert "convert them to safetensors" in fails(capsys, "run", toml(), f"model.base={model}")
    (model / "model.safetensors").write_bytes(weights[:-100])
    assert "damaged" in fails(capsys, "train", toml(), f"model.base={model}")
    (model / "model.safetensors").write_bytes(weights)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    assert "not supported for training" in fails(capsys, "train", toml(), f"model.base={model}")
    (model / "config.json").unlink()
    assert "no config.json" in fails(capsys, "train", toml(), f"model.base={model}")


def test_an_output_directory_that_is_not_ours(
    toml: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").touch()
    assert "holds other files" in fails(capsys, "run", toml())
    (tmp_path / "file").touch()
    assert "Choose an output_dir" in fails(capsys, "run", toml(), f"output_dir={tmp_path / 'file' / 'x'}")
    assert (tmp_path / "out" / "thesis.doc").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 600 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_full_disk_keeps_what_was_there(
    toml: Callable[..., str],
    small_disk: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found out before a checkpoint is begun; or, when the check was too hopeful, in the middle of writing it."""
    out = small_disk / "out"
    recipe = toml(lambda table: table.update(output_dir=str(out)))
    api.data(recipe)
    before = {path: path.read_bytes() for path in (out / "tokens").rglob("*") if path.is_file()}
    assert "MiB free" in fails(capsys, "train", recipe)
    monkeypatch.setattr("firefly.train.checkpoint.require_disk", lambda *_: None)
    assert "The disk is full" in fails(capsys, "train", recipe, "train.check=false")
    assert {path: path.read_bytes() for path in (out / "tokens").rglob("*") if path.is_file()} == before
    assert not list((out / "run").glob("*checkpoint*"))


@pytest.mark.parametrize("seen_before", [True, False])
def test_a_full_disk_while_data_is_built(
    toml: Callable[..., str],
    small_disk: Path,
    capsys: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen_before: bool,
) -> None:
    if not seen_before:  # as when another program fills the disk in the meantime
        monkeypatch.setattr("firefly.data.dataset.require_disk", lambda *_: None)
    recipe = toml(lambda table: table.update(output_dir=str(small_disk / "out")))
    write_pairs(tmp_path / "pairs.jsonl", 20_000)
    said = fails(capsys, "data", recipe)
    assert ("and the disk has" if seen_before else "The disk is full") in said
    assert not (small_disk / "out" / "dataset").exists()


def test_an_unknown_engine_is_one_sentence_with_the_choices(toml: Callable[..., str], capsys: Any) -> None:
    assert "data.engine = 'rai': allowed: 'local', 'ray'" in fails(capsys, "data", toml(), "--engine", "rai")
