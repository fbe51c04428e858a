"""`firefly train --gpus all`: torchrun on this machine, one process (rank) a GPU.

The ranks themselves say what happens (firefly.train.team); this process starts them, hands signals on to them, and has
the last word only about a rank that could say nothing any more. Several machines need `torchrun` itself, on each.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence

from firefly.errors import LaunchError

_SAVE_S = 900
"""How long the ranks may take to save after a signal."""


def num_gpus(wanted: str) -> int:
    """How many processes `--gpus all` or `--gpus N` means; raises `LaunchError` when there are fewer GPUs."""
    import torch

    found = torch.cuda.device_count()
    if wanted != "all" and not (wanted.isdecimal() and int(wanted)):
        raise LaunchError(f"--gpus is '{wanted}'; write all, or how many.")
    if not found or (wanted != "all" and int(wanted) > found):
        raise LaunchError(
            f"--gpus {wanted}, and this machine has {found or 'no'} GPU{'s' * (found > 1)}; ask for fewer, or start "
            "processes on the CPU with --processes N."
        )
    return found if wanted == "all" else int(wanted)


def launch(arguments: Sequence[str], num_processes: int) -> int:
    """Run `firefly ARGUMENTS` in `num_processes` ranks until all have ended; returns the exit status.

    The first rank that fails ends the others. SIGTERM and SIGINT reach all of them, which then save and stop.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    logging.getLogger("torch.distributed.launcher").setLevel(logging.CRITICAL)
    # As torchrun's own defaults, which say 1 thread a process and 30 s to save; a user's values stay.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(_SAVE_S))
    with tempfile.TemporaryDirectory(prefix="firefly-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        number, codes = 0, dict[int, int]()
        try:
            elastic_launch(config, sys.executable)("-m", "firefly", *arguments)
        except SignalException as stop:
            number = int(stop.sigval)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        # After a signal torch leaves its timer running; where the timer's own thread happens to collect it, it tries to
        # join itself, and Python prints a traceback. So it is collected here.
        gc.collect()
    return _status(codes) if codes else 128 + number if number else 0


def _status(codes: dict[int, int]) -> int:
    """The run's exit status from the ranks' own; says who was killed, if no rank has said anything."""
    said = [code for code in codes.values() if code > 0]
    if said:
        return max(said)  # 1: an error; above 128: stopped by a signal, and saved
    killed = {rank: -code for rank, code in codes.items() if code != -signal.SIGTERM} or {
        rank: -code for rank, code in codes.items()
    }
    rank, number = min(killed.items())
    why = (
        "often because main memory ran out"
        if number == signal.SIGKILL
        else f"a fault of which OUT/run/logs/rank-{rank}.log may say more"
    )
    raise LaunchError(
        f"rank {rank} was ended by {signal.Signals(number).name}, {why}; run the same command to go on from the last "
        "checkpoint."
    )
