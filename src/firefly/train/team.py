"""The processes of one run, its ranks, as a team: they start alike, watch over each other, and end together.

torchrun (or Slurm, or `firefly train --gpus`) starts the same command once for every rank and tells each one, in its
environment, who it is. What they say to each other here goes through torch's key-value store and not through
collective operations, for these wait wherever the training waits:

    start/R      what rank R was started with; rank 0 compares, and answers in `start`
    alive/R      a count that goes on every second, how often something advanced, and where the rank is
    failure      the first error, and whose; every other rank ends because of it, and rank 0 says it

So a run ends within `DEAD_AFTER_S` when a rank dies, and within `parallel.hang_timeout_s` when one no longer advances,
whatever the others are doing. A process that is alone is the one rank of its run, and all this costs it nothing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from firefly import console
from firefly.errors import FireflyError, Interrupted, LaunchError

DEAD_AFTER_S = 30.0
"""A rank whose count stands still for so long has died, or its machine has."""

_TICK_S = 1.0
_ECHO_S = 6.0  # when contact broke, the dead rank is the one that is silent for so long
_LEAVE_S = 60.0
_LAST_WORDS_S = 5.0
_GO_ON = "run the same command to go on from the last checkpoint"
_BEGINS = "--- rank "


class Team:
    """The processes of a run, as this one sees them."""

    rank = 0
    world_size = 1

    def same(self, what: str, facts: dict[str, Any], cure: str, timeout_s: float = math.inf) -> None:
        """Wait until every rank came here, at most so long; raises `LaunchError` unless all have the same `facts`."""

    def say(self, word: str) -> None:
        """Rank 0's word to the others."""

    def hear(self) -> str:
        """Wait for rank 0's next word, however long its work takes."""
        raise AssertionError("rank 0 does not listen")

    def log_to(self, folder: Path, aloud: bool) -> None:
        """From now on this rank's messages go to `folder`; only rank 0's also to the terminal, unless `aloud`."""

    @contextlib.contextmanager
    def watching(self, timeout_s: float) -> Iterator[None]:  # noqa: ARG002 - alone, nobody waits
        """While the block runs, no progress bar of this rank may stand still for longer than `timeout_s`."""
        yield


ALONE = Team()
"""A process that is the only one of its run."""


