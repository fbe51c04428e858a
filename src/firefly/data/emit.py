"""The last pass over one block of candidates: write each that stays, in as many wordings as it has copies.

This too runs in worker processes: `emit(Chosen) → Emitted`. A record that a task asks gets another template for
every copy; a whole example is written as often as it has copies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.data.clean import mended
from firefly.data.example import Example, Message
from firefly.data.tasks import task
from firefly.recipe import CleanSection

NOT_USED, TRAIN, VALIDATION = 0, 1, 2  # sides of the split


@dataclass(frozen=True, slots=True)
class Chosen:
    """A block of candidates [N] and what was decided about them."""

    bodies: list[bytes]
    kinds: list[str]  # N
    sources: list[str]  # N, "file:line"
    reasons: list[str]  # N, "" for those that stay
    duplicate_of: list[str]  # N, "file:line" of the one that stays instead
    sides: NDArray[np.uint8]  # N
    copies: NDArray[np.int64]  # N
    clean: CleanSection


@dataclass(frozen=True, slots=True)
class Emitted:
    """Lines for the three files of a dataset."""

    train: bytes
    validation: bytes
    rejects: bytes
    num_candidates: int


def emit(chosen: Chosen) -> Emitted:
    """The lines of a block, in its order."""
    out: dict[int, list[bytes]] = {TRAIN: [], VALIDATION: [], NOT_USED: []}
    rows = zip(
        chosen.bodies, chosen.kinds, chosen.sources, chosen.reasons, chosen.duplicate_of,
        chosen.sides.tolist(), chosen.copies.tolist(), strict=True,
    )  # fmt: skip
    for line, kind, source, reason, duplicate_of, side, copies in rows:
        if reason:
            record = _reject(json.loads(line), kind, source, reason, duplicate_of, chosen.clean)
            out[NOT_USED].append(_line(json.dumps(record, ensure_ascii=False)))
        elif copies:
            body = json.loads(line)
            for variant in range(copies):
                out[side].append(_line(_example(body, kind, source, variant, chosen.clean).to_json()))
    train, validation, rejects = (b"".join(out[side]) for side in (TRAIN, VALIDATION, NOT_USED))
    return Emitted(train, validation, rejects, len(chosen.bodies))


def _example(body: dict[str, Any], kind: str, source: str, variant: int, options: CleanSection) -> Example:
    if "fields" in body:
        among = body.get("directions", ())
        asked = task(kind).render(body["fields"], source=source, variant=variant, among=among)
        return mended(asked, options)
    messages = tuple(Message(role, content) for role, content in body["messages"])
    return Example(kind, messages, source, body.get("rejected"))


def _reject(
    body: dict[str, Any], kind: str, source: str, reason: str, duplicate_of: str, options: CleanSection
) -> dict[str, str]:
    """What a person needs to see of a candidate that was dropped."""
    if "text" in body:
        text = str(body["text"])
    else:
        example = _example(body, kind, source, 0, options)
        text = f"{example.input}\n{example.target}" if example.input else example.target
    record = {"source": source, "kind": kind, "reason": reason, "text": text}
    if duplicate_of:
        record["duplicate_of"] = duplicate_of
    if "note" in body:
        record["note"] = body["note"]
    return record


def _line(text: str) -> bytes:
    return text.encode("utf-8") + b"\n"
