"""Answers from a model directory, through plain transformers: many prompts at once, or one token by token.

    generator = open_generator(directory, device, chat_format.stop_ids)
    generator.answer(prompts, options)                           # batch of prompts → batch of answers
    generator.stream(prompt, options, on_token, should_stop)     # one prompt; each token as it comes

Prompts and answers are lists of token ids. What the options do not name is off: the model directory's own
generation_config.json counts for its end-of-text tokens alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firefly.errors import ModelError
from firefly.model.hub import quiet_transformers
from firefly.model.load import read_config
from firefly.model.shards import weight_files
from firefly.recipe import GenerationSection


@dataclass(frozen=True)
class Generator:
    """A transformers model with its KV cache; an answer ends at any of `eos_ids`."""

    model: Any
    device: torch.device
    eos_ids: tuple[int, ...]

    def answer(
        self, prompts: Sequence[Sequence[int]], options: GenerationSection, max_new_tokens: int | None = None
    ) -> list[list[int]]:
        """Answer all prompts in one batch; token ids without end-of-text or padding.

        The same prompts and options give the same answers. `max_new_tokens` goes before the options' own.
        """
        return self._generate(prompts, options, max_new_tokens) if prompts else []

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
        return self._generate([prompt], options, None, [_Watch(on_token, should_stop, self.eos_ids)])[0]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        options: GenerationSection,
        max_new_tokens: int | None,
        watches: Sequence[Callable[..., Tensor]] = (),
    ) -> list[list[int]]:
        from transformers import StoppingCriteriaList

        width = max(map(len, prompts))
        # Older transformers let the repetition penalty see padding too: each row's padding is a token of its own.
        rows = [[prompt[0]] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        seen = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        forked = [self.device] if self.device.type == "cuda" else []
        with quiet_transformers(), torch.random.fork_rng(forked):
            torch.manual_seed(options.seed)
            out = self.model.generate(
                input_ids=torch.tensor(rows, device=self.device),
                attention_mask=torch.tensor(seen, device=self.device),
                generation_config=self._config(options, max_new_tokens),
                stopping_criteria=StoppingCriteriaList(watches),
            )
        return [self._until_eos(row) for row in out[:, width:].tolist()]

    def _config(self, options: GenerationSection, max_new_tokens: int | None) -> Any:
        from transformers import GenerationConfig

        sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=max_new_tokens or options.max_new_tokens,
            do_sample=options.do_sample,
            repetition_penalty=options.repetition_penalty,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.eos_ids[0],
            use_cache=True,
            **(sampling if options.do_sample else {}),
        )

    def _until_eos(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return ids[:end]


class _Watch:
    """A stopping criterion that hands each new token of a single row over, and asks whether to stop there."""

    def __init__(
        self, on_token: Callable[[int], object], should_stop: Callable[[], bool], eos_ids: tuple[int, ...]
    ) -> None:
        self.on_token, self.should_stop, self.eos_ids, self.done = on_token, should_stop, eos_ids, False

    def __call__(self, input_ids: Tensor, _scores: Any, **_unused: Any) -> Tensor:
        token = int(input_ids[0, -1])
        self.done = self.done or token in self.eos_ids
        if not self.done:  # transformers may run a step beyond the end before it looks
            self.on_token(token)
            self.done = self.should_stop()
        return torch.tensor([self.done], device=input_ids.device)


def open_generator(
    directory: Path, device: torch.device | str = "cpu", eos_ids: Sequence[int] = ()
) -> Generator:
    """Open a model directory for generation: float32 on the CPU, bf16 on CUDA.

    `eos_ids`, the chat format's, end an answer beside those that the directory's configuration names.
    Raises `ModelError` for missing or damaged weights, an unknown architecture, or no end-of-text token at all.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GenerationConfig

    read_config(directory)
    weight_files(directory)
    place = torch.device(device)
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=torch.bfloat16 if place.type == "cuda" else torch.float32,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ModelError(f"transformers cannot open the model directory {directory}: {first_line}") from error
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"{directory} lacks the tensor {missing[0]} ({len(missing)} in all); fetch it again."
        )
    named = model.generation_config.eos_token_id
    ends = dict.fromkeys([*eos_ids, *(named if isinstance(named, list) else [named])])
    found = tuple(number for number in ends if number is not None)
    if not found:
        raise ModelError(
            f"{directory} names no eos_token_id in config.json, so an answer could never end; add one."
        )
    model.generation_config = GenerationConfig()
    return Generator(model.to(place).eval(), place, found)
