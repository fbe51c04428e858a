"""The weights written and proven in a process of their own, while this one proves the tokenizer.

Gigabytes of copying and the tokenizer's proof each keep one core busy; threads would wait for each other at
every block. A small model is done on the spot, because starting a process takes longer than copying it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly import console, errors
from firefly.prune.proof_weights import prove_weights
from firefly.prune.weights import select_rows

_OWN_PROCESS_BYTES = 256 << 20
_CODE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from firefly.prune.copying import main; main()"
)


class WeightsCopy:
    """`select_rows`, then `prove_weights`; a context manager that kills what has not ended.

    A process for large `files` starts at once, and has everything imported when `start` says what to write.
    """

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._child: subprocess.Popen[str] | None = None
        if sum(path.stat().st_size for path in files) < _OWN_PROCESS_BYTES:
            return
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _CODE, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    def start(self, out: Path, names: frozenset[str], new_to_old: NDArray[np.int64]) -> None:
        """Begin to write into `out` (see `select_rows`)."""
        self._out, self._names, self._new_to_old = out, names, new_to_old
        if self._child is None:
            return
        task = {
            "files": [str(path) for path in self._files],
            "out": str(out),
            "names": sorted(names),
            "new_to_old": new_to_old.tolist(),
        }
        assert self._child.stdin
        self._child.stdin.write(json.dumps(task))
        self._child.stdin.close()
        self._child.stdin = None

    def __enter__(self) -> WeightsCopy:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def proof(self) -> dict[str, Any]:
        """Wait for the end; returns what `prove_weights` does, and raises what either function does."""
        if self._child is None:
            return _run(self._files, self._out, self._names, self._new_to_old)
        total = sum(path.stat().st_size for path in self._files) / 2**20
        shown = 0.0
        with console.progress("write weights", total, "MiB of the original") as bar:
            while True:
                try:
                    text, complaint = self._child.communicate(timeout=0.2)
                    break
                except subprocess.TimeoutExpired:
                    written = [self._out / path.name for path in self._files]
                    now = sum(path.stat().st_size for path in written if path.is_file()) / 2**20
                    bar.advance(now - shown)
                    shown = now
        try:
            answer = json.loads(text)
        except ValueError:
            reason = (complaint.strip().splitlines() or [f"exit status {self._child.returncode}"])[-1]
            raise errors.OutputError(
                f"The process that writes the weights into {self._out} has died: {reason}"
            ) from None
        if "os_error" in answer:
            raise OSError(*answer["os_error"])
        if "error" in answer:
            raise getattr(errors, answer["error"])(answer["message"])
        proof: dict[str, Any] = answer["proof"]
        return proof


def _run(
    files: list[Path], out: Path, names: frozenset[str], new_to_old: NDArray[np.int64]
) -> dict[str, Any]:
    select_rows(files, out, names, new_to_old)
    return prove_weights(files[0].parent, out, new_to_old, names)


def main() -> None:
    """The child: one task from stdin, one answer to stdout."""
    console.quiet()
    task = json.load(sys.stdin)
    try:
        proof = _run(
            [Path(path) for path in task["files"]],
            Path(task["out"]),
            frozenset(task["names"]),
            np.array(task["new_to_old"], dtype=np.int64),
        )
        answer: dict[str, Any] = {"proof": proof}
    except errors.FireflyError as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    except OSError as error:
        answer = {"os_error": [error.errno, error.strerror, error.filename]}
    print(json.dumps(answer), flush=True)
