"""What one model makes of held-out examples: the loss of every reference answer, and an answer of its own.

    model = Measured("tuned", directory, settings, journal=out / "journal")
    model.losses(questions)      kind → a row an example: nats, tokens and UTF-8 bytes of its answer
    model.answers(questions)     kind → answers, of the first `evaluate.generations_per_kind` examples

Both come from one rendering of the whole example: its prompt is what stands before the answer. Neither depends on
`evaluate.batch_size`, on the other tasks asked, or on whether it was interrupted. Weights are loaded when something is
not in the journal yet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import firefly
from firefly.console import progress, warn
from firefly.data.chatformat import ChatFormat, Rendered, model_format, open_format
from firefly.data.example import Example
from firefly.data.loader import pack
from firefly.data.overlong import fit
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import ModelError
from firefly.evaluate.journal import Journal
from firefly.evaluate.questions import Questions
from firefly.files import sha256_file, sha256_json
from firefly.model.generate import Generator, Prompt, open_generator
from firefly.model.load import check_model
from firefly.model.score import sample_losses
from firefly.model.shards import weight_files
from firefly.recipe import DataSection, EvaluateSection, GenerationSection, Recipe

_BATCH_TOKENS = 8192  # of samples whose losses are computed together


@dataclass(frozen=True)
class Settings:
    """How models are measured. `chat_format`: how they are asked; None: each as its own chat template says, or one
    without a template in the `spare_format`.

    Of `data` counts how a sample longer than `max_seq_length` is cut.
    """

    generation: GenerationSection
    evaluate: EvaluateSection
    data: DataSection
    chat_format: str | None = None
    spare_format: str | None = None

    @classmethod
    def of(cls, recipe: Recipe) -> Settings:
        """The settings of a recipe's run."""
        return cls(recipe.generation, recipe.evaluate, recipe.data, recipe.data.chat_format)


@dataclass(frozen=True)
class _Sample:
    """An example as the model reads it; `num_bytes` is the UTF-8 length of what is learned."""

    rendered: Rendered
    num_bytes: int


