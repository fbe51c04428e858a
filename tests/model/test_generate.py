"""Generation: batches, refilled rows, caches and streaming change nothing about the answers."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from firefly.errors import ModelError
from firefly.model import generate, sampling
from firefly.model.generate import Generator, Prompt, open_generator
from firefly.model.hub_generate import open_hub_generator
from firefly.recipe import GenerationSection
from tiny import SHAPES

EOS = 2
GREEDY = GenerationSection(do_sample=False, repetition_penalty=1.0, max_new_tokens=12)
PROMPTS = [[1, 7, 9, 2, 2], [1, 30, 31, 32, 33, 34, 35, 36, 2, 2], [1, 50], [1, 8, 8, 8, 60, 61, 2, 2]]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BLOOM whose directory asks for sampling, which must not count."""
    torch.manual_seed(0)
    config = BloomConfig(
        vocab_size=80, hidden_size=32, n_layer=2, n_head=4, eos_token_id=EOS, initializer_range=0.5
    )
    model = BloomForCausalLM(config)
    model.generation_config.update(do_sample=True, top_k=3, max_length=7)
    place = tmp_path_factory.mktemp("bloom")
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def generator(directory: Path) -> Generator:
    return open_generator(directory)


def reference(
    directory: Path, prompt: list[int], penalty: float = 1.0, steps: int = 12, unseen: int = 0
) -> list[int]:
    """Greedy decoding of one prompt, written out: no cache, no padding; penalty as in Keskar et al. 2019.

    The first `unseen` tokens do not count as repeated.
    """
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([ids])).logits[0, -1]
            for token in set(ids[unseen:]):
                logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
            if int(logits.argmax()) == EOS:
                break
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_a_batch_of_unequal_prompts_equals_each_prompt_alone(
    directory: Path, generator: Generator, penalty: float
) -> None:
    options = GREEDY.model_copy(update={"repetition_penalty": penalty})
    expected = [reference(directory, prompt, penalty) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in expected}) > 1
    assert generator.answer(PROMPTS, options) == expected
    assert [generator.answer([prompt], options)[0] for prompt in PROMPTS] == expected


def test_the_prompt_need_not_count_as_repeated(directory: Path, generator: Generator) -> None:
    """In any batch, with rows refilled, and through transformers' own generate."""
    options = GREEDY.model_copy(update={"repetition_penalty": 1.6, "penalize_prompt": False})
    expected = [reference(directory, prompt, 1.6, unseen=len(prompt)) for prompt in PROMPTS]
    assert expected != [reference(directory, prompt, 1.6) for prompt in PROMPTS]
    for size in (1, 2, 32):
        assert generator.answer(PROMPTS, options, batch_size=size) == expected
    hub = open_hub_generator(directory)
    assert [hub.stream(prompt, options, lambda _: None) for prompt in PROMPTS] == expected


@pytest.mark.parametrize("family", SHAPES)
def test_every_family_answers_as_transformers_does_at_any_batch_size(
    tiny: Callable[[str], Path], family: str
) -> None:
    """Also with rows that are refilled while others go on."""
    place = tiny(family)
    generator, draw = open_generator(place), random.Random(0)
    prompts = [[draw.randrange(4, 500) for _ in range(draw.randrange(1, 90))] for _ in range(9)]
    wanted = [Prompt(ids, draw.randrange(1, 14)) for ids in prompts]
    options = GREEDY.model_copy(update={"repetition_penalty": 1.3})
    expected = [reference(place, list(one.ids), 1.3, one.max_new_tokens) for one in wanted]
    for size in (1, 2, 3, 32):
        assert dict(generator.answers(wanted, options, size)) == dict(enumerate(expected))
    assert len({len(answer) for answer in expected}) > 3


