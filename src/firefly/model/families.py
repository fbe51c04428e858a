"""Which model families Firefly trains: one row a `model_type` of config.json.

A row says how packed hidden states are made. A family belongs here once parity and leak tests hold for it;
any other is refused with a sentence, never half-supported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from firefly.errors import ModelError, choices
from firefly.model.bloom import Bloom, BloomShape
from firefly.model.packed import AttentionMaker, PackedInput, packed_attention, register_with_transformers


class HubModel(nn.Module):
    """A transformers causal model run over packed input through packed attention."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = dict(config)
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if settings.get(name):
                raise ModelError(
                    f"This model's config.json sets {name} = {settings[name]}, which is not supported."
                )
        try:
            made = AutoConfig.for_model(settings.pop("model_type"), **settings)
            made.use_cache = False
            attention = register_with_transformers()
            self.inner = AutoModelForCausalLM.from_config(made, attn_implementation=attention)
        except Exception as error:  # whatever transformers stumbles over
            reason = " ".join(str(error).split())
            raise ModelError(f"This config.json describes no model ({reason}); fetch it again.") from error
        self._checkpoint_every = 0

    @property
    def head(self) -> Tensor:
        """The output matrix, V C."""
        return self.inner.get_output_embeddings().weight  # type: ignore[no-any-return]

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers, first to last."""
        return self.inner.base_model.layers  # type: ignore[no-any-return]

    @property
    def embedding(self) -> nn.Embedding:
        """The input matrix, V C."""
        return self.inner.get_input_embeddings()  # type: ignore[no-any-return]

    @property
    def tp_plan(self) -> dict[str, str]:
        """How the matrices of a layer are split among ranks: as transformers says."""
        plan = self.inner.config.base_model_tp_plan
        return {name.removeprefix("layers.*."): how for name, how in plan.items()}

    @property
    def num_heads(self) -> dict[str, int]:
        """What must divide evenly among ranks."""
        config = self.inner.config
        return {
            "attention heads": config.num_attention_heads,
            "key-value heads": config.num_key_value_heads,
        }

    @property
    def checkpoint_every(self) -> int:
        """Every how many layers one is recomputed in the backward pass; 0: none."""
        return self._checkpoint_every

    @checkpoint_every.setter
    def checkpoint_every(self, every: int) -> None:
        self._checkpoint_every = every
        if every:  # renamed in transformers 5.2x
            old = self.inner.gradient_checkpointing_enable
            getattr(self.inner, "activation_checkpointing_enable", old)({"use_reentrant": False})
        for index, layer in enumerate(self.layers):
            setattr(layer, "gradient_checkpointing", bool(every) and index % every == 0)  # noqa: B010 - not nn.Module's own

    def hidden(self, batch: PackedInput, attend: AttentionMaker = packed_attention) -> Tensor:
        """Final hidden states, T C."""
        out = self.inner.base_model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            packed=attend(batch.borders, batch.input_ids.device, None),
        )
        return out.last_hidden_state[0]  # type: ignore[no-any-return]


CausalModel = Bloom | HubModel
"""What training and scoring run: `.hidden(PackedInput) -> T C`, `.head` V C."""

FAMILIES: dict[str, Callable[[dict[str, Any]], CausalModel]] = {
    "bloom": lambda config: Bloom(BloomShape.from_config(config)),
    "gemma": HubModel,
    "gemma3_text": HubModel,  # Gemma 2 caps its logits softly, which neither the loss nor the attention here does
    "llama": HubModel,
    "mistral": HubModel,
    "qwen2": HubModel,
    "qwen3": HubModel,
}


def build(config: dict[str, Any]) -> CausalModel:
    """The empty model of a config.json; raises `ModelError` for a family not in the table, or no model at all."""
    kind = str(config.get("model_type"))
    if kind not in FAMILIES:
        raise ModelError(
            f"The model family '{kind}' is not supported for training; {choices(kind, FAMILIES)}."
        )
    return FAMILIES[kind](config)


def transformers_model(model: CausalModel) -> nn.Module:
    """The module whose state dict has transformers' names."""
    return model.inner if isinstance(model, HubModel) else model
