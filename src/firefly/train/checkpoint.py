"""Checkpoints: all or nothing, hashed, enough to go on bit for bit, and the same for one process as for many.

    checkpoint-N/model.safetensors      weights as they are trained, by transformers' names
    checkpoint-N/optimizer.safetensors  the optimizer's moments and step counts, by the same names
    checkpoint-N/state.json             step, random states, the open metrics window, what data it belongs to
    checkpoint-N/manifest.json          SHA-256 of every file above, and of itself

A checkpoint is built under a temporary name, fsynced, hashed and renamed; only then is an older one removed. One
that was damaged since is found by its hashes and set aside, and the run goes on from the one before. The writing goes
on beside the training, which waits only until the tensors are copied to main memory (or, where that is short or is the
training's own, until all is written).

Several processes write a share of the tensors each (model-00002-of-00008.safetensors), but every tensor whole. So no
file tells how parameters were shared out; any number of processes goes on from it, each cutting out its own parts; and
a model directory is made of it without any process holding the model. PyTorch's own distributed checkpoints spare the
gathering, which sends the weights around once more. They are pickles, or safetensors of parts that only torch puts
together, and know no hashes: all of what is below would still be needed.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from firefly.console import warn
from firefly.errors import CheckpointError, DiskFullError
from firefly.files import (
    directory_atomic,
    fsync,
    partial_name,
    require_disk,
    sha256_file,
    sha256_json,
    write_atomic,
    write_json,
    writing_to,
)
from firefly.train.gpus import free_memory_bytes
from firefly.train.parallel import Parts, Ranks

Outcome = TypeVar("Outcome")


@dataclass
class TrainState:
    """Everything besides tensors that the next step depends on."""

    step: int = 0
    fingerprint: str = ""
    window: dict[str, Any] = field(default_factory=dict)
    trained_tokens: int = 0
    elapsed_s: float = 0.0
    num_threads: int = 0


def find_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run directory, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def newest_sound(run: Path) -> Path | None:
    """The newest checkpoint that is what was written, or None where there is no checkpoint.

    Damaged ones that are newer get `.damaged` behind their name, with a word. Raises `CheckpointError` when none
    is sound, and then touches nothing: starting anew must be the user's choice.
    """
    found = find_checkpoints(run)
    damaged: list[tuple[Path, CheckpointError]] = []
    for path in reversed(found):
        try:
            verify(path)
        except CheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, reason in damaged:
            aside = bad.with_name(f"{bad.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            with writing_to(aside):
                bad.rename(aside)
            warn(f"{reason} It is set aside as {aside.name}; going on from {path.name}.")
        return path
    if damaged:
        raise CheckpointError(
            f"{damaged[0][1]} No older checkpoint is sound; delete {run} to begin again from the start."
        )
    return None


COPIES_FROM = {"cuda"}
"""Devices whose tensors are copied and written beside the training. On a CPU a copy would take the training's memory,
and the writing its cores."""


class Checkpoints:
    """Writes a run's checkpoints, one at a time. Every process has one of these and saves at the same steps.

    Leaving its block waits until the last checkpoint is on the disk.
    """

    def __init__(self, run: Path, parts: Parts, optimizer: torch.optim.Optimizer, keep: int) -> None:
        self.run, self.parts, self.optimizer, self.keep = run, parts, optimizer, keep
        several = parts.ranks.world_size > 1
        # The writers talk to each other beside the training, so in a group of their own.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=1)) if several else None
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.finish()
        elif self._writer is not None:
            self._writer.join(60.0)  # not for ever: another process may be gone

    @property
    def failed(self) -> bool:
        """Whether the checkpoint under way has failed, so that `finish` raises."""
        return self._failure is not None

    def save(self, state: TrainState) -> Path:
        """Begin to write checkpoint-`state.step`; when it is there, all but the newest `keep` are removed.

        Raises `DiskFullError` when there is no room for it, and whatever went wrong with the one before.
        """
        self.finish()
        ranks, target = self.parts.ranks, self.run / f"checkpoint-{state.step}"
        shares = _share_out(self.parts, self.optimizer)
        self._require_disk(sum(num_bytes for _, num_bytes in shares.values()))
        mine = sum(num_bytes for owner, num_bytes in shares.values() if owner == ranks.rank)
        all_here = mine * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        beside = ranks.device.type in COPIES_FROM and all_here < free_memory_bytes() / 2
        files: dict[str, dict[str, Tensor]] = {_file(kind, ranks): {} for kind in ("model", "optimizer")}
        for kind, key, name, value in _tensors(self.parts, self.optimizer):
            whole = value if "@" in key else self.parts.gather(name, value)
            if shares[key][0] == ranks.rank:
                files[_file(kind, ranks)][key] = whole.to("cpu", copy=beside).contiguous()
        self._writer = threading.Thread(
            target=self._write, args=(target, files, asdict(state), _random_state()), daemon=True
        )
        self._writer.start()
        if not beside:
            self.finish()
        return target

    def finish(self) -> None:
        """Wait until the checkpoint under way is on the disk; raises what went wrong with it."""
        if self._writer is not None:
            self._writer.join()
        self._writer, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _require_disk(self, num_bytes: int) -> None:
        """`require_disk`, with the same answer for all processes."""
        full: DiskFullError | None = None
        try:
            require_disk(self.run, num_bytes + (1 << 20))
        except DiskFullError as error:
            full = error
        if self.parts.ranks.highest(torch.tensor(int(full is not None))):
            raise full or DiskFullError(
                f"Another process found the disk of {self.run} full; free some space."
            )

    def _write(
        self,
        target: Path,
        files: dict[str, dict[str, Tensor]],
        record: dict[str, Any],
        random: dict[str, str],
    ) -> None:
        """The writer: this process's files, and in the main one all that makes a checkpoint of everybody's."""
        ranks, place = self.parts.ranks, partial_name(target)
        building = ExitStack()

        def begin() -> None:
            if ranks.main:
                building.enter_context(directory_atomic(target))

        def write_files() -> dict[str, str]:
            with writing_to(target):
                for name, tensors in files.items():
                    save_file(tensors, place / name, metadata={"format": "pt"})
                    fsync(place / name)
                return {name: sha256_file(place / name) for name in files}

        def conclude() -> None:
            if ranks.main:
                layout = {"processes": ranks.world_size, "tp": ranks.tp, "random": random}
                write_json(place / "state.json", record | layout)
                digests = {name: digest for part in written for name, digest in part.items()}
                digests["state.json"] = sha256_file(place / "state.json")
                write_atomic(place / "manifest.json", _manifest(digests))
                building.close()
                for old in find_checkpoints(self.run)[: -self.keep]:
                    shutil.rmtree(old)

        try:
            with building:
                self._everywhere(begin)
                written = self._everywhere(write_files)
                self._everywhere(conclude)
        except BaseException as error:
            self._failure = error

    def _everywhere(self, work: Callable[[], Outcome]) -> list[Outcome]:
        """Do `work` in all processes; returns what it gave in each, or raises in all what it raised in one."""
        outcome: Any
        try:
            outcome = work()
        except Exception as error:
            outcome = error
        outcomes = [outcome] * self.parts.ranks.world_size
        if self._group is not None:
            dist.all_gather_object(outcomes, outcome, self._group)
        for one in outcomes:
            if isinstance(one, Exception):
                raise one
        return outcomes


def load_checkpoint(
    path: Path, parts: Parts, optimizer: torch.optim.Optimizer, fingerprint: str
) -> TrainState:
    """Put weights, moments and random state back in place; returns the rest.

    The random state goes on for as many processes; for another number it is a new one, given by run and step (and
    several processes begin every step with one of its own: `Ranks.reseed`). Raises `CheckpointError` when the
    checkpoint belongs to another recipe or data. It must be sound (`verify`).
    """
    stored = json.loads((path / "state.json").read_text(encoding="utf-8"))
    try:
        random, processes, tp = (stored.pop(name) for name in ("random", "processes", "tp"))
        state = TrainState(**stored)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} was written by another version of Firefly; choose another output_dir."
        ) from error
    if state.fingerprint != fingerprint:
        raise CheckpointError(
            f"{path} belongs to a run with another recipe, base model or data, so going on would mix the two; "
            "choose another output_dir, undo the change, or delete the checkpoints of that run."
        )
    weights = stored_tensors(path, "model")
    if set(weights) != set(parts.local):
        raise CheckpointError(f"{path} holds the weights of another model; choose another output_dir.")
    ranks = parts.ranks
    same_layout = (processes, tp) == (ranks.world_size, ranks.tp)
    for name in parts.local:
        parts.put(name, parts.cut(name, weights[name]))
    for key, value in stored_tensors(path, "optimizer").items():
        name, _, rest = key.rpartition("/")
        moment, _, owner = rest.partition("@")
        in_blocks = (
            value.numel() > 1 and value.shape != weights[name].shape
        )  # scales of a parameter that was whole
        if (owner or in_blocks) and not same_layout:
            raise CheckpointError(
                f"{path} holds 8-bit moments, which stay as they were shared out; go on with {processes} "
                f"process{'es' if processes > 1 else ''} and the same parallel section."
            )
        if not owner or int(owner) == ranks.rank:
            part = parts.local[name]
            # AdamW's fused kernel wants its step count beside the weights; the moments go there too.
            own = value if owner else parts.cut(name, value)
            optimizer.state[part][moment] = own.to(part.device, copy=True)
    if same_layout:
        _restore_random_state(random)
    else:
        torch.manual_seed(int(sha256_json([fingerprint, state.step])[:15], 16))
    return state


def stored_tensors(path: Path, kind: str) -> dict[str, Tensor]:
    """The "model" or "optimizer" tensors of a checkpoint by name, mapped from its files: read when they are used."""
    files = sorted(path.glob(f"{kind}*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def verify(path: Path) -> None:
    """Check a checkpoint's files against its manifest; raises `CheckpointError` naming the damaged one."""
    try:
        text = (path / "manifest.json").read_bytes()
        manifest = json.loads(text)
        digests = {name: digest for name, digest in manifest.items() if name != "manifest"}
        whole = text == _manifest(digests).encode()
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path / 'manifest.json'} is missing or damaged.") from error
    if not whole or "state.json" not in digests:
        raise CheckpointError(f"{path / 'manifest.json'} is damaged.")
    for name, digest in digests.items():
        if not (path / name).is_file() or sha256_file(path / name) != digest:
            raise CheckpointError(f"{path / name} is damaged (its SHA-256 differs from the manifest's).")


