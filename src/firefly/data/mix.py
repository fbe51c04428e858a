"""How often each candidate is used: caps, weights, epochs and temperature, decided by hashes alone.

A kind with n candidates is used n · weight · epochs times in all; a temperature T above 1 moves the shares from
n · weight towards (n · weight)^(1/T), the total staying what it was. A kind used 2.3 times gives each record two
copies, and three in ten records, chosen by their hash, a third. So nothing depends on the order of the sources.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

_STEP = 1 << 20


def within_cap(chance: NDArray[np.uint64], alive: NDArray[np.bool_], cap: int) -> NDArray[np.bool_]:
    """Which of the living candidates [N] stay when at most `cap` may: those of the lowest chance, then the first."""
    if int(alive.sum()) <= cap:
        return alive
    if cap == 0:
        return np.zeros_like(alive)
    places = np.flatnonzero(alive)
    order = np.argsort(chance[places], kind="stable")
    kept = np.zeros_like(alive)
    kept[places[order[:cap]]] = True
    return kept


def multiplicities(
    counts: Mapping[str, int], weights: Mapping[str, float], epochs: float, temperature: float
) -> dict[str, float]:
    """How often a record of each kind is used, on average; `weights` holds a number for every kind of `counts`."""
    masses = {kind: count * weights[kind] for kind, count in counts.items()}
    flattened = {kind: mass ** (1 / temperature) if mass else 0.0 for kind, mass in masses.items()}
    total, all_flattened = sum(masses.values()), sum(flattened.values())
    if not total:
        return dict.fromkeys(counts, 0.0)
    return {
        kind: epochs * total * flattened[kind] / all_flattened / count if count else 0.0
        for kind, count in counts.items()
    }


def copies(chance: NDArray[np.uint64], multiplicity: float) -> NDArray[np.int64]:
    """How many copies each candidate [N] gets, `multiplicity` on average."""
    whole = int(multiplicity)
    # Scaled down so that the comparison is exact in integers for any share.
    return whole + (chance >> np.uint64(44) < np.uint64(round((multiplicity - whole) * _STEP))).astype(
        np.int64
    )
