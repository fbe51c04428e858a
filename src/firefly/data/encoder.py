"""The faster encoders, each used only where it proved to give the tokenizer's own ids.

    kitoken   another library's byte-pair encoding, two to five times as fast on Chinese
    pieces    the tokenizer itself, asked once for each distinct piece of text (pieces.py), nearly twice as fast

Before a run (`fastest`) an encoder must give the tokenizer's ids for a sample of the very input and for adversarial
text; during the run some blocks are encoded by both (see tokens.py). Two kinds of text never go to kitoken, because
implementations may read them in different ways: text with unusual characters (libraries carry different versions of
Unicode, which decide about combining marks and letters), and text with a special token's name.
"""

from __future__ import annotations

import random
import re
from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Protocol

from firefly.data.pieces import PieceEncoder
from firefly.data.tokenizer import ModelTokenizer

# Characters that every version of Unicode since 6.0 agrees on and that never combine with their neighbours.
_ORDINARY = re.compile(
    "[\t\n\r -~\u00a0-\u024f\u0391-\u03a1\u03a3-\u03ff\u0400-\u0481\u048a-\u0523\u200d\u2010-\u2027\u2030-\u205e"
    "\u2070\u2071\u2074-\u208e\u20a0-\u20b8\u2100-\u2188\u2190-\u23f3\u2460-\u26ce\u2701-\u27bf\u2e80-\u2e99"
    "\u3000-\u3029\u3030-\u303f\u3041-\u3096\u309b-\u30ff\u3105-\u312d\u3200-\u321e\u3220-\u33ff\u3400-\u4db5"
    "\u4e00-\u9fcb\uac00-\ud7a3\ufe0f\ufe30-\ufe52\uff01-\uff9f\uffe0-\uffe6"
    "\U0001f300-\U0001f320\U0001f330-\U0001f335\U0001f400-\U0001f43e\U0001f600-\U0001f640\U0001f680-\U0001f6c5"
    "\U00020000-\U0002a6d6]*"
)

PROBES = (
    "",
    " ",
    "\n",
    "\r\n\r\n\n \t \n  ",
    "   a  b   c    ",
    "Hello, world! Don't you'LL I'VE — “quote” … 3.14 × 10⁻⁹ = №5",
    "天地玄黃，宇宙洪荒。𠮷野家的𠮷、𪚥𪚥、㐂、龘",
    "👩‍👩‍👧‍👦 一家 👍 ❤️ 🇨🇳 😀😀",
    "第一行\r\n第二行\r\n\r\n\t缩进\n\n\n  完  ",
    "\x00\x01\x07\x1b[0m\x7f\x85\u200b\u2028\ufeff\ufffd",
    "e\u0301 é ﬁ Ａ １ ½ ㎏ Å Ω ａｂｃ１２３",
    "Привет, мир! Γειά σου. مرحبا שלום नमस्ते สวัสดี 안녕하세요 こんにちは カタカナ",
    "def f(x):\n    return {'a': [x ** 2 for x in range(10)]}  # 注释\n",
    "<0x41> <unk> <s></s> [UNK] ##ing ▁a Ġb </w> \\u4e2d <|im_end|> [INST]",
    " " * 70 + "a" * 700 + "中" * 700 + "1" * 70 + "！" * 70 + "\n" * 70,
    "中文English混排123，全角　空格\u00a0不断行\u2003宽",
    "１２３４５６７８９０1234567890一二三四五六七八九十",
)


class Encoder(Protocol):
    """Encodes many texts at once, each to what `ModelTokenizer.encode_packed` gives."""

    def encode_many(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, nothing added; the names of special tokens stay text."""


class KitokenEncoder:
    """Encodes ordinary text with kitoken and the rest with the tokenizer itself."""

    def __init__(self, tokenizer: ModelTokenizer) -> None:
        """Raises `ValueError` when kitoken cannot read the tokenizer."""
        from kitoken import Kitoken

        self.tokenizer = tokenizer
        try:
            self._quick = Kitoken.from_tokenizers_file(str(tokenizer.path))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise ValueError(str(error)) from None
        names = tokenizer.special_names()
        self._special = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._openers = {name[0] for name in names if name}

    def encode_many(self, texts: list[str]) -> list[bytes]:
        """The ids of each text, nothing added; the names of special tokens stay text."""
        quick = [self._is_ordinary(text) for text in texts]
        if all(quick):
            return self._encode_quick(texts)
        ordinary = iter(self._encode_quick([text for text, fits in zip(texts, quick, strict=True) if fits]))
        rest = iter(
            self.tokenizer.encode_packed([text for text, fits in zip(texts, quick, strict=True) if not fits])
        )
        return [next(ordinary if fits else rest) for fits in quick]

    def _encode_quick(self, texts: list[str]) -> list[bytes]:
        return [array("I", ids).tobytes() for ids in self._quick.encode_all(texts, False)]

    def _is_ordinary(self, text: str) -> bool:
        if any(map(text.__contains__, self._openers)) and self._special.search(text):
            return False
        return _ORDINARY.fullmatch(text) is not None


ENCODERS: Mapping[str, Callable[[ModelTokenizer], Encoder]] = {
    "kitoken": KitokenEncoder,
    "pieces": PieceEncoder,
}
"""The faster encoders by name, the fastest first."""


def fastest(tokenizer: ModelTokenizer, texts: Sequence[str]) -> tuple[str | None, dict[str, str]]:
    """The first encoder that proves itself on texts like these, and why others did not."""
    refused: dict[str, str] = {}
    for name in ENCODERS:
        reason = disagreement(name, tokenizer, texts)
        if reason is None:
            return name, refused
        refused[name] = reason
    return None, refused


def disagreement(name: str, tokenizer: ModelTokenizer, texts: Sequence[str]) -> str | None:
    """Why the encoder of that name must not be used for texts like these, or None: it proved to be the same.

    Compared are `texts`, `PROBES`, made-up mixtures of the characters of both, tokens in random order, and every
    order of four kinds of characters.
    """
    try:
        fast = ENCODERS[name](tokenizer)
        made = [*texts, *PROBES, *_mixtures(texts), *_strings_of_tokens(tokenizer)]
        made += map("".join, product("的aB1 \n，.'", repeat=4))
        for text, quick, slow in zip(
            made, fast.encode_many(made), tokenizer.encode_packed(made), strict=True
        ):
            if quick != slow:
                return f"it reads {text[:40]!r} differently"
    except ValueError as error:
        return f"it cannot read this tokenizer ({error})"
    except Exception as error:
        return f"it fails ({error})"
    return None


def _mixtures(texts: Sequence[str], count: int = 1000) -> list[str]:
    """Random texts of the given texts' characters and pieces; always the same ones."""
    rng = random.Random(0)
    pool = sorted(set("".join([*PROBES, *texts[:500]])))
    pieces = [text[start : start + 9] for text in texts[:500] for start in range(0, min(len(text), 90), 9)]
    mixed = ["".join(rng.choices(pool, k=rng.randint(1, 40))) for _ in range(count // 2)]
    return mixed + [
        "".join(rng.choices([*pieces, *pool[:40]], k=rng.randint(1, 9))) for _ in range(count // 2)
    ]


def _strings_of_tokens(tokenizer: ModelTokenizer, count: int = 500) -> list[str]:
    """Texts that put tokens side by side which no writer would."""
    rng = random.Random(0)
    numbers = sorted(tokenizer.rust.get_vocab(with_added_tokens=False).values())
    found: list[str] = tokenizer.rust.decode_batch([rng.choices(numbers, k=12) for _ in range(count)])
    return found
