"""Tasks: the shipped files are sound, rendering is stable, and a wrong file says what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from firefly.data.tasks import TASKS_DIR, load_tasks, task, task_files_mark
from firefly.errors import InputError

GOOD = """
kind = "Dictionary"
title_zh = "成语"
title_en = "idioms"
metric = "chrf"
fields = ["word", "explanation", "label"]
cap = 5
[[directions]]
name = "explain"
target = "{explanation}"
templates = ["{word}是什么意思？", "解释{word}", "请说说{word}的意思。"]
[[directions]]
name = "judge"
weight = 0.5
target = "{label}"
templates = [
    "{word}：褒义还是贬义？", "{word}是褒是贬？", "判断褒贬：{word}", "褒贬（{word}）", "{word}的感情色彩：",
    "“{word}”含褒义吗？", "“{word}”是夸人还是骂人？", "{word}，褒义词或贬义词？", "给{word}标上褒贬。",
]
[directions.values.label]
"1" = "褒义"
"0" = "贬义"
[[sources]]
name = "自己写的"
licence = "Apache-2.0"
"""


def folder_with(tmp_path: Path, text: str, name: str = "dictionary.toml") -> Path:
    (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


@pytest.mark.parametrize("path", sorted(TASKS_DIR.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_task_has_twelve_distinct_templates_that_do_not_leak(path: Path) -> None:
    known = {found.kind.lower(): found for found in load_tasks().values()}[path.stem]
    templates = [template for direction in known.directions for template in direction.templates]
    assert len(templates) >= 12
    assert len(set(templates)) == len(templates)
    assert known.sources, "a task names where its data comes from"
    for direction in known.directions:
        # Rendered with marked values, no question contains its own answer's text.
        marked = {name: f"〈{name}〉" for name in known.fields}
        answer = direction.target.format_map(marked)
        for template in direction.templates:
            question = template.format_map(marked)
            assert answer not in question
            assert any(mark in question for mark in marked.values()), (
                "a template must show something to go by"
            )


def test_tasks_ship_under_their_firefly_names() -> None:
    assert set(load_tasks()) >= {
        "NER", "SentimentAnalyze", "TextCorrection", "NLI", "MRC", "KeywordRecognition", "TextMatching", "Summary",
        "OpenQA", "Cot", "Program", "Translation", "Couplet", "AncientPoem", "ClassicalChinese", "Dictionary",
        "StoryGeneration",
    }  # fmt: skip


@pytest.mark.parametrize("kind", load_tasks())
def test_the_templates_of_a_direction_need_the_same_fields(kind: str) -> None:
    """Otherwise a record that lacks a field of one template is never asked by the others."""
    for direction in task(kind).directions:
        needed = {frozenset(re.findall(r"{(\w+)}", template)) for template in direction.templates}
        assert len(needed) == 1, f"{kind}, direction {direction.name}: {needed}"


def test_two_tasks_may_not_share_a_template(tmp_path: Path) -> None:
    folder_with(tmp_path, GOOD)
    folder_with(tmp_path, GOOD.replace('kind = "Dictionary"', 'kind = "Words"'), "words.toml")
    with pytest.raises(InputError, match=r"words\.toml: the template '.*' is also in .*dictionary\.toml"):
        load_tasks(tmp_path)


def test_the_same_record_is_always_asked_the_same_way(tmp_path: Path) -> None:
    known = load_tasks(folder_with(tmp_path, GOOD))["Dictionary"]
    records = [{"word": f"词{index}", "explanation": "释义", "label": "1"} for index in range(6)]
    asked = [known.render(record, source="a:1") for record in records]
    assert asked == [known.render(dict(reversed(record.items())), source="a:1") for record in records]
    # Golden: every machine and version must ask the same, or every dataset changes under its users.
    assert [example.input for example in asked] == [
        "解释词0",
        "词1是什么意思？",
        "解释词2",
        "解释词3",
        "词4是什么意思？",
        "词5是什么意思？",
    ]
    assert [known.render(record, source="a:1", seed=1) for record in records] != asked


@pytest.mark.parametrize("kind", sorted(load_tasks()))
def test_every_template_is_reached_and_variants_differ(kind: str) -> None:
    known = task(kind)
    values = {name: choice for direction in known.directions for name, choice in direction.values.items()}
    seen: set[str] = set()
    for index in range(2000):
        fields = {name: f"[{name}{index}]" for name in known.fields}
        fields |= {name: sorted(choice)[index % len(choice)] for name, choice in values.items()}
        seen.add(re.sub(r"\[(\w+?)\d+\]", r"{\1}", known.render(fields, source="s").input))
    count = sum(len(direction.templates) for direction in known.directions)
    assert len(seen) == count
    variants = {known.render(fields, source="s", variant=index).input for index in range(count)}
    assert len(variants) == count
    assert known.render(fields, source="s", variant=count) == known.render(fields, source="s")


def test_weights_decide_how_often_a_direction_is_chosen(tmp_path: Path) -> None:
    known = load_tasks(folder_with(tmp_path, GOOD))["Dictionary"]
    answers = Counter(
        known.render({"word": f"词{index}", "explanation": "释义", "label": "1"}, source="s").target
        for index in range(3000)
    )
    assert answers["褒义"] / 3000 == pytest.approx(0.5 / 1.5, abs=0.03)


def test_values_replace_raw_labels_and_unknown_ones_are_named(tmp_path: Path) -> None:
    known = load_tasks(folder_with(tmp_path, GOOD))["Dictionary"]
    assert known.render({"word": "好", "label": "0"}, source="s").target == "贬义"
    with pytest.raises(InputError, match=r"x\.jsonl:7.*'label' is '2'; allowed: 1, 0"):
        known.render({"word": "好", "label": "2"}, source="x.jsonl:7")


def test_braces_in_a_record_are_just_text() -> None:
    fields = {"word": "{explanation}", "explanation": "{word} {0}"}
    rendered = {task("Dictionary").render(fields, source="s", variant=index).target for index in range(30)}
    assert rendered == {"{explanation}", "{word} {0}"}


def test_a_record_is_asked_only_in_directions_that_it_has_the_fields_for() -> None:
    fields = {"riddle": "外甥打灯笼", "answer": "照旧"}
    targets = {task("Dictionary").render(fields, source="s", variant=index).target for index in range(40)}
    assert targets == {"照旧", "外甥打灯笼"}
    with pytest.raises(InputError, match=r"f\.jsonl:3.*explanation \+ word.*the fields there are: riddle"):
        task("Dictionary").render({"riddle": "外甥打灯笼", "answer": " "}, source="f.jsonl:3")


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(InputError, match="Unknown task 'Cuplet': did you mean 'Couplet'"):
        task("Cuplet")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("cap = 5", "cap = 5\ncaps = 6", r"caps: unknown key; did you mean 'cap'"),
        ("weight = 0.5", "wieght = 0.5", r"directions\.1\.wieght: unknown key; did you mean 'weight'"),
        ("解释{word}", "解释{wrod}", r"\{wrod\} is no field: did you mean 'word'"),
        ("解释{word}", "解释{explanation}", r"gives away its target \{explanation\}"),
        ("解释{word}", "{word}是什么意思？", "is there twice"),
        ("{word}：褒义还是贬义？", "解释{word}", "is there twice"),
        ("解释{word}", "解释{word", "brace"),
        ('target = "{label}"', 'target = "好"', "names no field"),
        ("values.label", "values.explanation", "values of 'explanation'"),
        ('metric = "chrf"', 'metric = "blue"', "metric: "),
        ('"给{word}标上褒贬。",', "", "11 templates over all directions; write at least 12"),
        ("cap = 5", "cap = 5\nweight = 0", "weight: "),
        ('licence = "Apache-2.0"', 'licence = "Apache-2.0"\nfiles = "a"', "unknown key; did you mean 'file'"),
        ('kind = "Dictionary"', 'kind = "Lexicon"', r"must be named lexicon\.toml"),
        ("cap = 5", "cap = ", "not valid TOML"),
        ('title_en = "idioms"', "", "title_en"),
    ],
)
def test_a_wrong_task_file_says_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in GOOD
    folder = folder_with(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(InputError, match=message) as caught:
        load_tasks(folder)
    assert "dictionary.toml" in str(caught.value)


ROOT = Path(__file__).parents[2]


def test_the_documented_way_to_add_a_task_works(tmp_path: Path) -> None:
    """In a copy of the package, the page's one file is put in its place and a dataset is made with it."""
    task_file, source = re.findall(
        r"```toml\n(.*?)```", (ROOT / "docs" / "new-task.md").read_text("utf-8"), re.S
    )
    assert task_file[: task_file.index("templates = [")].count("\n") == 10, "the page promises ten lines"
    package = tmp_path / "firefly"
    shutil.copytree(ROOT / "src" / "firefly", package, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    (package / "data" / "tasks" / "riddle.toml").write_text(task_file, "utf-8")
    record = re.search(r"# ({.*})", source)
    assert record
    (tmp_path / "riddles.jsonl").write_text(record[1] + "\n", "utf-8")
    (tmp_path / "source.toml").write_text(source, "utf-8")
    program = """
import tomllib
from pathlib import Path
from firefly.data.dataset import build_dataset
from firefly.recipe import DataSection
table = tomllib.loads(Path("source.toml").read_text("utf-8"))["data"] | {"validation_fraction": 0}
build_dataset(DataSection.model_validate(table), Path("made"))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    example = json.loads((tmp_path / "made" / "train.jsonl").read_text("utf-8"))
    assert (example["kind"], example["target"]) == ("Riddle", "雨")
    assert "千条线，万条线，落到水里都不见" in example["input"]
    card = json.loads((tmp_path / "made" / "card.json").read_text("utf-8"))
    assert card["sources"][0]["licence"] == "our own riddles: Apache-2.0"


def test_another_template_makes_another_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mark by which a dataset is redone: what its own tasks say, and no file that it does not use."""
    folder = tmp_path / "tasks"
    shutil.copytree(TASKS_DIR, folder)
    monkeypatch.setattr("firefly.data.tasks.TASKS_DIR", folder)
    first = task_files_mark(["Dictionary", "Couplet"])
    assert task_files_mark(["Couplet", "Dictionary", "Couplet"]) == first
    other = folder / "nli.toml"
    other.write_text(other.read_text("utf-8") + "\n# a note\n", "utf-8")
    assert task_files_mark(["Dictionary", "Couplet"]) == first
    mine = folder / "dictionary.toml"
    mine.write_text(mine.read_text("utf-8").replace("什么", "啥", 1), "utf-8")
    assert task_files_mark(["Dictionary", "Couplet"]) != first


def test_a_kind_without_a_task_takes_nothing_from_the_task_files() -> None:
    assert task_files_mark(["Verse", "Couplet"]) == task_files_mark(["Couplet"])
