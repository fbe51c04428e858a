"""The packed models compute what transformers computes, and packed samples never see each other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from firefly.data.loader import Batch, pack
from firefly.errors import ModelError
from firefly.model.families import CausalModel, build
from firefly.model.load import load_model, save_model, state_to_save, transformers_model
from firefly.model.packed import PackedInput
from firefly.model.score import batch_loss, token_losses
from tiny import SHAPES

FAMILIES = ["bloom", "qwen3", "llama", "mistral", "qwen2", "gemma", "gemma3_text"]
"""Mistral's and Gemma 3's windows here are shorter than the samples."""
CPU = torch.device("cpu")


def sample(length: int, seed: int, learned: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [length]; the last `learned` of them carry the loss (all when None)."""
    rng = np.random.default_rng(seed)
    mask = np.ones(length, bool) if learned is None else np.arange(length) >= length - learned
    return rng.integers(4, 500, length), mask


def packed(batch: Batch) -> PackedInput:
    return PackedInput.of(batch, CPU)


def losses(model: CausalModel, *samples: tuple[np.ndarray, np.ndarray]) -> torch.Tensor:
    return token_losses(model, packed(pack(samples)))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(tiny: Callable[[str], Path], family: str) -> None:
    ids, mask = sample(37, seed=1)
    model, reference = load_model(tiny(family)), AutoModelForCausalLM.from_pretrained(tiny(family))
    with torch.no_grad():
        logits = model.hidden(packed(pack([(ids, mask)]))) @ model.head.T
        expected = reference(torch.from_numpy(ids)[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("every", [0, 1, 2])
def test_loss_and_gradients_equal_transformers(tiny: Callable[[str], Path], family: str, every: int) -> None:
    ids, mask = sample(29, seed=2, learned=11)
    model, reference = load_model(tiny(family)), AutoModelForCausalLM.from_pretrained(tiny(family))
    model.checkpoint_every = every
    model.train()
    loss, _ = batch_loss(model, packed(pack([(ids, mask)])))
    loss.backward()
    logits = reference(torch.from_numpy(ids)[None]).logits[0]
    targets = torch.from_numpy(np.where(mask, ids, -100))[1:]
    expected = F.cross_entropy(logits[:-1], targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    gradients = {name: p.grad for name, p in transformers_model(model).named_parameters()}
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, atol=2e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_alone(tiny: Callable[[str], Path], family: str) -> None:
    model = load_model(tiny(family))
    samples = [sample(length, seed=length, learned=max(1, length // 2)) for length in (5, 1, 31, 2, 17, 40)]
    together = losses(model, *samples)
    alone = torch.cat([losses(model, one) for one in samples])
    assert len(together) == sum(mask[1:].sum() for _, mask in samples)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_neighbour_changes_nothing(tiny: Callable[[str], Path], family: str) -> None:
    """The strongest leak test: swap the first document for another and look at the second."""
    model = load_model(tiny(family))
    second = sample(19, seed=7)
    before = losses(model, sample(12, seed=8), second)[-18:]
    after = losses(model, sample(12, seed=9), second)[-18:]
    assert torch.equal(before, after)


def test_plain_transformers_does_leak(tiny: Callable[[str], Path]) -> None:
    """What the packed path mends: transformers' BLOOM ignores position ids and attends across documents."""
    reference = AutoModelForCausalLM.from_pretrained(tiny("bloom"))
    (first, _), (other, _), (second, _) = sample(12, seed=8), sample(12, seed=9), sample(19, seed=7)
    with torch.no_grad():
        rows = [
            reference(torch.from_numpy(np.concatenate([head, second]))[None]).logits[0, 12:]
            for head in (first, other)
        ]
    assert not torch.allclose(*rows, atol=1e-2)


@pytest.mark.parametrize(
    "setting",
    [
        {"final_logit_softcapping": 30.0},
        {"attn_logit_softcapping": 50.0},
        {"use_bidirectional_attention": True},
    ],
)
def test_what_would_be_computed_differently_is_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="which is not supported"):
        build({"model_type": "gemma3_text", **SHAPES["gemma3_text"], **setting})
    with pytest.raises(ModelError, match="'gemma2' is not supported"):
        build({"model_type": "gemma2"})


@pytest.mark.parametrize(
    ("family", "setting", "says"),
    [
        ("bloom", {"vocab_size": "many"}, "vocab_size = 'many'"),
        ("bloom", {"n_head": 0}, "n_head = 0"),
        ("bloom", {"n_head": 5}, "48 among 5 heads"),
        ("qwen3", {"vocab_size": "many"}, "describes no model .*vocab_size"),
        ("qwen3", {"hidden_size": -4}, "describes no model"),
    ],
)
def test_a_config_that_describes_no_model_is_one_sentence(
    family: str, setting: dict[str, Any], says: str
) -> None:
    config = {"model_type": family, "vocab_size": 503, "hidden_size": 48, **SHAPES[family], **setting}
    with torch.device("meta"), pytest.raises(ModelError, match=says) as caught:
        build(config)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="lacks hidden_size and n_embed"):
        build({"model_type": "bloom"})


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_tokens_contribute_nothing(tiny: Callable[[str], Path], family: str) -> None:
    """The loss is that of the learned tokens alone, whatever the others would have cost."""
    model = load_model(tiny(family))
    ids, mask = sample(20, seed=3, learned=6)
    batch = packed(pack([(ids, mask)]))
    assert batch.target_positions.tolist() == list(range(13, 19))
    loss, _ = batch_loss(model, batch)
    everything, _ = batch_loss(model, packed(pack([(ids, np.ones(20, bool))])))
    each = token_losses(model, packed(pack([(ids, np.ones(20, bool))])))
    torch.testing.assert_close(loss, each[13:].sum(), atol=1e-4, rtol=1e-5)
    assert float(everything.detach()) > float(loss.detach())


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_directory_opens_in_transformers(
    tiny: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = load_model(tiny(family))
    save_model(state_to_save(model), tiny(family), tmp_path / "out", "{{ messages }}", torch.float32)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    original = AutoModelForCausalLM.from_pretrained(tiny(family)).state_dict()
    assert reopened.keys() == original.keys()
    assert all(torch.equal(reopened[name], tensor) for name, tensor in original.items())
