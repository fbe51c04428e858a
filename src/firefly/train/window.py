"""The window: what happened since the last metrics row, summed up without waiting for the device.

Losses by kind stay on the device, in float64, until a row or a checkpoint is due; what the host knows is summed
there. An open window goes through a checkpoint as JSON, so a resumed run writes the same rows.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firefly.data.loader import Batch
from firefly.data.tokens import Tokens
from firefly.model.packed import on_device
from firefly.train.parallel import Ranks


class Window:
    """Sums over steps. K kinds of samples, U units that the loss is a sum over: learned tokens, or pairs."""

    def __init__(
        self,
        stored: dict[str, Any],
        data: Tokens,
        ranks: Ranks,
        slots_per_batch: int | None = None,
    ) -> None:
        """Go on with the window that a checkpoint `stored`, or begin (`{}`).

        `slots_per_batch` is how many tokens a full batch of packed rows would hold; None: a batch has no padding.
        """
        self.data, self.ranks, self.slots_per_batch = data, ranks, slots_per_batch
        self.device = ranks.device
        self._kinds = torch.arange(len(data.kind_names), device=self.device)[:, None]  # K 1
        self._open(stored if ranks.main else {})  # sums over all ranks: one goes on with them

    def _open(self, stored: dict[str, Any]) -> None:
        zeros = [0] * len(self.data.kind_names)
        self._loss, self._norm = stored.get("loss", 0.0), stored.get("grad_norm", 0.0)
        self._losses = torch.tensor(stored.get("losses", zeros), dtype=torch.float64, device=self.device)  # K
        self._others = {
            name: torch.tensor(value, dtype=torch.float64, device=self.device)
            for name, value in stored.get("others", {}).items()
        }
        self._units = np.asarray(stored.get("units", zeros), np.int64)  # K
        self._targets = stored.get("targets", 0)
        self._tokens, self._slots = stored.get("tokens", 0), stored.get("slots", 0)
        self._seconds = stored.get("seconds", 0.0)

    def add_batch(
        self, batch: Batch, units: NDArray[np.int64], losses: Tensor, others: dict[str, Tensor]
    ) -> None:
        """Count one micro-batch: the loss of each unit [U], by the unit's place in the batch, and other sums."""
        kinds = self.data.kinds[batch.sample_ids][units].astype(np.int64)  # U
        self._units += np.bincount(kinds, minlength=len(self._units))
        self._targets += len(batch.target_ids)
        self._tokens += len(batch.input_ids)
        self._slots += self.slots_per_batch or len(batch.input_ids)
        # Not bincount or index_add: on CUDA the one waits for the device, the other adds in any order.
        self._losses += torch.where(
            self._kinds == on_device(kinds, self.device), losses.detach().double(), 0.0
        ).sum(1)
        for name, value in others.items():
            self._others[name] = self._others.get(name, 0.0) + value.detach().double()

    def add_step(self, loss: float, norm: float, seconds: float) -> None:
        """Count one finished step: the sum of its losses, its gradient norm, and how long it took."""
        self._loss += loss
        self._norm = norm
        self._seconds += seconds

    def state(self) -> dict[str, Any]:
        """The open window of all ranks as JSON values; every rank must ask. On CUDA this waits for the device."""
        counts = torch.tensor([*self._units, self._targets, self._tokens, self._slots])
        *units, targets, tokens, slots = self.ranks.sum(counts).tolist()
        names = sorted(self._others)
        sums = torch.cat([self._losses, *(self._others[name].reshape(1) for name in names)])
        summed = self.ranks.sum(sums).tolist()
        return {
            "loss": self._loss,
            "losses": summed[: len(units)],
            "grad_norm": self._norm,
            "others": dict(zip(names, summed[len(units) :], strict=True)),
            "units": units,
            "targets": targets,
            "tokens": tokens,
            "slots": slots,
            "seconds": self._seconds,
        }

    def close(self) -> tuple[dict[str, Any], float]:
        """The row of a window and the seconds its steps took; the next window is open then."""
        asked_s = time.monotonic()
        sums = self.state()
        seconds = self._seconds + time.monotonic() - asked_s  # the wait for steps that were still under way
        self._open({})
        by_kind = zip(self.data.kind_names, sums["losses"], sums["units"], strict=True)
        num_units = sum(sums["units"])
        row = {
            "loss": sums["loss"] / num_units,
            **{name: value / num_units for name, value in sums["others"].items()},
            "loss_by_kind": {name: loss / count for name, loss, count in by_kind if count},
            "grad_norm": sums["grad_norm"],
            "target_tokens": sums["targets"],
            "tokens": sums["tokens"],
            "padding_share": round(1 - sums["tokens"] / sums["slots"], 4),
        }
        return row, seconds
