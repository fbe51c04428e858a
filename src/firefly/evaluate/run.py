"""`firefly evaluate`: several models answer the same held-out examples, and one report sets them side by side.

    for each model:  held-out tokens   → loss, bits per byte of every task   (held_out_scores)
                     held-out prompts  → answers → every task's metric       (answer_held_out, metrics.score)
    all together     → results.json, report.html, PNG plots

results.json holds no times or dates: the same models and data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from firefly.console import progress, say
from firefly.data.chatformat import open_format
from firefly.data.dataset import read_dataset
from firefly.data.example import Example
from firefly.data.loader import Batch, in_order
from firefly.data.tasks import load_tasks
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.errors import InputError
from firefly.evaluate.metrics import Answered, Scores, score
from firefly.evaluate.report import text_table, write_report
from firefly.evaluate.result import EvaluateResult, ModelScores, Sample
from firefly.files import directory_atomic, write_json
from firefly.model.generate import open_generator
from firefly.model.load import load_model
from firefly.model.score import loss_by_kind
from firefly.recipe import EvaluateSection, GenerationSection, Recipe


def evaluate(
    recipe: Recipe, models: Mapping[str, Path], dataset: Path, tokens: Path, out: Path
) -> EvaluateResult:
    """Measure `models`, in order ("base" before "tuned"), on the held-out side of the data; write the report.

    Raises `InputError` when nothing was held out, `ModelError` when `tokens` belongs to another tokenizer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = recipe.train.precision
    bf16 = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    examples = held_out_examples(dataset, recipe.evaluate.generations_per_kind)
    held_out: dict[str, dict[str, dict[str, float]]] = {}
    answers: dict[str, dict[str, list[str]]] = {}
    for name, path in models.items():
        held_out[name] = held_out_scores(path, tokens, device, bf16, f"score {name}")
        answers[name] = answer_held_out(
            path,
            examples,
            recipe.generation,
            recipe.evaluate,
            device,
            f"answer {name}",
            recipe.data.chat_format,
        )
    samples = []
    for kind, group in examples.items():
        for number, example in enumerate(group):
            given = {name: answers[name][kind][number] for name in models}
            samples.append(Sample(kind, example.input, example.target, given))
    scored = {name: ModelScores(held_out[name], judge(examples, answers[name])) for name in models}
    result = EvaluateResult(scored, samples, str(out / "report.html"))
    with directory_atomic(out) as place:
        write_report(result, place)
        write_json(place / "results.json", asdict(result) | {"report": "report.html"})
    say(text_table(result))
    return result


def held_out_scores(
    model_dir: Path,
    tokens_dir: Path,
    device: torch.device | str = "cpu",
    bf16: bool = False,
    label: str = "score",
) -> dict[str, dict[str, float]]:
    """Held-out loss by kind and in `all`: `loss` in nats a token, `bits_per_byte` of the learned text.

    Raises `InputError` when nothing was held out, `ModelError` when `tokens_dir` belongs to another tokenizer.
    """
    tokens = Tokens.open(tokens_dir, "validation", ModelTokenizer.load(model_dir).sha256)
    if len(tokens) == 0:
        raise InputError(
            f"{tokens_dir} has no held-out sample; raise data.validation_fraction and run `firefly data` again."
        )
    place = torch.device(device)
    kinds = [tokens.kind_names[kind] for kind in tokens.kinds]
    with progress(label, len(tokens.ids), "tokens") as bar:

        def batches() -> Iterator[Batch]:
            for batch in in_order(tokens):
                yield batch
                bar.advance(len(batch.input_ids))

        model = load_model(model_dir, place)
        return loss_by_kind(model, batches(), kinds, tokens.target_bytes.tolist(), place, bf16)


def held_out_examples(dataset: Path, per_kind: int) -> dict[str, list[Example]]:
    """The first `per_kind` validation examples of every kind, in order; plain texts ask nothing and are left out."""
    chosen: dict[str, list[Example]] = {}
    for example in read_dataset(dataset, "validation"):
        group = chosen.setdefault(example.kind, [])
        if len(group) < per_kind and not example.is_plain:
            group.append(example)
    return {kind: group for kind, group in sorted(chosen.items()) if group}


def answer_held_out(
    model_dir: Path,
    examples: Mapping[str, Sequence[Example]],
    generation: GenerationSection,
    section: EvaluateSection,
    device: torch.device | str = "cpu",
    label: str = "answer",
    chat_format: str = "firefly",
) -> dict[str, list[str]]:
    """A model's answers to examples, asked in `chat_format`, by kind and in their order.

    An answer has at most twice the tokens of the kind's longest reference, and never more than
    `generation.max_new_tokens`.
    """
    if not examples:
        return {}
    tokenizer = ModelTokenizer.load(model_dir)
    asked = open_format(chat_format, tokenizer)
    generator = open_generator(model_dir, device, asked.stop_ids)
    answers: dict[str, list[str]] = {}
    with progress(label, sum(map(len, examples.values())), "prompts") as bar:
        for kind, group in examples.items():
            longest = max(map(len, tokenizer.encode_many([example.target for example in group])))
            limit = min(generation.max_new_tokens, max(2 * longest, 1))
            texts = answers.setdefault(kind, [])
            for start in range(0, len(group), section.batch_size):
                batch = group[start : start + section.batch_size]
                prompts = [asked.render(example.messages[:-1]).ids for example in batch]
                texts += map(tokenizer.decode, generator.answer(prompts, generation, limit))
                bar.advance(len(batch), kind)
    return answers


def judge(
    examples: Mapping[str, Sequence[Example]], answers: Mapping[str, Sequence[str]]
) -> dict[str, Scores]:
    """Score answers by kind with each task's metric; a kind without a task file is judged by chrF."""
    scores = {}
    for kind, group in examples.items():
        task = load_tasks().get(kind)
        pairs = zip(group, answers[kind], strict=True)
        answered = [Answered(example.input, example.target, answer) for example, answer in pairs]
        scores[kind] = score(task.metric if task else "chrf", answered)
    return scores
