"""C-Eval and CMMLU through lm-evaluation-harness, on a few made-up questions in the layout of the real files."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.cli import main
from firefly.errors import InputError
from firefly.evaluate import harness
from firefly.evaluate.harness import run_harness

QUESTIONS = [
    ("黄河流入什么海？", "渤海", "东海", "南海", "黄海", "A"),
    ("《静夜思》的作者是谁？", "杜甫", "李白", "王维", "白居易", "B"),
    ("一年有几个季节？", "二", "三", "四", "五", "C"),
    ("“守株待兔”出自哪部书？", "论语", "孟子", "庄子", "韩非子", "D"),
]


def write(path: Path, header: list[str], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout that C-Eval's and CMMLU's archives unpack to."""
    folder = tmp_path_factory.mktemp("data")
    header = ["id", "question", "A", "B", "C", "D", "answer", "explanation"]
    rows = [(str(number), *row, "") for number, row in enumerate(QUESTIONS)]
    for subject in ("law", "logic"):
        write(folder / f"ceval/val/{subject}_val.csv", header, rows)
        write(folder / f"ceval/dev/{subject}_dev.csv", header, rows[:2])
    header = ["", "Question", "A", "B", "C", "D", "Answer"]
    rows = [(str(number), *row) for number, row in enumerate(QUESTIONS)]
    write(folder / "cmmlu/test/agronomy.csv", header, rows)
    write(folder / "cmmlu/dev/agronomy.csv", header, rows[2:])
    return folder


@pytest.mark.parametrize(
    ("family", "num_shots", "context_tokens"), [("bloom", 0, 2048), ("llama", 2, 2048), ("bloom", 2, 30)]
)
def test_likelihoods_are_those_of_the_harnesss_own_model(
    data: Path, tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch,
    family: str, num_shots: int, context_tokens: int,
) -> None:  # fmt: skip
    """For every choice of every question, with examples and with a context that must be cut."""
    place, real, compared = tiny(family), lm_eval.simple_evaluate, []

    def both(model: Any, **options: Any) -> Any:
        network, tokenizer = AutoModelForCausalLM.from_pretrained(place), AutoTokenizer.from_pretrained(place)
        peer = HFLM(pretrained=network, tokenizer=tokenizer, max_length=context_tokens)
        ours, theirs = real(model, **options), real(peer, **options)
        for task, samples in theirs["samples"].items():
            for one, other in zip(ours["samples"][task], samples, strict=True):
                mine, wanted = ([ll for [(ll, _)] in sample["resps"]] for sample in (one, other))
                assert one["arguments"] == other["arguments"] and mine == pytest.approx(wanted, abs=1e-3)
                compared.extend(mine)
        return ours

    monkeypatch.setattr(lm_eval, "simple_evaluate", both)
    found = run_harness({"m": (place, context_tokens)}, ["ceval", "cmmlu"], data, num_shots)
    ceval, cmmlu = found.models["m"]["ceval"], found.models["m"]["cmmlu"]
    assert (ceval.num_questions, cmmlu.num_questions, len(compared)) == (8, 4, 48)
    assert set(ceval.subjects) == {"law", "logic"} and set(cmmlu.subjects) == {"agronomy"}
    assert ceval.interval[0] <= ceval.accuracy <= ceval.interval[1]
    assert any("cmmlu" in line and "4 questions" in line for line in found.lines())


def test_what_is_missing_is_one_sentence(
    data: Path, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"m": (tiny("bloom"), 2048)}
    with pytest.raises(InputError, match="did you mean 'cmmlu'"):
        run_harness(models, ["cmlu"], data, 0)
    with pytest.raises(InputError, match="so there is nothing to ask"):
        run_harness(models, ["ceval"], tmp_path, 0)
    write(tmp_path / "test/law.csv", ["Question"], [])
    with pytest.raises(InputError, match="few-shot examples is missing"):
        run_harness(models, ["cmmlu"], tmp_path, 0)
    for split in ("dev", "test"):
        write(tmp_path / split / "law.csv", ["Question"], [])
        write(tmp_path / split / "lw.csv", ["Question"], [])
    with pytest.raises(InputError, match="knows no subject"):
        run_harness(models, ["cmmlu"], tmp_path, 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'firefly-zh\[eval\]'"):
        run_harness(models, ["ceval"], data, 0)
    assert harness.BENCHMARKS.keys() == {"ceval", "cmmlu"}


def test_the_command_prints_scores_and_keeps_them(
    data: Path, tiny: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--harness", "cmmlu", "--shots", "0", "-o", str(tmp_path / "out"), "--quiet"]
    with pytest.raises(SystemExit) as done:
        main(["evaluate", f"tiny={tiny('bloom')}", *options, "--harness-data", str(data)])
    assert done.value.code == 0 and "4 questions, 1 subject" in capsys.readouterr().out
    stored = json.loads((tmp_path / "out" / "benchmarks.json").read_text("utf-8"))
    assert stored["models"]["tiny"]["cmmlu"]["num_questions"] == 4
    with pytest.raises(SystemExit):
        main(["evaluate", str(tiny("bloom")), *options])
    assert "--harness needs --harness-data" in capsys.readouterr().err
