"""Evaluation end to end on a tiny model: the numbers are right, the files are stable, the page is safe."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from firefly.data.chatformat import render
from firefly.data.dataset import build_dataset, read_dataset
from firefly.data.example import Example
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import encode_dataset
from firefly.errors import InputError, ModelError
from firefly.evaluate.report import render as render_page
from firefly.evaluate.report import rows, text_table
from firefly.evaluate.result import EvaluateResult
from firefly.evaluate.run import answer_held_out, evaluate, held_out_examples, held_out_scores
from firefly.model.generate import open_generator
from firefly.recipe import Recipe
from tiny import recipe_table, save_model_dir, write_pairs


class Work:
    """A dataset and a tokens directory for the tiny BLOOM."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.model, self.dataset, self.tokens = model, folder / "dataset", folder / "tokens"
        source = write_pairs(folder / "pairs.jsonl", 60)
        self.recipe = Recipe.from_table(recipe_table(folder / "out", model, source))
        build_dataset(self.recipe.data, self.dataset)
        encode_dataset(self.dataset, model, self.recipe.data, self.tokens)


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
    return evaluate(work.recipe, {"base": work.model, "tuned": other}, work.dataset, work.tokens, out)


def test_bits_per_byte_equal_plain_transformers_on_the_texts(work: Work) -> None:
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
    scores = held_out_scores(work.model, work.tokens)
    assert set(scores) == set(sums) == {"Couplet", "Dictionary", "all"}
    for kind, (nats, count, num_bytes) in sums.items():
        assert scores[kind]["loss"] == pytest.approx(nats / count, rel=1e-4)
        assert scores[kind]["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_held_out_examples_are_the_first_of_each_kind_in_order(work: Work) -> None:
    everything = list(read_dataset(work.dataset, "validation"))
    chosen = held_out_examples(work.dataset, 3)
    for kind in ("Couplet", "Dictionary"):
        assert chosen[kind] == [example for example in everything if example.kind == kind][:3]
    assert held_out_examples(work.dataset, 0) == {}


def test_plain_texts_ask_nothing(tmp_path: Path) -> None:
    examples = [
        Example.plain("Text", "流萤"),
        Example.of("Dictionary", "问", "答"),
        Example.plain("Dictionary", "文"),
    ]
    lines = "".join(example.to_json() + "\n" for example in examples)
    (tmp_path / "validation.jsonl").write_text(lines, encoding="utf-8")
    assert {kind: len(group) for kind, group in held_out_examples(tmp_path, 3).items()} == {"Dictionary": 1}


def test_answers_do_not_depend_on_the_batch_and_are_bounded_by_the_references(work: Work) -> None:
    examples = held_out_examples(work.dataset, 3)
    greedy = work.recipe.generation.model_copy(update={"do_sample": False, "max_new_tokens": 14})

    def answers(examples: dict[str, list[Example]], batch_size: int) -> dict[str, list[str]]:
        section = work.recipe.evaluate.model_copy(update={"batch_size": batch_size})
        return answer_held_out(work.model, examples, greedy, section)

    long = answers(examples, 2)
    assert long == answers(examples, 3)
    short = {
        kind: [Example.of(kind, item.input, "春眠不觉晓") for item in group]
        for kind, group in examples.items()
    }
    tokenizer = ModelTokenizer.load(work.model)
    limit = 2 * len(tokenizer.encode("春眠不觉晓"))
    assert 0 < limit < 14
    prompts = [render(item.messages[:-1], tokenizer).ids for item in short["Couplet"]]
    bounded = open_generator(work.model).answer(prompts, greedy, limit)
    assert answers(short, 3)["Couplet"] == [tokenizer.decode(ids) for ids in bounded] != long["Couplet"]


def test_result_has_every_model_kind_and_sample(result: EvaluateResult) -> None:
    assert list(result.models) == ["base", "tuned"]
    for model in result.models.values():
        assert set(model.held_out) == {"Couplet", "Dictionary", "all"}
        assert {"chrf", "bleu"} <= set(model.answers["Dictionary"])
    assert [sample.kind for sample in result.samples] == ["Couplet"] * 2 + ["Dictionary"] * 2
    assert all(set(sample.answers) == {"base", "tuned"} for sample in result.samples)
    assert any(sample.answers["base"] != sample.answers["tuned"] for sample in result.samples)


def test_results_are_the_same_bytes_again(
    work: Work, other: Path, result: EvaluateResult, tmp_path: Path
) -> None:
    models = {"base": work.model, "tuned": other}
    evaluate(work.recipe, models, work.dataset, work.tokens, tmp_path)
    before = Path(result.report).parent
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "report.html", "bits_per_byte.png", "scores.png",
    }  # fmt: skip
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (before / path.name).read_bytes(), path.name
    stored = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert stored["models"]["tuned"]["held_out"] == result.models["tuned"].held_out


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
    assert page.texts.count(HOSTILE) == 5
    hostile_model = {HOSTILE: result.models["base"]}
    named = replace(result, models=hostile_model, samples=[])
    assert "script" not in _Page(render_page(named, rows(named), {})).tags


def test_the_table_shows_before_and_after(result: EvaluateResult) -> None:
    row = next(row for row in rows(result) if row.kind == "all")
    before, after = (model.held_out["all"]["bits_per_byte"] for model in result.models.values())
    assert row.bits_per_byte == [before, after]
    assert row.change == pytest.approx(after / before - 1)
    line = next(line for line in text_table(result).split("\n") if line.startswith("all"))
    assert f"{before:.3f} → {after:.3f}" in line


def test_a_kind_without_generated_answers_still_has_its_loss(work: Work, tmp_path: Path) -> None:
    section = work.recipe.evaluate.model_copy(update={"generations_per_kind": 0})
    recipe = work.recipe.model_copy(update={"evaluate": section})
    made = evaluate(recipe, {"base": work.model}, work.dataset, work.tokens, tmp_path)
    assert made.samples == [] and made.models["base"].answers == {}
    assert made.models["base"].held_out["all"]["loss"] > 0
    assert (tmp_path / "report.html").is_file()


def test_nothing_held_out_and_a_wrong_tokenizer_are_errors(work: Work, tmp_path: Path) -> None:
    data = work.recipe.data.model_copy(update={"validation_fraction": 0.0})
    build_dataset(data, tmp_path / "dataset")
    encode_dataset(tmp_path / "dataset", work.model, data, tmp_path / "tokens")
    with pytest.raises(InputError, match="validation_fraction"):
        held_out_scores(work.model, tmp_path / "tokens")
    foreign = save_model_dir(tmp_path / "foreign", "llama")
    text = (foreign / "tokenizer.json").read_text("utf-8")
    (foreign / "tokenizer.json").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(ModelError, match="another tokenizer"):
        held_out_scores(foreign, work.tokens)


def test_an_interrupted_write_leaves_the_previous_report(
    work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text("old")
    (tmp_path / "report.html").write_text("old")
    import firefly.files as files

    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        evaluate(work.recipe, {"base": work.model}, work.dataset, work.tokens, tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "results.json": "old", "report.html": "old",
    }  # fmt: skip