def near_twins(directory: Path, folder: Path) -> Path:
    """The model with the output of every odd token that of the even one before it, but for some millionths."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(directory, folder)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["transformer.word_embeddings.weight"]
    table[1::2] = table[::2] * (1 + 1e-7 * torch.randn_like(table[1::2]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("sampled", [False, True])
def test_close_calls_do_not_depend_on_the_batch(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    """Where rounding could turn every choice, each is made on the text alone, and the same in any company."""
    options = GenerationSection(do_sample=sampled, temperature=2.0, repetition_penalty=1.0, max_new_tokens=12)
    generator = open_generator(near_twins(directory, tmp_path / "twins"))
    draw = random.Random(0)
    prompts = [[draw.randrange(3, 80) for _ in range(draw.randrange(1, 40))] for _ in range(12)]
    alone: list[int] = []
    decide = Generator._decide
    monkeypatch.setattr(Generator, "_decide", lambda *args: alone.append(1) or decide(*args))
    expected = generator.answer(prompts, options, batch_size=1)
    assert len(alone) > sum(map(len, expected)) / 2
    for size in (2, 5, 32):
        assert generator.answer(prompts, options, batch_size=size) == expected
    assert generator.answer(prompts[::-1], options, batch_size=3) == expected[::-1]


def test_deciding_every_token_alone_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, generator: Generator
) -> None:
    options = [GREEDY, GenerationSection(temperature=2.0, top_p=0.9, max_new_tokens=12)]
    expected = [generator.answer(PROMPTS, one) for one in options]
    monkeypatch.setattr(sampling, "TIE", 1e9)
    monkeypatch.setattr(generate, "TIE", 1e9)
    assert [generator.answer(PROMPTS, one) for one in options] == expected


def test_sampling_follows_the_nucleus() -> None:
    """Drawn tokens are as frequent as their renormalised probabilities, and none is from outside the nucleus."""
    logits = torch.tensor([[2.0, 0.5, 1.5, -1.0, 1.0, -9.0]])
    options = GenerationSection(temperature=0.7, top_p=0.9)
    probabilities = (logits[0] / 0.7).softmax(0)
    kept = [0, 2, 4]
    assert probabilities[kept[:2]].sum() < 0.9 <= probabilities[kept].sum()
    draws = torch.from_numpy(sampling.chances(1, "x").random(20_000)).float()
    tokens, close = sampling.drawn(logits.expand(len(draws), -1), options, draws)
    counts = torch.bincount(tokens, minlength=6) / len(draws)
    expected = torch.zeros(6)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    assert torch.allclose(counts, expected, atol=0.01) and close.float().mean() < 0.01


def test_a_flat_distribution_looks_beyond_the_likeliest_few(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(0)) / 10
    options, draws = GenerationSection(temperature=1.0, top_p=0.95), torch.tensor([0.2, 0.6, 0.99])
    few = sampling.drawn(logits, options, draws)[0].tolist()
    monkeypatch.setattr(sampling, "_FIRST_LOOK", 500)
    assert sampling.drawn(logits, options, draws)[0].tolist() == few


def test_weights_that_compute_no_numbers_are_an_error(directory: Path) -> None:
    broken = open_generator(directory)
    with torch.no_grad():
        broken.model.head[5] = torch.nan
    with pytest.raises(ModelError, match="not finite"):
        broken.answer(PROMPTS, GREEDY)


def test_an_answer_ends_before_its_eos_token(generator: Generator) -> None:
    free = generator.answer(PROMPTS, GREEDY)
    ending = Generator(generator.model, generator.device, (free[0][3],))
    for answer, cut in zip(free, ending.answer(PROMPTS, GREEDY), strict=True):
        assert cut == (answer[: answer.index(free[0][3])] if free[0][3] in answer else answer)


def test_sampling_repeats_for_a_seed_varies_between_seeds_and_leaves_the_callers_randomness(
    generator: Generator,
) -> None:
    options = GenerationSection(temperature=5.0, top_p=1.0, max_new_tokens=12)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = generator.answer(PROMPTS, options)
    assert torch.equal(torch.rand(3), expected)
    assert generator.answer(PROMPTS, options) == generator.answer(PROMPTS, options, batch_size=1) == first
    assert generator.answer(PROMPTS[2:], options) == first[2:]
    assert generator.answer(PROMPTS, options.model_copy(update={"seed": 43})) != first


def test_max_new_tokens_bounds_the_answer(generator: Generator) -> None:
    assert all(len(answer) <= 3 for answer in generator.answer(PROMPTS, GREEDY, max_new_tokens=3))
    assert generator.answer([], GREEDY) == []


def test_streaming_hands_over_the_same_tokens_and_stops_when_asked(generator: Generator) -> None:
    whole = generator.answer(PROMPTS[1:2], GREEDY)[0]
    assert len(whole) > 4
    heard: list[int] = []
    assert generator.stream(PROMPTS[1], GREEDY, heard.append) == heard == whole
    heard.clear()
    assert generator.stream(PROMPTS[1], GREEDY, heard.append, lambda: len(heard) == 4) == heard == whole[:4]


def test_streaming_never_hands_over_eos(generator: Generator) -> None:
    whole = generator.answer(PROMPTS[1:2], GREEDY)[0]
    ending = Generator(generator.model, generator.device, (whole[2],))
    heard: list[int] = []
    assert ending.stream(PROMPTS[1], GREEDY, heard.append) == heard == whole[: whole.index(whole[2])]


def test_transformers_own_way_streams_the_same_and_stops(directory: Path, generator: Generator) -> None:
    """What serves the families that are not in our table."""
    hub = open_hub_generator(directory)
    heard: list[int] = []
    whole = generator.stream(PROMPTS[1], GREEDY, lambda _: None)
    assert hub.stream(PROMPTS[1], GREEDY, heard.append) == heard == whole
    heard.clear()
    assert hub.stream(PROMPTS[1], GREEDY, heard.append, lambda: len(heard) == 4) == heard == whole[:4]
    with pytest.raises(ModelError, match="no weights"):
        open_hub_generator(
            shutil.copytree(directory, directory / "x", ignore=lambda *_: ["x", "model.safetensors"])
        )


def test_missing_weights_and_missing_tensors_are_errors(directory: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((directory / "config.json").read_bytes())
    with pytest.raises(ModelError, match="no weights"):
        open_generator(tmp_path)
    tensors = load_file(directory / "model.safetensors")
    tensors.pop("transformer.ln_f.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"ln_f\.weight"):
        open_generator(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 64)
    with pytest.raises(ModelError, match="is damaged"):
        open_generator(tmp_path)


def test_a_directory_without_any_eos_needs_the_tokenizers(directory: Path, tmp_path: Path) -> None:
    import json

    shutil.copytree(directory, tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "m" / name
        settings: dict[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(ModelError, match="eos_token_id"):
        open_generator(tmp_path / "m")
    assert open_generator(tmp_path / "m", eos_ids=(5,)).eos_ids == (5,)
