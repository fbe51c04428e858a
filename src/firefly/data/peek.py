"""`firefly data peek`: samples as training reads them, with what is learned set apart from what is only context.

    Couplet  train #512 · lushi.jsonl.gz:88 · 31 tokens, 9 learned
    <s>对下联：两岸山花似雪开</s></s>[[家家春酒满银杯</s>]]

The ids and the mask come from tokens.bin and mask.bin; only the length before a cut is measured again, from the
dataset. A token that holds a part of a character shows its bytes: ⟨e4⟩⟨bd⟩.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from firefly.console import progress
from firefly.data.card import render_page
from firefly.data.chatformat import render
from firefly.data.dataset import FILES
from firefly.data.example import Example
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import Tokens
from firefly.errors import InputError, ModelError, choices
from firefly.files import read_lines
from firefly.text import token_bytes

if TYPE_CHECKING:
    from rich.text import Text

SPLIT = "train"
_LONE_BYTE = re.compile("[\udc80-\udcff]")
_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
# Neighbouring tokens alternate between two shades, which suit dark and light terminals alike.
_LEARNED, _CONTEXT = ("bold green", "green"), ("default", "dim")


@dataclass(frozen=True)
class Token:
    """One token as people see it."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class PeekedSample:
    """One sample: its tokens, and where it comes from; `whole_tokens` is its length before a cut, if it was cut."""

    number: int
    kind: str
    source: str
    num_tokens: int
    num_learned: int
    whole_tokens: int | None
    tokens: list[Token]

    @property
    def heading(self) -> str:
        """Everything but the kind and the text, in one line."""
        cut = f", cut from {self.whole_tokens:,}" if self.whole_tokens else ""
        return f"{SPLIT} #{self.number} · {self.source} · {self.num_tokens:,} tokens{cut}, {self.num_learned:,} learned"

    def plain(self) -> str:
        """The sample without colours: learned spans stand in [[…]]."""
        parts, inside = [], False
        for token in self.tokens:
            if token.learned != inside:
                parts.append("[[" if token.learned else "]]")
            parts.append(token.text)
            inside = token.learned
        return f"{self.kind}  {self.heading}\n{''.join(parts)}{']]' if inside else ''}\n"

    def coloured(self) -> Text:
        """The sample for a terminal."""
        from rich.text import Text

        text = Text().append(f"{self.kind}  ", style="bold").append(f"{self.heading}\n", style="dim")
        for number, token in enumerate(self.tokens):
            shade = (_LEARNED if token.learned else _CONTEXT)[number % 2]
            text.append(token.text, style=f"underline {shade}" if token.special else shade)
        return text.append("\n")


def peek(
    tokens: Path,
    tokenizer: ModelTokenizer,
    *,
    dataset: Path | None = None,
    kind: str | None = None,
    num: int = 5,
    seed: int = 0,
) -> list[PeekedSample]:
    """Draw `num` training samples of a tokens directory, of one kind or of all; the same seed draws the same.

    Raises `InputError` for an unknown kind, `ModelError` when the directory was made with another tokenizer.
    """
    mapped = Tokens.open(tokens, SPLIT, tokenizer.sha256)
    if kind is not None and kind not in mapped.kind_names:
        raise InputError(f"{tokens} has no samples of kind '{kind}': {choices(kind, mapped.kind_names)}.")
    matches = np.asarray([kind in (None, name) for name in mapped.kind_names])
    wanted = np.flatnonzero(matches[mapped.kinds])
    drawn = sorted(random.Random(seed).sample(range(len(wanted)), min(num, len(wanted))))
    numbers = [int(wanted[place]) for place in drawn]
    chat_format = json.loads((tokens / "index.json").read_text("utf-8"))["chat_format"]
    examples = _examples(dataset, {int(mapped.origins[number]) for number in numbers})
    show = token_viewer(tokenizer)
    return [_peeked(mapped, number, examples, tokenizer, chat_format, show) for number in numbers]


def peek_page(samples: list[PeekedSample]) -> str:
    """The samples as a self-contained HTML page."""
    return render_page("样本 Samples", f"{len(samples)} training samples, token by token.", samples=samples)


def _examples(dataset: Path | None, lines: set[int]) -> dict[int, Example]:
    """The examples on some lines of the dataset, by line; none where the dataset is not at hand."""
    path = dataset / FILES[SPLIT] if dataset else None
    if path is None or not path.is_file() or not lines:
        return {}
    found = {}
    with progress("find the samples' sources", None, "lines") as bar:
        for line, text in islice(read_lines(path), max(lines) + 1):
            if line - 1 in lines:
                found[line - 1] = Example.from_record(json.loads(text), path, line)
            if line % 1000 == 0:
                bar.advance(1000)
    return found


def _peeked(
    mapped: Tokens,
    number: int,
    examples: dict[int, Example],
    tokenizer: ModelTokenizer,
    chat_format: str,
    show: Callable[[int], tuple[str, bool]],
) -> PeekedSample:
    sample = mapped.sample(number)
    example = examples.get(sample.origin)
    if example and mapped.pairs:
        example = example.answered[number % 2]
    source = example.source if example else f"line {sample.origin + 1} of the dataset"
    whole_tokens = len(render(example.messages, tokenizer, chat_format).ids) if example else len(sample.ids)
    return PeekedSample(
        number=number,
        kind=sample.kind,
        source=source,
        num_tokens=len(sample.ids),
        num_learned=int(sample.mask.sum()),
        whole_tokens=whole_tokens if whole_tokens != len(sample.ids) else None,
        tokens=[
            Token(text, bool(learned), special)
            for (text, special), learned in zip(
                map(show, sample.ids.tolist()), sample.mask.tolist(), strict=True
            )
        ],
    )


def token_viewer(tokenizer: ModelTokenizer) -> Callable[[int], tuple[str, bool]]:
    """The function id → (text to show, whether it is a special token); never raises, whatever the id."""
    special = {
        number: token.content
        for number, token in tokenizer.rust.get_added_tokens_decoder().items()
        if token.special
    }
    try:
        to_bytes = token_bytes(tokenizer.rust)
    except ModelError:  # WordPiece and the like: the token's own spelling says most

        def to_bytes(number: int) -> bytes | None:
            token = tokenizer.rust.id_to_token(number)
            return None if token is None else token.encode()

    def show(number: int) -> tuple[str, bool]:
        if number in special:
            return special[number], True
        data = to_bytes(number)
        return (f"⟨id {number}⟩", True) if data is None else (visible(data), False)

    return show


def visible(data: bytes) -> str:
    """Text of bytes: a line break as ↵ and a break, broken UTF-8 and control characters as ⟨…⟩.

    >>> visible(b"\\xe4\\xbd\\xa0\\xe5\\xa5\\n\\x1b[0m")
    '你⟨e5⟩⟨a5⟩↵\\n⟨1b⟩[0m'
    """
    text = data.decode("utf-8", "surrogateescape")
    text = _LONE_BYTE.sub(lambda match: f"⟨{ord(match[0]) - 0xDC00:02x}⟩", text)
    return _CONTROL.sub(lambda match: f"⟨{ord(match[0]):02x}⟩", text).replace("\n", "↵\n")
