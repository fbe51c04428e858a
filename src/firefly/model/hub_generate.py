"""Answers of families that `firefly.model.families` does not know: through transformers' own `generate`, one at a time.

    generator = open_hub_generator(directory, device, chat_format.stop_ids)
    generator.stream(prompt, options, on_token, should_stop)

So whatever transformers opens can be talked to. Training and evaluation want a family of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from firefly.errors import ModelError
from firefly.model.generate import end_tokens
from firefly.model.hub import quiet_transformers
from firefly.model.load import read_config
from firefly.model.shards import weight_files
from firefly.recipe import GenerationSection


@dataclass(frozen=True)
class HubGenerator:
    """A transformers model with its KV cache; an answer ends at any of `eos_ids`."""

    model: Any
    device: torch.device
    eos_ids: tuple[int, ...]

    def stream(
        self,
        prompt: Sequence[int],
        options: GenerationSection,
        on_token: Callable[[int], object],
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[int]:
        """As `Generator.stream`."""
        from transformers import (
            GenerationConfig,
            LogitsProcessorList,
            RepetitionPenaltyLogitsProcessor,
            StoppingCriteriaList,
        )

        sampling = {"temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        settings = GenerationConfig(
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            repetition_penalty=options.repetition_penalty if options.penalize_prompt else 1.0,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.eos_ids[0],
            use_cache=True,
            **(sampling if options.do_sample else {}),
        )
        ids = torch.tensor([list(prompt)], device=self.device)
        penalise = RepetitionPenaltyLogitsProcessor(options.repetition_penalty, len(prompt))
        forked = [self.device] if self.device.type == "cuda" else []
        with quiet_transformers(), torch.random.fork_rng(forked):
            torch.manual_seed(options.seed)
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([] if options.penalize_prompt else [penalise]),
                stopping_criteria=StoppingCriteriaList([_Watch(on_token, should_stop, self.eos_ids)]),
            )
        answer: list[int] = out[0, len(prompt) :].tolist()
        end = next((place for place, token in enumerate(answer) if token in self.eos_ids), len(answer))
        return answer[:end]


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


def open_hub_generator(
    directory: Path, device: torch.device | str = "cpu", eos_ids: Sequence[int] = ()
) -> HubGenerator:
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
    model.generation_config = GenerationConfig()
    return HubGenerator(model.to(place).eval(), place, end_tokens(directory, eos_ids))
