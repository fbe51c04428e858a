"""`verify`: a pruned directory proven again, whoever made it; every check runs, and nothing is written.

Firefly's own directories are held to everything that pruning proved. One without prune.json, such as
LLMPruner's, need not be laid out as Firefly does it: its ids are told by the token strings, its configs are
compared as transformers understands them, and its tensors by their place in the model, wherever they are
stored. A tied head that is stored beside the embeddings is accepted when the two are equal, and told.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.errors import FireflyError, ModelError, ProofError
from firefly.model.hub import quiet_transformers
from firefly.prune.companions import CONFIGS
from firefly.prune.counting import corpus_texts
from firefly.prune.idmap import RECORD, find_id_map
from firefly.prune.layout import find_layout, inspect_architecture, load_config, match
from firefly.prune.logits import prove_logits
from firefly.prune.proof import AUTO_TEXTS, PROBES, made_up_texts, prove_stages, prove_texts, prove_tokens
from firefly.prune.proof_weights import (
    compare_all,
    compare_rows,
    failed,
    prove_config,
    prove_configs,
    prove_opening,
    prove_weights,
)
from firefly.prune.tokenizer import load, read, read_json
from firefly.prune.weights import Tensor, read_header, shards

_TOKENIZER_CHECKS = ("record", "tokenizer", "kept tokens", "texts", "opening")
_MODEL_CHECKS = ("configs", "weights", "logits")
_MADE_UP_TEXTS = 5000
# What reading a file of an unforeseen shape raises; a directory to be verified may hold anything.
_DAMAGE = (AttributeError, LookupError, TypeError, ValueError, OSError)
# What a config says of the program that wrote it, and of the size, which is compared with the rows.
_BOOKKEEPING = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "vocab_size",
}

Status = Literal["passed", "failed", "skipped"]


@dataclass(frozen=True)
class Check:
    """One claim about a pruned directory."""

    name: str
    status: Status
    detail: str


@dataclass(frozen=True)
class VerifyResult:
    """What holds of a pruned directory and what does not."""

    model: str  # the original
    pruned: str
    checks: list[Check]

    @property
    def failed(self) -> list[str]:
        """The names of the checks that failed."""
        return [check.name for check in self.checks if check.status == "failed"]


def verify(base: Path, pruned: Path, *, corpus: Iterable[Path] = (), logits: bool = True) -> VerifyResult:
    """Prove that `pruned` is the model `base` with fewer tokens; a check that fails does not stop the others.

    Args:
        corpus: files or folders whose documents must keep their tokens where these lie in K.
        logits: also run both models in float32.

    Raises `ModelError` when one of the two is no model directory at all.
    """
    for place in (base, pruned):
        if not place.is_dir():
            raise ModelError(f"The model directory {place} does not exist; check the path.")
    own = (pruned / RECORD).is_file()
    report = _Report()
    found: list[NDArray[np.int64]] = []

    def id_map() -> str:
        found.append(find_id_map(base, pruned))
        return f"{len(found[0]):,} tokens, told by {RECORD if own else 'the token strings'}"

    @functools.cache
    def tokenizers() -> tuple[Tokenizer, Tokenizer]:
        return load(base / "tokenizer.json"), load(pruned / "tokenizer.json")

    report.check("id map", id_map)
    if not found:
        report.skip("without the id map there is nothing to compare", *_TOKENIZER_CHECKS, *_MODEL_CHECKS)
        return VerifyResult(str(base), str(pruned), report.checks)
    (new_to_old,) = found

    if own:
        report.check("record", lambda: _prove_record(pruned, new_to_old))
    else:
        report.skip(f"no {RECORD}: another program made it", "record")
    report.check("tokenizer", lambda: _prove_stages(base, pruned, new_to_old))
    report.check("kept tokens", lambda: _prove_tokens(*tokenizers(), new_to_old))
    report.check("texts", lambda: _prove_texts(*tokenizers(), new_to_old, corpus))
    if (base / "tokenizer_config.json").is_file():
        sample = list(PROBES) + list(islice(corpus_texts(corpus), AUTO_TEXTS))
        report.check("opening", lambda: _prove_opening(base, pruned, new_to_old, sample))
    else:
        report.skip(
            "without tokenizer_config.json, transformers cannot tell the tokenizer's class", "opening"
        )

    if own and not read_json(pruned / RECORD).get("bytes_after"):
        report.skip("pruned with --tokenizer-only", *_MODEL_CHECKS)
        return VerifyResult(str(base), str(pruned), report.checks)
    report.check("configs", lambda: (_own_configs if own else _foreign_configs)(base, pruned, new_to_old))
    report.check("weights", lambda: (_own_weights if own else _foreign_weights)(base, pruned, new_to_old))
    if not logits:
        report.skip("left out, as asked", "logits")
    elif report.checks[-1].status == "failed":
        report.skip("with other weights they are others", "logits")
    else:
        report.check("logits", lambda: str(prove_logits(base, pruned, new_to_old)["logits"]))
    return VerifyResult(str(base), str(pruned), report.checks)


class _Report:
    """Checks as they are run; whatever one raises is its failure."""

    def __init__(self) -> None:
        self.checks: list[Check] = []

    def check(self, name: str, claim: Callable[[], str]) -> None:
        """Run one check; `claim` returns what holds, or raises."""
        try:
            self.checks.append(Check(name, "passed", claim()))
        except FireflyError as error:
            what = error.what if isinstance(error, ProofError) and error.what else str(error)
            self.checks.append(Check(name, "failed", what))
        except _DAMAGE as error:
            what = f"a file is damaged or of an unknown shape ({error!r})"
            self.checks.append(Check(name, "failed", what))

    def skip(self, why: str, *names: str) -> None:
        """Tell that checks were not run."""
        self.checks += [Check(name, "skipped", why) for name in names]


def _prove_record(pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    """What prune.json says of the directory is what lies there."""
    record = read_json(pruned / RECORD)
    if record.get("vocab_after") != len(new_to_old):
        raise failed(f"prune.json says {record.get('vocab_after')} tokens, and maps {len(new_to_old)}")
    recorded = record.get("bytes_after")
    if recorded and recorded != (size := sum(path.stat().st_size for path in shards(pruned))):
        raise failed(f"prune.json says {recorded:,} bytes of weights, and there are {size:,}")
    return "prune.json agrees with the files"


def _prove_stages(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    prove_stages(read(base / "tokenizer.json"), read(pruned / "tokenizer.json"), new_to_old)
    return "ids, merges or scores, and every stage are the original's"


def _prove_tokens(original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64]) -> str:
    proven = prove_tokens(original, pruned, new_to_old)
    return f"{proven['tokens_rederived']:,} of {proven['tokens_kept']:,} derived again, the others only by lookup"


def _prove_texts(
    original: Tokenizer, pruned: Tokenizer, new_to_old: NDArray[np.int64], corpus: Iterable[Path]
) -> str:
    made_up = made_up_texts(original, new_to_old, _MADE_UP_TEXTS)
    texts = sum(
        prove_texts(original, pruned, new_to_old, source)["documents_checked"]
        for source in (made_up, chain(PROBES, corpus_texts(corpus)))
    )
    return f"{texts:,} texts keep their tokens inside the vocabulary, and round-trip outside"


def _prove_opening(base: Path, pruned: Path, new_to_old: NDArray[np.int64], texts: list[str]) -> str:
    prove_opening(base, pruned, new_to_old, texts)
    return "AutoTokenizer opens it and reads as tokenizer.json does"


def _own_configs(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    return f"{prove_configs(base, pruned, new_to_old)['config_ids']} ids follow, all else is as it was"


def _foreign_configs(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    """Defaults filled in and bookkeeping left out, the configs differ in size and ids alone."""
    with quiet_transformers():
        configs = [load_config(place) for place in (base, pruned)]
    if (size := configs[1].get_text_config().vocab_size) != len(new_to_old):
        raise failed(f"config.json: vocab_size is {size}, not {len(new_to_old)}")
    old, new = (_plain(json.loads(config.to_json_string(use_diff=False))) for config in configs)
    num_ids = prove_config("config.json", old, new, new_to_old, sized=False)
    for name in CONFIGS[1:]:  # transformers writes it anew on saving, with what the config says
        if (base / name).is_file() and (pruned / name).is_file():
            old, new = (_plain(read_json(place / name)) for place in (base, pruned))
            common = sorted(old.keys() & new.keys())
            old, new = ({key: one[key] for key in common} for one in (old, new))
            num_ids += prove_config(name, old, new, new_to_old, sized=False)
    return f"{num_ids} ids follow, all else is as it was"


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _plain(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _BOOKKEEPING
    }


def _own_weights(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    names = find_layout(base, shards(base)).names
    proven = prove_weights(base, pruned, new_to_old, names)
    return (
        f"{proven['tensors_row_selected']} tensors row by row, {proven['tensors_identical']} byte for byte the "
        "original's"
    )


def _foreign_weights(base: Path, pruned: Path, new_to_old: NDArray[np.int64]) -> str:
    """Tensors compared by their names in the model: file names, shards and prefixes may be others."""
    model = inspect_architecture(base)
    where: list[dict[str, Path]] = []
    stored: list[dict[str, Tensor]] = []
    for place, architecture in ((base, model), (pruned, inspect_architecture(pruned))):
        headers = {path: read_header(path)[0] for path in shards(place)}
        where.append({name: path for path, tensors in headers.items() for name in tensors})
        every = [tensor for tensors in headers.values() for tensor in tensors.values()]
        stored.append(match(place, architecture, every))
    old, new = stored
    # A tied matrix may be stored under any of its names, or under several.
    of_group = {model.vocabulary[name]: tensor for name, tensor in old.items() if name in model.vocabulary}
    held = {model.vocabulary[name] for name in new if name in model.vocabulary}
    if lost := sorted(name for name in old if name not in new and model.vocabulary.get(name) not in held):
        raise failed(f"there are no weights for {lost[0]}")
    for name, after in new.items():
        group = model.vocabulary.get(name)
        before = old.get(name) or (None if group is None else of_group.get(group))
        if before is None:
            raise failed(f"{after.name} is no tensor of the original")
        expected = before if group is None else before.with_rows(len(new_to_old))
        if (after.dtype, after.shape) != (before.dtype, expected.shape):
            raise failed(
                f"{after.name} is {after.dtype} {list(after.shape)}, not {before.dtype} {list(expected.shape)}"
            )
        with (
            where[0][before.name].open("rb", buffering=0) as source,
            where[1][after.name].open("rb", buffering=0) as target,
        ):
            if group is None:
                compare_all(source, target, before, after)
            else:
                compare_rows(source, target, before, after, new_to_old)
    twice = sum(name in model.vocabulary for name in new) > sum(name in model.vocabulary for name in old)
    note = "; the head is stored twice, equal to the embeddings it is tied to" if twice else ""
    return f"{len(new)} tensors are the original's{note}"