@contextlib.contextmanager
def joined() -> Iterator[Team]:
    """Be one of the ranks of a run, as the environment says, or the only one.

    An error that leaves the block ends all of them. Raises `LaunchError` when they do not find each other.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    team = _Several()
    try:
        yield team
    except (Interrupted, KeyboardInterrupt, SystemExit):
        team.leave()
        raise
    except BaseException as error:
        team.failed(error)
        raise
    else:
        team.leave()


class _Several(Team):
    def __init__(self, timeout_s: float = 300.0) -> None:
        self.rank, self.world_size, host, port = _environment()
        distributed: Any = import_module("torch.distributed")
        # torchrun has the store, or else rank 0
        self._serves = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"

        def connection(server: bool) -> Any:
            store = distributed.TCPStore(
                host,
                port,
                is_master=server,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
            return distributed.PrefixStore(f"firefly/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)

        try:
            self._store = connection(server=self._serves)
            self._watchers_store = connection(server=False)
        except RuntimeError as error:
            if self._serves:
                raise LaunchError(
                    f"Rank 0 cannot listen on port {port} ({str(error).splitlines()[0]}); another run may use it: "
                    "choose another MASTER_PORT, or end that run."
                ) from error
            raise LaunchError(
                f"Rank {self.rank} of {self.world_size} found no rank 0 at {host}:{port} within {timeout_s:.0f} s; "
                "check that all were started, with the same MASTER_ADDR and MASTER_PORT, and that the port is open."
            ) from error
        if self._store.add(f"number/{self.rank}", 1) > 1:
            twice = f"Two processes say that they are rank {self.rank} of {self.world_size}; give each its own RANK."
            raise LaunchError(self._claim(self._store, twice))
        self._log: IO[str] | None = None
        self._logs = Path()
        self._terminal: int | None = None  # where stderr went before the log had it
        self._words = 0
        self._together = False  # every rank was here at least once
        self._dead_after_s = DEAD_AFTER_S
        self._advances, self._advanced_s, self._patience_s = 0, 0.0, math.inf
        self._ending = threading.Lock()
        self._left = threading.Event()
        threading.Thread(target=self._watch, name="firefly-team", daemon=True).start()

    def same(self, what: str, facts: dict[str, Any], cure: str, timeout_s: float = math.inf) -> None:
        store = self._store
        store.set(f"{what}/{self.rank}", json.dumps([self.world_size, facts]))
        if self.rank:
            while not store.check([what]):  # rank 0 answers, or the watcher ends this process
                time.sleep(0.05)
            self._together = True
            return
        missing, last_s = set(range(1, self.world_size)), time.monotonic() + timeout_s
        while missing:
            for rank in sorted(missing):
                if store.check([f"{what}/{rank}"]):
                    missing.remove(rank)
                    theirs, given = json.loads(store.get(f"{what}/{rank}"))
                    _compare(rank, theirs, given, self.world_size, facts, cure)
            if missing and time.monotonic() > last_s:
                names = _ranks(missing)
                raise LaunchError(
                    f"{names} of {self.world_size} did not come within {timeout_s:.0f} s; see that all were started "
                    "and reach rank 0, or raise parallel.start_timeout_s."
                )
            time.sleep(0.02)
        self._together = True
        store.set(what, "alike")

    def say(self, word: str) -> None:
        self._words += 1
        self._store.set(f"word/{self._words}", word)

    def hear(self) -> str:
        self._words += 1
        while not self._store.check([f"word/{self._words}"]):
            time.sleep(0.1)
        return str(self._store.get(f"word/{self._words}").decode())

    def log_to(self, folder: Path, aloud: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._logs = folder
        self._log = _log_of(folder, self.rank).open("a", buffering=1, encoding="utf-8")
        print(f"{_BEGINS}{self.rank} of {self.world_size}, process {os.getpid()}", file=self._log)
        faulthandler.enable(self._log)
        if self.rank == 0 or aloud:
            console.share(self._log, f"[rank {self.rank}] " if self.rank else "")
            return
        with contextlib.suppress(OSError, ValueError):
            self._terminal = os.dup(sys.stderr.fileno())
        for stream in (sys.stdout, sys.stderr):  # libraries' own messages, too
            stream.flush()
            with contextlib.suppress(OSError, ValueError):  # a stream that is no file, as in a notebook
                os.dup2(self._log.fileno(), stream.fileno())

    @contextlib.contextmanager
    def watching(self, timeout_s: float) -> Iterator[None]:
        def advanced() -> None:
            self._advances += 1
            self._advanced_s = time.monotonic()

        advanced()
        console.when_advancing(advanced)
        self._patience_s = timeout_s
        try:
            yield
        finally:
            self._patience_s = math.inf

    # --- the end ---

    def leave(self) -> None:
        """This rank is done; rank 0 goes last, for it may have the store."""
        self._left.set()
        self._mark(self._store, f"left/{self.rank}")
        if self.rank == 0 and self._together:
            self._wait_for(self._store, [f"left/{rank}" for rank in range(self.world_size)], _LEAVE_S)

    def failed(self, error: BaseException) -> None:
        """Tell all ranks of this rank's error, or end because of another's that came first."""
        with contextlib.suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, that would come before the last word
        echo = not isinstance(error, FireflyError) and _is_echo(error)
        if self._log is not None and (echo or self.rank == 0):
            traceback.print_exception(error, file=self._log)
        if echo:  # the watcher will find out whose end this is the echo of, and end this process
            self._dead_after_s = _ECHO_S
            time.sleep(2 * _ECHO_S)
        self._ending.acquire()  # or the watcher has it already, and ends this process
        self._left.set()
        own = str(error) if isinstance(error, FireflyError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RuntimeError):  # the store may be gone
            first = self._claim(self._store, f"rank {self.rank}: {own}" if self.rank else own)
            if self.rank == 0:
                self._tell(self._store)
                if not first.endswith(own):
                    raise LaunchError(first) from None
                return
            told = self._wait_for(self._store, ["told"], _LAST_WORDS_S)
            self._mark(self._store, f"left/{self.rank}")
            if told and self._log is None:
                os._exit(1)  # here, without a log yet, it would be said again
            if not told:
                self._say_for_rank_0(first)

    def _tell(self, store: Any) -> None:
        """Rank 0 says that it has said it; where it has the store, it goes last."""
        self._mark(store, "told")
        if self._serves:
            # Also after those that have not come yet, and would look for the store in vain.
            self._wait_for(store, [f"left/{rank}" for rank in range(1, self.world_size)], _LAST_WORDS_S)

    @staticmethod
    def _mark(store: Any, key: str) -> None:
        store.set(key, "yes")
        store.check([key])  # a reply: it has arrived before this process ends

    @staticmethod
    def _wait_for(store: Any, keys: list[str], most_s: float) -> bool:
        last_s = time.monotonic() + most_s
        while keys and not store.check(keys):
            if time.monotonic() > last_s:
                return False
            time.sleep(0.05)
        return True

    @staticmethod
    def _claim(store: Any, sentence: str) -> str:
        """Make `sentence` the failure of the run, unless it has one; returns the run's."""
        return str(store.compare_set("failure", "", sentence).decode())

    # --- the watcher, a thread of its own with its own connection ---

    def _watch(self) -> None:
        store, began_s = self._watchers_store, time.monotonic()
        seen: dict[int, tuple[bytes, float]] = {}
        tick = 0
        while not self._left.wait(_TICK_S):
            tick += 1
            try:
                store.set(f"alive/{self.rank}", json.dumps([tick, self._advances, _place()]))
                if store.check(["failure"]):
                    self._end(store.get("failure").decode())
                found = self._silent(store, seen) or self._stuck(store)
                if found:
                    self._end(self._claim(store, found))
            except RuntimeError:  # the store is gone, and with it the process that had it
                if time.monotonic() - began_s > _TICK_S and not self._left.is_set():
                    self._end(f"rank 0, or its torchrun, ended without a word; {_GO_ON}.")

    def _silent(self, store: Any, seen: dict[int, tuple[bytes, float]]) -> str:
        """Which rank gives no sign of life any more: rank 0 looks at all of them, all of them at rank 0."""
        if not self._together:
            return ""
        now_s, silent = time.monotonic(), []
        for rank in range(self.world_size) if self.rank == 0 else (0,):
            key = f"alive/{rank}"
            if rank == self.rank or store.check([f"left/{rank}"]):
                continue
            sign = store.get(key) if store.check([key]) else b""
            if seen.get(rank, (None,))[0] != sign:
                seen[rank] = sign, now_s
            elif now_s - seen[rank][1] > self._dead_after_s:
                silent.append(rank)
        if not silent:
            return ""
        for rank in silent if self._log is not None else ():
            log = _log_of(self._logs, rank)
            fault = _fault(log)
            if fault:
                return f"rank {rank} was ended by a fault ({fault}); {log} has its stacks; {_GO_ON}."
        return (
            f"{_ranks(silent)} ended without a word: killed, often because main memory ran out, or the machine is "
            f"lost; {_GO_ON}."
        )

    def _stuck(self, store: Any) -> str:
        """Where the ranks are, when this one did not advance for too long."""
        if time.monotonic() - self._advanced_s < self._patience_s:
            return ""
        places = defaultdict(list)
        for rank in range(self.world_size):
            _, advances, place = json.loads(store.get(f"alive/{rank}"))
            places[f"at {place} after {advances} advances"].append(rank)
        where = "; ".join(
            f"{_ranks(ranks)} {place}" for place, ranks in sorted(places.items(), key=lambda p: len(p[1]))
        )
        return (
            f"Nothing advanced for {self._patience_s:.0f} s. {where}. The logs have their stacks; raise "
            f"parallel.hang_timeout_s if a step takes so long, or {_GO_ON}."
        )

    def _end(self, sentence: str) -> None:
        """End this process, from the watcher, because of a failure."""
        if not self._ending.acquire(blocking=False):
            return  # the main thread is about to
        if self._log is not None:
            faulthandler.dump_traceback(self._log)
        store, told = self._watchers_store, False
        with contextlib.suppress(RuntimeError):
            if self.rank:
                told = self._wait_for(store, ["told"], _LAST_WORDS_S)
                self._mark(store, f"left/{self.rank}")
        if told and self._log is None:
            os._exit(1)  # here, without a log yet, it would be said again
        print(f"error: {sentence}", file=sys.stderr, flush=True)
        if self.rank and not told:
            self._say_for_rank_0(sentence)
        with contextlib.suppress(RuntimeError):
            if self.rank == 0:
                self._tell(store)
        os._exit(1)

    def _say_for_rank_0(self, sentence: str) -> None:
        """Rank 0 is gone: on its machine rank 1 speaks, on others the first rank there."""
        if self._terminal is not None and (self.rank == 1 or os.environ.get("LOCAL_RANK") == "0"):
            os.write(self._terminal, f"error: {sentence}\n".encode())


