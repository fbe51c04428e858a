"""A finished directory opened by plain transformers, beside the other work.

Importing transformers takes a second or two, so a child process begins with it when pruning
begins, and answers when there is something to open; where transformers is in memory already, no child starts.
The child runs this very file, so it imports nothing of firefly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


class Opener:
    """`encode` opens a directory with `AutoTokenizer`; a context manager, ended by killing the child."""

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        if "transformers" not in sys.modules:
            self._child = subprocess.Popen(
                [sys.executable, "-P", __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            )

    def __enter__(self) -> Opener:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.communicate()

    def encode(self, directory: Path, texts: list[str]) -> tuple[int, list[list[int]]]:
        """Number of tokens, and the ids of each text with the special tokens that encoding adds.

        Raises `RuntimeError` with the reason when the directory does not open.
        """
        request = {"directory": str(directory), "texts": texts}
        if self._child is None:
            answer = _answer(request)
        else:
            assert self._child.stdin and self._child.stdout
            try:
                self._child.stdin.write(json.dumps(request) + "\n")
                self._child.stdin.flush()
                answer = json.loads(self._child.stdout.readline())
            except (OSError, ValueError) as error:
                raise RuntimeError(f"the process that imports transformers has died ({error})") from error
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["length"], answer["ids"]


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(request["directory"], local_files_only=True)
        ids = [tokenizer(text)["input_ids"] for text in request["texts"]]
        return {"length": len(tokenizer), "ids": ids}
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # panics of the tokenizers library are no `Exception`
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}
    finally:
        logging.set_verbosity(level)


def _serve() -> None:
    """Answer requests, one JSON line each; whatever transformers prints does not get between them."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # Tokenizers need no torch, and transformers does without one that is not there: half the time and memory.
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoTokenizer  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(_answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
