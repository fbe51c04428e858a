"""BLOOM over packed documents, with transformers' weight names: the same model, minus padding and leaks.

transformers runs BLOOM with eager attention only and ignores position ids, so documents packed there attend to
each other. Here ALiBi and attention stay within each document. Weights load from, and save to, plain BLOOM.

Legend: T packed tokens, C hidden size, H heads, D head size, V vocabulary.
Source: BigScience Workshop 2022, "BLOOM", section 3.2; layer order and names as in transformers' modeling_bloom.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from firefly.errors import ModelError
from firefly.model.packed import AttentionMaker, PackedAttention, PackedInput, packed_attention


@dataclass(frozen=True)
class BloomShape:
    """What of config.json shapes the computation."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    layer_norm_epsilon: float
    residual_after_layernorm: bool
    tied: bool

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> BloomShape:
        """Read a BLOOM config.json; raises `ModelError` for numbers that make no model, and for dropout, which no
        published BLOOM uses."""
        for name in ("hidden_dropout", "attention_dropout"):
            if config.get(name, 0.0):
                raise ModelError(
                    f"This BLOOM's config.json sets {name} = {config[name]}; set it to 0 to train it here."
                )
        hidden_size = _first(config, "hidden_size", "n_embed")
        num_heads = _first(config, "n_head", "num_attention_heads")
        if hidden_size % num_heads:
            raise ModelError(
                f"This BLOOM's config.json shares a hidden size of {hidden_size} among {num_heads} heads, which does "
                "not come out even; fetch it again."
            )
        return cls(
            vocab_size=_first(config, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_first(config, "n_layer", "num_hidden_layers"),
            num_heads=num_heads,
            layer_norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
            residual_after_layernorm=config.get("apply_residual_connection_post_layernorm", False),
            tied=config.get("tie_word_embeddings", True),
        )


def _first(config: dict[str, Any], *names: str) -> int:
    """A number above 0 that older and newer config.json files name differently."""
    for name in names:
        if name in config:
            if isinstance(config[name], int) and config[name] > 0:
                return int(config[name])
            raise ModelError(
                f"This BLOOM's config.json has {name} = {config[name]!r}, which must be a whole number above 0; "
                "fetch it again."
            )
    raise ModelError(f"This BLOOM's config.json lacks {' and '.join(names)}; fetch it again.")


class Bloom(nn.Module):
    """BLOOM for packed input. Its state dict has transformers' names; a tied head has no entry of its own."""

    slopes: Tensor

    def __init__(self, shape: BloomShape) -> None:
        super().__init__()
        self.shape = shape
        self.checkpoint_every = 0
        self.transformer = _Transformer(shape)
        self.register_buffer("slopes", alibi_slopes(shape.num_heads), persistent=False)
        if not shape.tied:
            self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)

    @property
    def head(self) -> Tensor:
        """The output matrix, V C."""
        return self.transformer.word_embeddings.weight if self.shape.tied else self.lm_head.weight

    @property
    def embedding(self) -> nn.Embedding:
        """The input matrix, V C."""
        return self.transformer.word_embeddings

    @property
    def tp_plan(self) -> dict[str, str]:
        """How the matrices of a layer are split among ranks (see firefly.model.split)."""
        return {
            "self_attention.query_key_value": "colwise",  # contiguous, as a head's rows lie together
            "self_attention.dense": "rowwise",
            "mlp.dense_h_to_4h": "colwise",
            "mlp.dense_4h_to_h": "rowwise",
        }

    @property
    def num_heads(self) -> dict[str, int]:
        """What must divide evenly among ranks."""
        return {"attention heads": self.shape.num_heads}

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return self.transformer.h

    def hidden(self, batch: PackedInput, attend: AttentionMaker = packed_attention) -> Tensor:
        """Final hidden states, T C."""
        stem = self.transformer
        states = stem.word_embeddings_layernorm(stem.word_embeddings(batch.input_ids))  # T C
        attention = attend(batch.borders, states.device, self.slopes)
        for index, layer in enumerate(stem.h):
            if self.training and self.checkpoint_every and index % self.checkpoint_every == 0:
                states = checkpoint(layer, states, attention, use_reentrant=False)
            else:
                states = layer(states, attention)
        return stem.ln_f(states)  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self, shape: BloomShape) -> None:
        super().__init__()
        width, epsilon = shape.hidden_size, shape.layer_norm_epsilon
        self.word_embeddings = nn.Embedding(shape.vocab_size, width)
        self.word_embeddings_layernorm = nn.LayerNorm(width, epsilon)
        self.h = nn.ModuleList(_Layer(shape) for _ in range(shape.num_layers))
        self.ln_f = nn.LayerNorm(width, epsilon)


class _Layer(nn.Module):
    def __init__(self, shape: BloomShape) -> None:
        super().__init__()
        width, epsilon = shape.hidden_size, shape.layer_norm_epsilon
        self.residual_after_layernorm = shape.residual_after_layernorm
        self.input_layernorm = nn.LayerNorm(width, epsilon)
        self.self_attention = _Attention(width, shape.num_heads)
        self.post_attention_layernorm = nn.LayerNorm(width, epsilon)
        self.mlp = _Mlp(width)

    def forward(self, states: Tensor, attention: PackedAttention) -> Tensor:
        normed = self.input_layernorm(states)
        residual = normed if self.residual_after_layernorm else states
        states = residual + self.self_attention(normed, attention)
        normed = self.post_attention_layernorm(states)
        residual = normed if self.residual_after_layernorm else states
        return residual + self.mlp(normed)  # type: ignore[no-any-return]


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.head_size = width // num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, states: Tensor, attention: PackedAttention) -> Tensor:
        fused = self.query_key_value(
            states
        )  # T 3C, interleaved by head; under tensor parallelism some heads only
        query, key, value = fused.view(len(states), -1, 3, self.head_size).unbind(2)  # T H D
        attended = attention(query, key, value)
        return self.dense(attended.reshape(len(states), -1))  # type: ignore[no-any-return]


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(width, 4 * width)
        self.dense_4h_to_h = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(states), approximate="tanh"))  # type: ignore[no-any-return]


def alibi_slopes(num_heads: int) -> Tensor:
    """One slope a head [H]: 2^(−8/n) geometric, with odd steps of 2n for heads beyond a power of two n."""
    power = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * step / power) for step in range(1, power + 1)]
    rest = [2.0 ** (-4.0 * step / power) for step in range(1, 2 * (num_heads - power) + 1, 2)]
    return torch.tensor(first + rest)