class Measured:
    """One model under its name in the report.

    Raises `ModelError` for a directory that cannot be used, or has no chat template where none is given.
    """

    def __init__(self, name: str, directory: Path, settings: Settings, journal: Path) -> None:
        check_model(directory)
        self.name, self.directory, self.settings = name, directory, settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = ModelTokenizer.load(directory)
        self.chat_format = self._open_format()
        files = [*weight_files(directory), directory / "config.json", directory / "tokenizer.json"]
        identity = [
            firefly.__version__,
            [sha256_file(path) for path in files],
            self.chat_format.template,
            settings.generation.model_dump(exclude={"max_new_tokens"}),
            [settings.evaluate.precision, self.device.type],
        ]
        self.journal = Journal(journal / f"{name}.jsonl", identity)

    def _open_format(self) -> ChatFormat:
        has_template = self.tokenizer.chat_template() is not None
        name = self.settings.chat_format or (None if has_template else self.settings.spare_format)
        if name is not None:
            return open_format(name, self.tokenizer)
        if not has_template:
            raise ModelError(
                f"{self.directory} has no chat template, so how to ask it is unknown; name a format, for example "
                "--chat-format firefly."
            )
        return model_format(self.tokenizer)

    @cached_property
    def generator(self) -> Generator:
        """The loaded model."""
        bf16 = self.settings.evaluate.precision == "bf16"
        return open_generator(self.directory, self.device, self.chat_format.stop_ids, bf16)

    def losses(self, questions: Questions) -> dict[str, NDArray[np.float64]]:
        """For each kind one row a sample: nats and tokens of what is learned, and its UTF-8 bytes."""
        kinds = {kind: list(self._samples(group)) for kind, group in questions.items()}
        num_tokens = sum(len(sample.rendered.ids) for samples in kinds.values() for sample in samples)
        found = {}
        with progress(f"score {self.name}", num_tokens, "tokens") as bar:
            for kind, samples in kinds.items():
                rows: list[list[float]] = []
                for batch in _batches(samples):
                    key = "losses " + sha256_json([[one.rendered.ids, one.rendered.mask] for one in batch])
                    amounts = self.journal.get(key)
                    if amounts is None:
                        amounts = self._losses(batch)
                        self.journal.keep(key, amounts)
                    rows += ([*amount, one.num_bytes] for amount, one in zip(amounts, batch, strict=True))
                    bar.advance(sum(len(one.rendered.ids) for one in batch), kind)
                found[kind] = np.asarray(rows, np.float64).reshape(-1, 3)
        return found

    def _losses(self, batch: Sequence[_Sample]) -> list[list[float]]:
        pairs = [(np.asarray(one.rendered.ids), np.asarray(one.rendered.mask)) for one in batch]
        return sample_losses(self.generator.model, pack(pairs), self.device).T.tolist()

    def _samples(self, examples: Sequence[Example]) -> Iterator[_Sample]:
        """The samples that examples become, cut as in training; what is lost there is left out here."""
        for example in examples:
            for part in fit(example, self.chat_format.render(example.messages), self.chat_format, self._cuts):
                if part.sample is not None:
                    yield _Sample(part.sample, part.target_bytes)

    @property
    def _cuts(self) -> DataSection:
        return self.settings.data.model_copy(update={"allow_lost_targets": True})

    def answers(self, questions: Questions) -> dict[str, list[str]]:
        """For each kind the model's answers; plain texts ask nothing.

        An answer has at most twice the tokens of the kind's longest reference, and never more than
        `generation.max_new_tokens`.
        """
        asked = {kind: askable(group, self.settings.evaluate) for kind, group in questions.items()}
        found = {kind: [""] * len(group) for kind, group in asked.items() if group}
        waiting: list[tuple[str, int, str]] = []
        prompts = []
        for kind, texts in found.items():
            limit = self._limit(asked[kind])
            for number, example in enumerate(asked[kind]):
                prompt = Prompt(self._prompt(example), limit, f"{kind} {example.input}")
                key = "answer " + sha256_json([prompt.ids, limit, prompt.key])
                kept = self.journal.get(key)
                if kept is None:
                    waiting.append((kind, number, key))
                    prompts.append(prompt)
                else:
                    texts[number] = kept
        total = sum(map(len, found.values()))
        with progress(f"answer {self.name}", total, "answers", total - len(waiting)) as bar:
            section = self.settings.evaluate
            answers = (
                self.generator.answers(prompts, self.settings.generation, section.batch_size)
                if prompts
                else ()
            )
            for place, ids in answers:
                kind, number, key = waiting[place]
                found[kind][number] = self.tokenizer.decode(ids)
                self.journal.keep(key, found[kind][number])
                bar.advance(1, kind)
        empty = {kind: sum(not text.strip() for text in texts) for kind, texts in found.items()}
        if any(empty.values()):
            where = ", ".join(f"{kind} {count}" for kind, count in empty.items() if count)
            num_empty = f"{sum(empty.values())} of {total} questions ({where})"
            warn(f"{self.name} gave no answer to {num_empty}; they count as wrong.")
        return found

    def _limit(self, examples: Sequence[Example]) -> int:
        longest = max(map(len, self.tokenizer.encode_many([example.target for example in examples])))
        return min(self.settings.generation.max_new_tokens, max(2 * longest, 1))

    def _prompt(self, example: Example) -> list[int]:
        """What stands before the last answer, in an overlong example cut as in training."""
        whole = self.chat_format.render(example.messages)
        sample = next(fit(example, whole, self.chat_format, self._cuts)).sample or whole
        end = len(sample.mask)
        while sample.mask[end - 1]:
            end -= 1
        return sample.ids[:end]


def askable(examples: Sequence[Example], section: EvaluateSection) -> list[Example]:
    """The first `generations_per_kind` examples that ask something."""
    return [example for example in examples if not example.is_plain][: section.generations_per_kind]


def _batches(samples: Sequence[_Sample]) -> Iterator[list[_Sample]]:
    group: list[_Sample] = []
    size = 0
    for sample in samples:
        if group and size + len(sample.rendered.ids) > _BATCH_TOKENS:
            yield group
            group, size = [], 0
        group.append(sample)
        size += len(sample.rendered.ids)
    if group:
        yield group