def _environment() -> tuple[int, int, str, int]:
    """RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT."""
    try:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError) as error:
        raise LaunchError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, and of RANK, MASTER_ADDR and MASTER_PORT one is missing or no "
            "number; start the ranks with torchrun, or set all four."
        ) from error
    if not 0 <= rank < world_size:
        raise LaunchError(
            f"RANK is {rank} and WORLD_SIZE {world_size}: ranks count from 0 to {world_size - 1}."
        )
    return rank, world_size, host, port


def _compare(
    rank: int, theirs: int, facts: dict[str, Any], world_size: int, mine: dict[str, Any], cure: str
) -> None:
    if theirs != world_size:
        raise LaunchError(
            f"Rank {rank} was started as one of {theirs} ranks and rank 0 as one of {world_size}; give every rank the "
            "same WORLD_SIZE."
        )
    different = [
        f"{name} ({mine.get(name, 'none')} on rank 0, {facts.get(name, 'none')} on rank {rank})"
        for name in sorted(mine.keys() | facts.keys())
        if mine.get(name) != facts.get(name)
    ]
    if different:
        raise LaunchError(f"The ranks differ in {', '.join(different)}; {cure}.")


def _log_of(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.log"


def _fault(log: Path) -> str:
    """What ended a rank, from its log: a fatal signal, and what C++ said before it; or nothing."""
    try:
        text = log.read_text("utf-8", errors="replace").rpartition(_BEGINS)[2]
    except OSError:
        return ""
    before, _, after = text.rpartition("Fatal Python error: ")
    if not before:
        return ""
    _, found, uncaught = before.rpartition("terminate called")  # C++ tells of an exception on several lines
    said = f": {' '.join((found + uncaught).split())[:300]}" if found else ""
    return after.partition("\n")[0] + said


def _ranks(numbers: Any) -> str:
    """ "rank 3" or "ranks 0, 2, 5", and not more than a few of many."""
    names = [str(number) for number in sorted(numbers)]
    shown = names[:8] + [f"and {len(names) - 8} others"] * (len(names) > 8)
    return f"rank{'s' * (len(names) > 1)} {', '.join(shown)}"


def _is_echo(error: BaseException) -> bool:
    """Whether an error may only say that another rank is gone."""
    from torch.distributed import DistError

    return isinstance(error, DistError | ConnectionError) or any(
        word in str(error) for word in ("gloo", "Connection", "NCCL", "Broken pipe")
    )


def _place() -> str:
    """Where in this package the main thread is, such as "train/loop.py:210 (_backward)"."""
    root = Path(__file__).parents[1]
    main = threading.main_thread().ident
    frame = sys._current_frames().get(main) if main is not None else None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(root):
            return f"{path.relative_to(root)}:{frame.f_lineno} ({frame.f_code.co_name})"
        frame = frame.f_back
    return "an unknown place"
