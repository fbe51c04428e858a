"""Generation: batching, padding and streaming change nothing about the answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM

from firefly.errors import ModelError
from firefly.model.generate import Generator, open_generator
from firefly.recipe import GenerationSection

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


def reference(directory: Path, prompt: list[int], penalty: float = 1.0, steps: int = 12) -> list[int]:
    """Greedy decoding of one prompt, written out: no cache, no padding; penalty as in Keskar et al. 2019."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            logits = model(torch.tensor([ids])).logits[0, -1]
            for token in set(ids):
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


def test_an_answer_ends_before_its_eos_token(generator: Generator) -> None:
    free = generator.answer(PROMPTS, GREEDY)
    ending = Generator(generator.model, generator.device, (free[0][3],))
    for answer, cut in zip(free, ending.answer(PROMPTS, GREEDY), strict=True):
        assert cut == (answer[: answer.index(free[0][3])] if free[0][3] in answer else answer)


def test_padding_is_no_repetition(generator: Generator) -> None:
    options = GREEDY.model_copy(update={"repetition_penalty": 4.0})
    first = generator.answer(PROMPTS[2:3], options)[0][0]
    ending = Generator(generator.model, generator.device, (first,))  # its padding would be penalised
    assert ending.answer(PROMPTS[1:3], options)[1] == []


def test_sampling_repeats_for_a_seed_varies_between_seeds_and_leaves_the_callers_randomness(
    generator: Generator,
) -> None:
    options = GenerationSection(temperature=5.0, top_p=1.0, max_new_tokens=12)
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    first = generator.answer(PROMPTS, options)
    assert torch.equal(torch.rand(3), expected)
    assert generator.answer(PROMPTS, options) == first
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
    with pytest.raises(ModelError, match="cannot open"):
        open_generator(tmp_path)


def test_a_directory_without_any_eos_needs_the_tokenizers(directory: Path, tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(directory, tmp_path / "m")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "m" / name
        settings: dict[str, Any] = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(ModelError, match="eos_token_id"):
        open_generator(tmp_path / "m")
    assert open_generator(tmp_path / "m", eos_ids=(5,)).eos_ids == (5,)
