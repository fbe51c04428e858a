"""Another device, or other company in the batch, moves a loss by rounding alone, and no greedy answer."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from firefly.data.chatformat import Rendered, open_format
from firefly.data.example import Message
from firefly.data.loader import pack
from firefly.data.tokenizer import ModelTokenizer
from firefly.files import locate
from firefly.model.generate import Generator, open_generator
from firefly.model.score import sample_losses
from firefly.recipe import GenerationSection

NOISE = 1e-5
"""Of a sample's loss, relative, in float32: docs/evaluate.md."""

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.fixture(scope="module")
def samples() -> list[Rendered]:
    """Sentences of the demo with their translations, in the embedded base's tokens."""
    chat_format = open_format("firefly", ModelTokenizer.load(locate("demo:base")))
    rows = map(json.loads, locate("demo:classical.jsonl").read_text("utf-8").splitlines()[:40])
    return [
        chat_format.render([Message("user", row["classical"]), Message("assistant", row["modern"])])
        for row in rows
    ]


def opened(device: str) -> Generator:
    return open_generator(locate("demo:base"), device, bf16=False)


def losses(generator: Generator, samples: list[Rendered], bf16: bool = False) -> Tensor:
    """Nats of each sample, scored together."""
    batch = pack([(np.asarray(one.ids), np.asarray(one.mask)) for one in samples])
    return sample_losses(generator.model, batch, generator.device, bf16)[0]


@pytest.mark.parametrize("device", DEVICES)
def test_losses_move_by_rounding_alone(device: str, samples: list[Rendered]) -> None:
    alone = torch.cat([losses(opened("cpu"), [one]) for one in samples])
    together = losses(opened(device), samples)
    assert ((together - alone).abs() < NOISE * alone).all()
    assert (
        (losses(opened(device), samples, bf16=True) - alone).abs() > NOISE * alone
    ).any()  # it would be seen


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_answers_are_the_same(device: str, samples: list[Rendered]) -> None:
    # With the beginning of an answer, since the base, which was not tuned, would end it at once.
    prompts = [one.ids[: one.mask.index(1) + 6] for one in samples]
    options = GenerationSection(do_sample=False, max_new_tokens=24)
    alone = opened("cpu").answer(prompts, options, batch_size=1)
    assert opened(device).answer(prompts, options, batch_size=32) == alone
    assert len({tuple(answer) for answer in alone}) > len(alone) / 2
