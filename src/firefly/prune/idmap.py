"""Which original token each id of a pruned model stands for: as prune.json records it, or as the token strings tell."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from firefly.errors import ModelError
from firefly.files import sha256_file
from firefly.prune.prune import parse_id_ranges
from firefly.prune.tokenizer import MOST_IDS, read, read_json, vocabulary

RECORD = "prune.json"


def find_id_map(base: Path, pruned: Path) -> NDArray[np.int64]:
    """Old id of each new id [K]: from `pruned`/prune.json, else (other tools write none) by equal token strings.

    Raises `ModelError` when `pruned` was not made from `base`.
    """
    return (recorded_id_map if (pruned / RECORD).is_file() else derived_id_map)(base, pruned)


def recorded_id_map(base: Path, pruned: Path) -> NDArray[np.int64]:
    """The map of prune.json, whose hash of the original's tokenizer.json must be that of `base`."""
    record = read_json(pruned / RECORD)
    try:
        made_from = record["source_sha256"]["tokenizer"]
        if any(int(number) >= MOST_IDS for number in re.findall(r"\d+", record["new_to_old"])):
            raise ValueError("an id beyond every real vocabulary")  # or a range of terabytes
        new_to_old = parse_id_ranges(record["new_to_old"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(
            f"{pruned / RECORD} is damaged ({error!r}); prune the model again, or delete the file to have the ids "
            "told by the token strings."
        ) from error
    if made_from != sha256_file(base / "tokenizer.json"):
        raise ModelError(
            f"{pruned} was not pruned from {base}: prune.json has another hash of tokenizer.json ({made_from[:12]}); "
            "give the model that it was pruned from."
        )
    highest = max(vocabulary(read(base / "tokenizer.json")).values())
    if len(set(new_to_old.tolist())) < len(new_to_old) or new_to_old.max() > highest:
        raise ModelError(
            f"{pruned / RECORD} is damaged (its new_to_old is no map of ids); prune the model again."
        )
    return new_to_old


def derived_id_map(base: Path, pruned: Path) -> NDArray[np.int64]:
    """The map by token strings, for directories made by other tools."""
    old, new = (vocabulary(read(place / "tokenizer.json")) for place in (base, pruned))
    tokens = sorted(new, key=new.__getitem__)
    if [new[token] for token in tokens] != list(range(len(tokens))):
        raise ModelError(f"{pruned}/tokenizer.json has gaps between its ids; it is not a pruned tokenizer.")
    if missing := [token for token in tokens if token not in old]:
        raise ModelError(
            f"{pruned}/tokenizer.json has {len(missing):,} tokens that {base} lacks, such as {missing[0]!r}; give the "
            "model that it was pruned from."
        )
    return np.array([old[token] for token in tokens], dtype=np.int64)
