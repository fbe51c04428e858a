"""Answers from a model directory: many prompts together, or one token by token; key/value cache, no padding.

    generator = open_generator(directory, device, chat_format.stop_ids)
    generator.answer(prompts, options)                           # prompts → answers
    generator.answers(prompts, options)                          # the same, each as it is done, in any order
    generator.stream(prompt, options, on_token, should_stop)     # one prompt; each token as it comes

Prompts and answers are lists of token ids. Each step reads one token of every open answer, and whole prompts where an
answer has just ended, all packed into one row: there is no padding, and a long answer keeps no other one waiting.

In float32 an answer does not depend on what is answered beside it: a close call between tokens is decided by reading
that text alone (see `sampling`), and each answer draws its own random numbers. In bf16 close calls may turn.
What the options do not name is off: the directory's own generation_config.json counts for its end-of-text tokens alone.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from firefly.errors import ModelError
from firefly.model.cache import KeyValueCache
from firefly.model.families import CausalModel
from firefly.model.load import load_model, read_config
from firefly.model.packed import PackedInput, on_device
from firefly.model.sampling import TIE, chances, drawn, likeliest, penalise
from firefly.recipe import GenerationSection

_PROMPT_TOKENS = 4096  # tokens of new prompts that one step reads, unless a single prompt has more


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to answer, in at most how many tokens; `key` names its random numbers, the ids themselves by default."""

    ids: Sequence[int]
    max_new_tokens: int
    key: str = ""


