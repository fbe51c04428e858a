"""What is learned, and what the loss is divided by.

    sft       the answers, as the chat format marked them       mean over learned tokens
    pretrain  every token that has a predecessor                mean over learned tokens
    dpo       to prefer the chosen answer to the rejected one   mean over pairs      Rafailov et al. 2023

Method, objective and parallelism are three independent choices of one loop; a new objective is one class here.
DPO's reference is the base as training finds it: it is asked once, before the first step, for the log-probability of
every answer that training will use, so no second model is kept and every method can have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from firefly.console import watched
from firefly.data.loader import Batch, TrainingStream, in_order
from firefly.data.tokens import Tokens
from firefly.files import write_atomic
from firefly.model.families import CausalModel
from firefly.model.loss import linear_cross_entropy
from firefly.model.packed import PackedInput, on_device
from firefly.model.score import batch_loss, learned_states, loss_by_sample, sum_by_kind
from firefly.recipe import Recipe, TrainSection
from firefly.train.parallel import ALONE, Ranks

Scores = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Loss:
    """The loss of a batch: its differentiable sum, that of each unit [U], and sums of other figures over the units."""

    total: Tensor
    each: Tensor
    others: dict[str, Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """What the loop asks of an objective."""

    def units(self, batch: Batch) -> NDArray[np.int64]:
        """What the loss is a sum over, learned tokens or pairs: for each, its sample's place in the batch [U]."""
        ...

    def loss(self, model: CausalModel, batch: Batch, device: torch.device) -> Loss:
        """The loss of a batch, differentiable."""
        ...

    def validate(self, model: CausalModel, tokens: Tokens, device: torch.device) -> Scores:
        """Held-out scores by kind and in `all`; `loss` is one of them."""
        ...


class NextToken:
    """sft and pretrain: cross-entropy of the learned tokens, in nats."""

    def __init__(self, bf16: bool, ranks: Ranks = ALONE) -> None:
        self.bf16, self.ranks = bf16, ranks

    def units(self, batch: Batch) -> NDArray[np.int64]:
        """Learned tokens."""
        return batch.target_samples

    def loss(self, model: CausalModel, batch: Batch, device: torch.device) -> Loss:
        """The sum over learned tokens."""
        return Loss(*batch_loss(model, PackedInput.of(batch, device), self.bf16))

    def validate(self, model: CausalModel, tokens: Tokens, device: torch.device) -> Scores:
        """`loss` in nats a token and `bits_per_byte` of the learned text.

        Bits per byte do not depend on the vocabulary, so they compare models with different tokenizers.
        """
        kinds = [tokens.kind_names[kind] for kind in tokens.kinds]
        batches = self.ranks.share(_watched(tokens))
        found = loss_by_sample(model, batches, len(tokens), device, self.bf16)
        return sum_by_kind(self.ranks.highest(found).cpu(), kinds, tokens.target_bytes.tolist())


class Preference:
    """dpo: −log σ(margin), margin = β · (log-ratio of the chosen answer − that of the rejected one).

    A log-ratio is log p(answer) under the model less that under the reference. `reference` and `held_out` are the
    reference's log-probabilities of the samples of the two splits [N].
    """

    def __init__(
        self, beta: float, reference: Tensor, held_out: Tensor, bf16: bool, ranks: Ranks = ALONE
    ) -> None:
        self.beta, self.reference, self.held_out, self.bf16 = beta, reference, held_out, bf16
        self.ranks = ranks

    def units(self, batch: Batch) -> NDArray[np.int64]:
        """Pairs, by their chosen answers."""
        return np.arange(0, len(batch.sample_ids), 2)

    def loss(self, model: CausalModel, batch: Batch, device: torch.device) -> Loss:
        """The sum over pairs, and sums of `reward_accuracy` and `reward_margin`.

        Its gradient is that of the answers' cross-entropy with the factor β · σ(−margin) for the chosen and the
        opposite for the rejected one. So the head runs twice, and the logits are never there all at once.
        """
        packed = PackedInput.of(batch, device)
        states = learned_states(model, packed, self.bf16)
        with torch.no_grad():
            _, each = linear_cross_entropy(states, model.head, packed.target_ids)
            margins = self._margins(_sample_log_probs(batch, each), batch.sample_ids, self.reference)
            pull = self.beta * torch.sigmoid(-margins)  # one a pair
            weights = torch.stack([pull, -pull], dim=1).flatten()  # one a sample
            weights = weights[on_device(batch.target_samples, device)]
            each = F.softplus(-margins)
        slope, _ = linear_cross_entropy(states, model.head, packed.target_ids, weights)
        return Loss(slope + (each.sum() - slope.detach()), each, _rewards(margins))

    def validate(self, model: CausalModel, tokens: Tokens, device: torch.device) -> Scores:
        """`loss`, `reward_accuracy` and `reward_margin` of the held-out pairs."""
        batches = _watched(tokens, pairs=True)
        log_probs = _log_probs(model, batches, len(tokens), device, self.bf16, self.ranks)
        margins = self._margins(log_probs, list(range(len(tokens))), self.held_out)
        figures = torch.stack([F.softplus(-margins), (margins > 0).float(), margins], dim=1).tolist()
        rows: dict[str, list[list[float]]] = {}
        for kind, row in zip(tokens.kinds[::2], figures, strict=True):
            for name in (tokens.kind_names[kind], "all"):
                rows.setdefault(name, []).append(row)
        names = ("loss", "reward_accuracy", "reward_margin")
        return {
            kind: dict(zip(names, np.mean(found, axis=0).tolist(), strict=True))
            for kind, found in sorted(rows.items())
        }

    def _margins(self, log_probs: Tensor, sample_ids: list[int], reference: Tensor) -> Tensor:
        """Log-probabilities of chosen and rejected answers in turn [2P] → margins [P]."""
        ratios = log_probs - on_device(reference[sample_ids], log_probs.device)
        return self.beta * (ratios[0::2] - ratios[1::2])


