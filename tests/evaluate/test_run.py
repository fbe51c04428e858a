"""Evaluation end to end on a tiny model: the numbers are right, the files are stable, the page is safe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.console import quiet
from firefly.data.chatformat import render
from firefly.data.dataset import build_dataset, read_dataset
from firefly.data.example import Example
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError, ModelError
from firefly.evaluate.measure import Measured, Settings
from firefly.evaluate.questions import Questions, read_questions
from firefly.evaluate.report import render as render_page
from firefly.evaluate.report import rows, text_table
from firefly.evaluate.result import EvaluateResult
from firefly.evaluate.run import evaluate
from firefly.model import generate
from firefly.model.generate import open_generator
from firefly.prune.prune import prune_model
from firefly.recipe import Recipe
from tiny import recipe_table, save_model_dir, write_pairs

pytestmark = pytest.mark.pictures  # fixtures of the module draw theirs, and all must be the same bytes


class Work:
    """A dataset for the tiny BLOOM, and its held-out questions."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.dataset = model, folder / "dataset"
        source = write_pairs(folder / "pairs.jsonl", 60)
        self.recipe = Recipe.from_table(recipe_table(folder / "out", model, source))
        build_dataset(self.recipe.data, self.dataset)
        self.questions = read_questions(self.dataset)

    def settings(self, generation: dict[str, Any] | None = None, **evaluate: Any) -> Settings:
        """Those of the recipe, with changes."""
        settings = Settings.of(self.recipe)
        return replace(
            settings,
            generation=settings.generation.model_copy(update=generation or {}),
            evaluate=settings.evaluate.model_copy(update=evaluate),
        )