def _manifest(digests: dict[str, str]) -> str:
    """The manifest's text; it has a checksum of its own, so that damage to it is not taken for another file's."""
    return json.dumps(digests | {"manifest": sha256_json(digests)}, indent=2) + "\n"


def _tensors(parts: Parts, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str, str, Tensor]]:
    """(kind of file, key in it, parameter, this process's part) of all that a checkpoint holds.

    A key with @ and a rank is what cannot be put together: 8-bit moments, whose scales are those of a part's blocks.
    """
    for name, part in parts.local.items():
        yield "model", name, name, part.detach()
        moments: dict[str, Tensor] = optimizer.state.get(part, {})
        alone = part.shape != parts.whole[name].shape and any(
            moment.numel() > 1 and moment.shape != part.shape for moment in moments.values()
        )
        for key, moment in moments.items():
            mark = f"@{parts.ranks.rank}" if alone else ""
            yield "optimizer", f"{name}/{key}{mark}", name, moment.detach()


def _share_out(parts: Parts, optimizer: torch.optim.Optimizer) -> dict[str, tuple[int, int]]:
    """Which process writes a tensor, and its bytes, by its key: each in turn to the one with the least so far."""
    loads = [0] * parts.ranks.world_size
    shares = {}
    for _, key, name, value in _tensors(parts, optimizer):
        whole = parts.whole[name] if value.shape == parts.local[name].shape else value
        num_bytes = whole.numel() * value.element_size()
        if "@" in key:  # each process has such a key of its own, and all must come to the same shares
            shares[key] = parts.ranks.rank, num_bytes
            continue
        owner = loads.index(min(loads))
        loads[owner] += num_bytes
        shares[key] = owner, num_bytes
    return shares


def _file(kind: str, ranks: Ranks) -> str:
    several = f"-{ranks.rank + 1:05}-of-{ranks.world_size:05}" if ranks.world_size > 1 else ""
    return f"{kind}{several}.safetensors"


def _random_state() -> dict[str, str]:
    random = {"cpu": _text(torch.get_rng_state())}
    if torch.cuda.is_available():
        random["cuda"] = _text(torch.cuda.get_rng_state())
    return random


def _restore_random_state(random: dict[str, str]) -> None:
    torch.set_rng_state(_tensor(random["cpu"]))
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(_tensor(random["cuda"]))


def _text(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode("ascii")


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
