"""Starts `firefly` in several processes within milliseconds: they are forked by one that has imported everything.

The processes find each other as under Slurm, by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from firefly.files import sha256_file

BOUND_S = 60
"""Whatever happens to one process, all have ended after so long."""

NURSERY = """
import json, os, sys
import firefly.api, firefly.cli, firefly.app.pipeline, firefly.train.team, transformers
import safetensors.torch, matplotlib.pyplot, torch.distributed, torch.distributed.fsdp
for line in sys.stdin:  # nothing was computed yet, so a fork is clean
    members = json.loads(line)
    children = []
    for member in members:
        child = os.fork()
        if child == 0:
            os.environ.update(member["environment"])
            os.chdir(member["folder"])
            said = os.open(member["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(said, 2)
            os.dup2(said, 1)
            status = 70
            try:
                exec(member["prelude"])
                firefly.cli.main(member["arguments"])
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                import traceback
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    print(json.dumps(children), flush=True)
    statuses = {}
    for _ in children:
        child, status = os.wait()
        statuses[child] = os.waitstatus_to_exitcode(status)
    print(json.dumps([statuses[child] for child in children]), flush=True)
"""


@dataclass
class Member:
    """One process: what is special about it."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = Path()
    prelude: str = ""  # code that it runs first


class Crew:
    """One group of processes at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.pids = folder, list[int]()
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, *members: Member, world_size: int | None = None) -> None:
        """Start the members as ranks 0, 1, …"""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.logs = [self.folder / f"stderr-{rank}" for rank in range(len(members))]
        orders: list[dict[str, Any]] = []
        for rank, member in enumerate(members):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size or len(members)}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()} | member.environment
            order = {"arguments": member.arguments, "prelude": member.prelude, "environment": environment}
            orders.append(order | {"folder": str(member.folder.absolute()), "stderr": str(self.logs[rank])})
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(orders) + "\n")
        self.process.stdin.flush()
        self.pids = json.loads(self.process.stdout.readline())

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Send a rank a signal."""
        os.kill(self.pids[rank], number)

    def end(self, most_s: float = BOUND_S) -> list[int]:
        """Wait until all have ended; returns their exit statuses."""
        last_s = time.monotonic() + most_s
        while any(map(_lives, self.pids)) and time.monotonic() < last_s:
            time.sleep(0.05)
        late = [rank for rank, pid in enumerate(self.pids) if _lives(pid)]
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert self.process.stdout
        statuses = json.loads(self.process.stdout.readline())
        assert not late, f"ranks {late} did not end: {self.said}"
        return statuses  # type: ignore[no-any-return]

    def run(self, *members: Member, world_size: int | None = None) -> list[int]:
        """Start the members and wait for their end."""
        self.start(*members, world_size=world_size)
        return self.end(most_s=600)

    @property
    def said(self) -> list[str]:
        """What each of them wrote to its terminal."""
        return [log.read_text("utf-8") for log in self.logs]

    @property
    def errors(self) -> list[str]:
        """Every error that a person would have seen."""
        return [part.strip() for said in self.said for part in said.split("error: ")[1:]]

    def close(self) -> None:
        """End the process that forks."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def _lives(pid: int) -> bool:
    """Whether a process runs (one that has ended and was not waited for yet does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def run_ranks(num_processes: int, arguments: list[str]) -> None:
    """Train in so many processes under torchrun what `arguments` name: recipes, each with its tokens directory."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={num_processes}", str(Path(__file__).with_name("ranks.py")), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-40_000:]


def results(out: Path) -> tuple[Any, ...]:
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text("utf-8").splitlines()]
    losses = [(row["step"], row["loss"], row["grad_norm"]) for row in rows if "loss" in row]
    return losses, sha256_file(out / "model" / "model.safetensors")


def wait_for_step(out: Path, step: int) -> None:
    """Wait until the run has logged `step`."""
    last_s, metrics = time.monotonic() + 120, out / "run" / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text("utf-8").splitlines()) < step:
        assert time.monotonic() < last_s, "the run did not get that far"
        time.sleep(0.01)