@pytest.fixture(scope="module")
def work(tiny: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Work:
    return Work(tmp_path_factory.mktemp("work"), tiny("bloom"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second model with the same tokenizer."""
    return save_model_dir(tmp_path_factory.mktemp("other") / "model", "llama")


@pytest.fixture(scope="module")
def result(work: Work, other: Path, tmp_path_factory: pytest.TempPathFactory) -> EvaluateResult:
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate({"base": work.model, "tuned": other}, work.questions, work.settings(), out)


def test_bits_per_byte_equal_plain_transformers_on_the_texts(work: Work, result: EvaluateResult) -> None:
    model = AutoModelForCausalLM.from_pretrained(work.model).eval()
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    sums: dict[str, list[float]] = {}
    for example in read_dataset(work.dataset, "validation"):
        prompt = tokenizer(f"<s>{example.input}</s></s>", add_special_tokens=False).input_ids
        target = tokenizer(f"{example.target}</s>", add_special_tokens=False).input_ids
        ids = torch.tensor([(prompt + target)[: work.recipe.data.max_seq_length]])
        labels = ids.clone()
        labels[0, : len(prompt)] = -100
        count = int((labels != -100).sum())
        with torch.no_grad():
            nats = float(model(ids, labels=labels).loss) * count
        for kind in (example.kind, "all"):
            entry = sums.setdefault(kind, [0.0, 0.0, 0.0])
            for column, amount in enumerate((nats, count, len(example.target.encode()))):
                entry[column] += amount
    scores = result.models["base"].held_out
    assert set(scores) == set(sums) == {"Couplet", "Dictionary", "all"}
    for kind, (nats, count, num_bytes) in sums.items():
        assert scores[kind]["loss"] == pytest.approx(nats / count, rel=1e-4)
        assert scores[kind]["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def greedy_answers(work: Work, questions: Questions, place: Path, **settings: Any) -> dict[str, list[str]]:
    generation = {"do_sample": False, "max_new_tokens": 14}
    chosen = {"generations_per_kind": 3, **settings}
    return Measured("m", work.model, work.settings(generation, **chosen), place).answers(questions)


def test_answers_are_those_of_the_chat_prompt_bounded_by_the_references(work: Work, tmp_path: Path) -> None:
    found = greedy_answers(work, work.questions, tmp_path / "all")
    short = {
        kind: [Example.of(kind, item.input, "春眠不觉晓") for item in group]
        for kind, group in work.questions.items()
    }
    tokenizer = ModelTokenizer.load(work.model)
    limit = 2 * len(tokenizer.encode("春眠不觉晓"))
    assert 0 < limit < 14
    generator = open_generator(work.model)
    greedy = work.settings({"do_sample": False}).generation
    for questions, most in ((work.questions, 14), (short, limit)):
        prompts = [render(item.messages[:-1], tokenizer).ids for item in questions["Couplet"][:3]]
        expected = [tokenizer.decode(ids) for ids in generator.answer(prompts, greedy, most)]
        found = greedy_answers(work, questions, tmp_path / str(most))
        assert found["Couplet"] == expected and len(found["Dictionary"]) == 3


def test_numbers_do_not_depend_on_batch_size_or_on_which_tasks_are_asked(work: Work, tmp_path: Path) -> None:
    """Losses and sampled answers, bit for bit."""
    alone = {"Dictionary": work.questions["Dictionary"]}
    made = [
        evaluate(
            {"m": work.model},
            questions,
            work.settings(batch_size=size, generations_per_kind=8),
            tmp_path / str(size),
        )
        for questions, size in ((work.questions, 1), (work.questions, 32), (alone, 5))
    ]
    assert made[0].models == made[1].models and made[0].samples == made[1].samples
    for table in ("held_out", "answers", "intervals"):
        assert (
            getattr(made[2].models["m"], table)["Dictionary"]
            == getattr(made[0].models["m"], table)["Dictionary"]
        )


def test_plain_texts_ask_nothing_but_are_scored(work: Work, tmp_path: Path) -> None:
    questions = {
        "Text": [Example.plain("Text", "流萤")],
        "Dictionary": [Example.of("Dictionary", "问", "答")],
    }
    made = evaluate({"m": work.model}, questions, work.settings(), tmp_path)
    assert set(made.models["m"].held_out) == {"Text", "Dictionary", "all"} and made.questions == {
        "Dictionary": 1
    }


def test_overlong_examples_are_cut_for_the_prompt_as_for_training(work: Work, tmp_path: Path) -> None:
    long = {"Couplet": [Example.of("Couplet", "月落乌啼霜满天" * 60, "处处闻啼鸟")]}
    model = Measured("m", work.model, work.settings(), tmp_path)
    prompt = model._prompt(long["Couplet"][0])
    assert len(prompt) < work.recipe.data.max_seq_length < len(model.tokenizer.encode("月落乌啼霜满天" * 60))
    assert "…" in model.tokenizer.decode(prompt)
    assert model.losses(long)["Couplet"].shape == (1, 3) and len(model.answers(long)["Couplet"]) == 1


def test_result_has_every_model_kind_and_sample(result: EvaluateResult) -> None:
    assert list(result.models) == ["base", "tuned"]
    for model in result.models.values():
        assert set(model.held_out) == set(model.intervals) == {"Couplet", "Dictionary", "all"}
        assert {"chrf", "bleu"} <= set(model.answers["Dictionary"])
        for kind, bounds in model.intervals.items():
            for name, (low, high) in bounds.items():
                value = (model.held_out[kind] | model.answers.get(kind, {}))[name]
                assert low <= value <= high
    assert [sample.kind for sample in result.samples] == ["Couplet"] * 2 + ["Dictionary"] * 2
    assert all(set(sample.answers) == {"base", "tuned"} for sample in result.samples)
    assert any(sample.answers["base"] != sample.answers["tuned"] for sample in result.samples)
    assert EvaluateResult.from_json(json.loads(json.dumps(asdict(result)))).samples == result.samples


FILES = ("results.json", "report.html", "bits_per_byte.png", "scores.png", "answers.jsonl")


def test_results_are_the_same_bytes_again(
    work: Work, other: Path, result: EvaluateResult, tmp_path: Path
) -> None:
    evaluate({"base": work.model, "tuned": other}, work.questions, work.settings(), tmp_path)
    before = Path(result.report).parent
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "journal"}
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (before / name).read_bytes(), name
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert stored["models"]["tuned"]["held_out"] == result.models["tuned"].held_out
    assert len((tmp_path / "answers.jsonl").read_text("utf-8").splitlines()) == sum(result.questions.values())


class _Counted(generate.Generator):
    """Counts answers, and is killed when there are too many."""

    done, most = 0, 10**9

    def answers(self, *arguments: Any) -> Any:
        for found in super().answers(*arguments):
            if _Counted.done == _Counted.most:
                raise KeyboardInterrupt
            _Counted.done += 1
            yield found


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(
    work: Work, other: Path, result: EvaluateResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "Generator", _Counted)
    models = {"base": work.model, "tuned": other}
    _Counted.done, _Counted.most = 0, 6  # of 8: in the middle of the second model
    with pytest.raises(KeyboardInterrupt):
        evaluate(models, work.questions, work.settings(), tmp_path)
    journal = tmp_path / "journal" / "tuned.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])  # killed while it wrote
    _Counted.most = 10**9
    evaluate(models, work.questions, work.settings(), tmp_path)
    assert _Counted.done == 9
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (Path(result.report).parent / name).read_bytes(), name
    monkeypatch.setattr(generate, "load_model", None)  # nothing is left to ask, so no weights are read
    assert evaluate(models, work.questions, work.settings(), tmp_path).models == result.models


def test_what_changed_is_asked_again_and_nothing_else(
    work: Work, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "Generator", _Counted)

    def num_asked(model: Path, questions: Questions, generation: dict[str, Any]) -> int:
        _Counted.done = 0
        evaluate({"m": model}, questions, work.settings(generation), tmp_path)
        return _Counted.done

    assert num_asked(work.model, work.questions, {}) == 4
    assert num_asked(work.model, work.questions, {}) == 0
    first = work.questions["Couplet"][0]
    new = Example.of("Couplet", "新的问题", first.target)
    changed = work.questions | {"Couplet": [new, *work.questions["Couplet"][1:]]}
    assert num_asked(work.model, changed, {}) == 1
    assert num_asked(work.model, work.questions, {"temperature": 0.5}) == 4
    assert num_asked(other, work.questions, {"temperature": 0.5}) == 4


class _Page(HTMLParser):
    """Collects tags, image sources and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }}</td><img src=x onerror=alert(1)>"


def test_the_page_escapes_samples_and_needs_nothing_else(result: EvaluateResult) -> None:
    sample = replace(
        result.samples[0],
        kind=HOSTILE, question=HOSTILE, reference=HOSTILE, answers=dict.fromkeys(result.models, HOSTILE),
    )  # fmt: skip
    first = _Page(Path(result.report).read_text("utf-8"))
    assert first.links and all(link.startswith("data:image/png;base64,iVBOR") for link in first.links)
    page = _Page(render_page(replace(result, samples=[sample]), rows(result), {}))
    assert "script" not in page.tags and not page.links
    assert sum(HOSTILE in text for text in page.texts) == 5
    hostile_model = {HOSTILE: result.models["base"]}
    named = replace(result, models=hostile_model, samples=[])
    assert "script" not in _Page(render_page(named, rows(named), {})).tags


def test_the_table_shows_each_model_with_its_interval(result: EvaluateResult) -> None:
    row = next(row for row in rows(result) if row.kind == "all")
    values = [model.held_out["all"]["bits_per_byte"] for model in result.models.values()]
    assert [cell.value for cell in row.cells] == values
    assert row.change == pytest.approx(values[1] / values[0] - 1)
    line = next(line for line in text_table(result).split("\n") if line.startswith("all"))
    for value, model in zip(values, result.models.values(), strict=True):
        low, high = model.intervals["all"]["bits_per_byte"]
        assert f"{value:.3g} [{low:.3g}, {high:.3g}]" in line
    metrics = {row.name for row in rows(result) if row.kind == "Dictionary"}
    assert {"bits_per_byte", "chrf", "bleu"} <= metrics


def test_without_generated_answers_there_are_still_losses(work: Work, tmp_path: Path) -> None:
    made = evaluate({"base": work.model}, work.questions, work.settings(generations_per_kind=0), tmp_path)
    assert made.samples == [] and made.models["base"].answers == {}
    assert made.models["base"].held_out["all"]["loss"] > 0
    assert (tmp_path / "report.html").is_file()


def write(path: Path, *records: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def test_questions_come_from_a_dataset_or_from_files(work: Work, tmp_path: Path) -> None:
    pair = {"input": "对下联：白日依山尽", "target": "黄河入海流"}
    path = write(tmp_path / "q.jsonl", {"kind": "Couplet", **pair}, {"kind": "Mine", **pair})
    found = read_questions(path)
    assert {kind: len(group) for kind, group in found.items()} == {"Couplet": 1, "Mine": 1}
    assert list(read_questions(path, ["Mine"])) == ["Mine"]
    assert work.questions["Couplet"] == [
        example for example in read_dataset(work.dataset, "validation") if example.kind == "Couplet"
    ]


def test_what_is_wrong_with_questions_is_one_sentence(work: Work, tmp_path: Path) -> None:
    pair = {"kind": "Couplet", "input": "对下联：白日依山尽", "target": "黄河入海流"}
    path = write(tmp_path / "q.jsonl", pair)
    with pytest.raises(InputError, match="Unknown task 'Coupelt': did you mean 'Couplet'"):
        read_questions(path, ["Coupelt"])
    with pytest.raises(InputError, match="no example of the task 'NER'; it has Couplet"):
        read_questions(path, ["NER"])
    with pytest.raises(InputError, match=r"q\.jsonl:2 \(Couplet\) has no reference answer"):
        read_questions(write(tmp_path / "q.jsonl", pair, pair | {"target": " "}))
    with pytest.raises(InputError, match="line 1: field 'target' is missing"):
        read_questions(write(tmp_path / "q.jsonl", {"kind": "Couplet", "input": "问"}))
    data = work.recipe.data.model_copy(update={"validation_fraction": 0.0})
    build_dataset(data, tmp_path / "dataset")
    with pytest.raises(InputError, match="validation_fraction"):
        read_questions(tmp_path / "dataset")


def test_a_model_without_a_chat_template_needs_a_format(work: Work, tmp_path: Path) -> None:
    own = replace(work.settings(), chat_format=None)
    with pytest.raises(ModelError, match="no chat template, so how to ask it is unknown"):
        evaluate({"m": work.model}, work.questions, own, tmp_path)
    spare = replace(own, spare_format="firefly")
    assert Measured("m", work.model, spare, tmp_path).answers(work.questions)


def test_empty_answers_are_told_in_one_sentence(
    work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate.Generator, "answers", lambda _, prompts, *__: enumerate([[]] * len(prompts)))
    quiet(False)
    try:
        made = evaluate({"m": work.model}, work.questions, work.settings(), tmp_path)
    finally:
        quiet()
    told = capsys.readouterr().err
    assert "m gave no answer to 4 of 4 questions (Couplet 2, Dictionary 2); they count as wrong" in told
    assert made.models["m"].answers["Dictionary"]["chrf"] == 0


def test_a_pruned_model_gives_the_answers_of_the_original(tmp_path: Path, work: Work) -> None:
    """Greedy answers whose tokens are all kept, though the vocabulary differs."""
    pruned = tmp_path / "pruned"
    corpus = tmp_path / "corpus.txt"
    tokenizer = ModelTokenizer.load(work.model)
    settings = work.settings({"do_sample": False}, generations_per_kind=20)
    expected = Measured("whole", work.model, settings, tmp_path).answers(work.questions)
    texts = [example.input + example.target for group in work.questions.values() for example in group]
    corpus.write_text("\n".join([*texts, *(text for group in expected.values() for text in group)]), "utf-8")
    kept = {token for text in corpus.read_text("utf-8").splitlines() for token in tokenizer.encode(text)}
    prune_model(work.model, pruned, corpus=[corpus], coverage=1.0)
    assert len(ModelTokenizer.load(pruned).rust.get_vocab()) < len(tokenizer.rust.get_vocab())
    found = Measured("pruned", pruned, settings, tmp_path).answers(work.questions)
    whole = {
        text: answer for kind in expected for text, answer in zip(found[kind], expected[kind], strict=True)
    }
    assert kept and all(found == answer for found, answer in whole.items())


def test_an_interrupted_write_leaves_the_previous_report(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate({"base": work.model}, work.questions, work.settings(), tmp_path)
    (tmp_path / "results.json").write_text("old")
    import firefly.evaluate.run as run

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "write_report", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate({"base": work.model}, work.questions, work.settings(), tmp_path)
    assert (tmp_path / "results.json").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "journal"}