def _watched(tokens: Tokens, pairs: bool = False) -> Iterator[Batch]:
    """Every sample once, with progress."""
    return watched(
        in_order(tokens, pairs=pairs), "validate", len(tokens.ids), "tokens", lambda one: len(one.input_ids)
    )


def _rewards(margins: Tensor) -> dict[str, Tensor]:
    return {"reward_accuracy": (margins > 0).float().sum(), "reward_margin": margins.sum()}


def _sample_log_probs(batch: Batch, each: Tensor) -> Tensor:
    """Losses of the learned tokens [M] → log-probability of each sample's learned text [N]."""
    samples = on_device(batch.target_samples, each.device)
    return torch.zeros(len(batch.sample_ids), device=each.device).index_add_(0, samples, -each)


def _log_probs(
    model: CausalModel,
    batches: Iterable[Batch],
    num_samples: int,
    device: torch.device,
    bf16: bool,
    ranks: Ranks,
) -> Tensor:
    """Log-probability of each sample's learned text [N], for the samples of `batches`, shared out among the ranks."""
    found = loss_by_sample(model, ranks.share(batches), num_samples, device, bf16)
    return -ranks.highest(found)[0].float().cpu()


def training_stream(recipe: Recipe, tokens: Tokens, ranks: Ranks = ALONE) -> TrainingStream:
    """A rank's batches; raises `InputError` where the tokens have no pairs and dpo needs them."""
    train = recipe.train
    return TrainingStream(
        tokens,
        train.per_device_train_batch_size,
        train.seed,
        learn_everything=train.objective == "pretrain",
        pack_length=recipe.data.pack_length,
        rank=ranks.dp_rank,
        world_size=ranks.dp,
        pairs=train.objective == "dpo",
    )


def make_objective(
    section: TrainSection,
    model: CausalModel,
    stream: TrainingStream,
    num_batches: int,
    held_out: Tokens,
    cache: Path,
    fingerprint: str,
    bf16: bool,
    ranks: Ranks,
) -> Objective:
    """The objective of a recipe; `model` must still be the untrained base.

    For dpo the reference is asked about the first `num_batches` of `stream` and all of `held_out`. Its answers are kept
    in the file `cache`, for a run that goes on: reading them must give the very bits.
    """
    if section.objective != "dpo":
        return NextToken(bf16, ranks)
    found = _read_reference(cache, fingerprint)
    if ranks.highest(torch.tensor(int(found is None))):  # on any rank
        found = {}
        used = stream.samples_until(num_batches)
        for name, tokens, among in (("train", stream.tokens, used), ("validation", held_out, None)):
            asked = watched(
                in_order(tokens, pairs=True, among=among),
                f"reference {name}",
                len(among or tokens),
                "answers",
                lambda batch: len(batch.sample_ids),
            )
            found[name] = _log_probs(model, asked, len(tokens), ranks.device, bf16, ranks)
        if ranks.main:
            cache.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(cache, save(found, metadata={"fingerprint": fingerprint}))
    assert found is not None
    return Preference(section.dpo_beta, found["train"], found["validation"], bf16, ranks)


def _read_reference(cache: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """What `cache` holds, if it is sound and belongs to this run."""
    try:
        with safe_open(cache, framework="pt") as stored:
            if (stored.metadata() or {}).get("fingerprint") == fingerprint:
                return {name: stored.get_tensor(name) for name in ("train", "validation")}
    except (SafetensorError, OSError):
        pass
    return None
