"""Cleaning rules: each looks at one example and returns why to drop it, or None.

A reason is a short code (`empty_target`, `echo`, …) that is counted in the dataset's card and stands beside the
dropped text in `rejects.jsonl`: nothing disappears without a trace.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable

from firefly.data.example import Example

Rule = Callable[[Example], str | None]

# C0 and C1 controls but tab and line ends; lone surrogates, which UTF-8 cannot hold; U+FFFD, left by bad decoding.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffd-\uffff]")


def normalised(text: str) -> str:
    """The text under NFKC with every run of white space as one space: what counts as the same text."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def digest(text: str) -> str:
    """SHA-256 of any string, lone surrogates included, in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def empty_target(example: Example) -> str | None:
    """An answer without text teaches the model to say nothing."""
    return None if example.target.strip() else "empty_target"


def empty_input(example: Example) -> str | None:
    """A question without text; plain text for pre-training has no question and passes."""
    return "empty_input" if not example.is_plain and not example.input.strip() else None


def echo(example: Example) -> str | None:
    """An answer that repeats its question."""
    if example.is_plain:
        return None
    return "echo" if normalised(example.target) == normalised(example.messages[-2].content) else None


def control_characters(example: Example) -> str | None:
    """Control characters and U+FFFD: the text was decoded wrongly somewhere."""
    broken = any(_CONTROL.search(message.content) for message in example.messages)
    return "control_characters" if broken else None


class Duplicates:
    """The rule that remembers: an example whose normalised messages were seen before is a `duplicate`.

    Kind and source do not count. Memory is 16 bytes an example (about 100 with Python's set).
    """

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def __call__(self, example: Example) -> str | None:
        content = "\0".join(f"{turn.role}\1{normalised(turn.content)}" for turn in example.messages)
        key = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in self._seen:
            return "duplicate"
        self._seen.add(key)
        return None


RULES: tuple[Rule, ...] = (empty_target, empty_input, echo, control_characters)


def reject_reason(example: Example, rules: tuple[Rule, ...] = RULES) -> str | None:
    """The first rule's reason to drop the example, or None to keep it."""
    return next((reason for rule in rules if (reason := rule(example))), None)