@dataclass(slots=True)
class _Row:
    """An open answer."""

    number: int
    prompt: Prompt
    chances: np.random.Generator
    answer: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Generator:
    """A model whose answers end at any of `eos_ids`."""

    model: CausalModel
    device: torch.device
    eos_ids: tuple[int, ...]

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationSection,
        max_new_tokens: int | None = None,
        batch_size: int = 16,
    ) -> list[list[int]]:
        """Answer all prompts; token ids without end-of-text. `max_new_tokens` goes before the options' own."""
        limit = max_new_tokens or options.max_new_tokens
        answers: list[list[int]] = [[] for _ in prompts]
        for number, ids in self.answers([Prompt(ids, limit) for ids in prompts], options, batch_size):
            answers[number] = ids
        return answers

    def answers(
        self, prompts: Sequence[Prompt], options: GenerationSection, batch_size: int = 16
    ) -> Iterator[tuple[int, list[int]]]:
        """The number of each prompt and its answer as it is done, up to `batch_size` at a time, the longest first."""
        for row, _ in self._steps(prompts, options, batch_size):
            if self._is_done(row):
                yield row.number, [token for token in row.answer if token not in self.eos_ids]

    def stream(
        self,
        prompt: Sequence[int],
        options: GenerationSection,
        on_token: Callable[[int], object],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[int]:
        """Answer one prompt, handing over each token as it comes; returns them all.

        `should_stop` is asked after every token, so a flag set by a signal handler ends the answer there.
        Everything runs in the caller's thread.
        """
        answer = []
        for _, token in self._steps([Prompt(prompt, options.max_new_tokens)], options, 1):
            if token in self.eos_ids:
                break
            answer.append(token)
            on_token(token)
            if should_stop():
                break
        return answer

    def _steps(
        self, prompts: Sequence[Prompt], options: GenerationSection, batch_size: int
    ) -> Iterator[tuple[_Row, int]]:
        """Every new token with the answer that it went to; one step after the other."""
        waiting = deque(
            sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids) - prompts[i].max_new_tokens)
        )
        cache = KeyValueCache(min(batch_size, len(prompts)))
        seen = torch.zeros(cache.num_rows, len(self.model.head), dtype=torch.bool, device=self.device)
        rows: list[_Row] = []
        while waiting or rows:
            num_old, num_tokens = len(rows), 0
            while waiting and len(rows) < cache.num_rows:
                prompt = prompts[waiting[0]]
                num_tokens += len(prompt.ids)
                if num_tokens > _PROMPT_TOKENS and len(rows) > num_old:
                    break
                seen[len(rows)] = False
                seen[len(rows), list(prompt.ids)] = options.penalize_prompt
                key = prompt.key or " ".join(map(str, prompt.ids))
                rows.append(_Row(waiting.popleft(), prompt, chances(options.seed, key)))
            texts = [row.answer[-1:] if row.answer else row.prompt.ids for row in rows]
            tokens = self._choose(self._hidden(cache, texts), rows, seen[: len(rows)], options)
            seen[range(len(rows)), tokens] = True
            for place in reversed(range(len(rows))):
                row, token = rows[place], tokens[place]
                row.answer.append(token)
                yield row, token
                if self._is_done(row):
                    cache.drop(place)
                    seen[place] = seen[len(rows) - 1]
                    rows[place] = rows[-1]
                    rows.pop()

    def _is_done(self, row: _Row) -> bool:
        return len(row.answer) == row.prompt.max_new_tokens or row.answer[-1] in self.eos_ids

    @torch.no_grad()
    def _hidden(self, cache: KeyValueCache, texts: Sequence[Sequence[int]]) -> Tensor:
        """The last hidden state of every row, R C, after its new tokens."""
        starts = [*cache.lengths, *[0] * (len(texts) - len(cache.lengths))]
        borders = np.cumsum([0, *map(len, texts)])
        positions = [range(start, start + len(text)) for start, text in zip(starts, texts, strict=True)]
        nothing = torch.empty(0, dtype=torch.long)
        batch = PackedInput(
            on_device(np.concatenate([np.asarray(text, np.int64) for text in texts]), self.device),
            on_device(np.concatenate(positions).astype(np.int64), self.device),
            borders.tolist(),
            nothing,
            nothing,
        )
        states = self.model.hidden(batch, cache.attention)
        return states[on_device(borders[1:] - 1, self.device)]

    @torch.no_grad()
    def _choose(
        self, states: Tensor, rows: Sequence[_Row], seen: Tensor, options: GenerationSection
    ) -> list[int]:
        """The next token of each row, from its hidden state (R C) and the tokens that it has `seen` (R V)."""
        logits = penalise(F.linear(states, self.model.head).float(), seen, options.repetition_penalty)
        if not bool(logits.amax(1).isfinite().all()):
            raise ModelError(
                "The model's logits are not finite numbers: its weights are damaged; fetch it again."
            )
        draws = torch.tensor([row.chances.random() for row in rows]).to(self.device, torch.float32)
        found, close = drawn(logits, options, draws) if options.do_sample else likeliest(logits)
        tokens: list[int] = found.tolist()
        if self.model.head.dtype == torch.float32:
            for place in close.nonzero()[:, 0].tolist():
                one = slice(place, place + 1)
                text = [*rows[place].prompt.ids, *rows[place].answer]
                state = self._hidden(KeyValueCache(1), [text])
                tokens[place] = self._decide(state, logits[one], seen[one], draws[one], options)
        return tokens

    def _decide(
        self, state: Tensor, logits: Tensor, seen: Tensor, draw: Tensor, options: GenerationSection
    ) -> int:
        """A close call, decided by the state (1 C) that the text has alone; `logits` (1 V) tell what is close."""
        if options.do_sample:
            exact = penalise(F.linear(state, self.model.head), seen, options.repetition_penalty)
            return int(drawn(exact, options, draw)[0])
        # The few rivals alone, and in float64: so the size of the vocabulary, which pruning changes, does not count.
        highest = logits.max()
        rivals = (logits[0] >= highest - 2 * TIE * highest.abs()).nonzero()[:, 0]
        exact = F.linear(state.double(), self.model.head[rivals].double())
        return int(rivals[penalise(exact, seen[:, rivals], options.repetition_penalty).argmax()])


def open_generator(
    directory: Path, device: torch.device | str = "cpu", eos_ids: Sequence[int] = (), bf16: bool | None = None
) -> Generator:
    """Open a model directory for generation, in bf16 or float32; by default float32 on the CPU, bf16 on CUDA.

    `eos_ids`, the chat format's, end an answer beside those that the directory's configuration names.
    Raises `ModelError` for missing or damaged weights, an unsupported family, or no end-of-text token at all.
    """
    place = torch.device(device)
    ends = end_tokens(directory, eos_ids)
    half = place.type == "cuda" if bf16 is None else bf16
    model = load_model(directory, place, torch.bfloat16 if half else torch.float32)
    return Generator(model.eval(), place, ends)


def end_tokens(directory: Path, eos_ids: Sequence[int] = ()) -> tuple[int, ...]:
    """The tokens that end an answer: `eos_ids`, and those that generation_config.json or config.json names.

    Raises `ModelError` when there is none.
    """
    path = directory / "generation_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else read_config(directory)
    named = settings.get("eos_token_id")
    ends = dict.fromkeys([*eos_ids, *(named if isinstance(named, list) else [named])])
    found = tuple(number for number in ends if number is not None)
    if not found:
        raise ModelError(
            f"{directory} names no eos_token_id in config.json, so an answer could never end; add one."
        )
    return found
