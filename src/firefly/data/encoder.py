"""The faster encoders, each used only where it proved to give the tokenizer's own ids.

    kitoken             another library's byte-pair encoding, two to five times as fast on Chinese
    pieces              the tokenizer itself, asked only for pieces of text that it has not just met (pieces.py)
    pieces of kitoken   the same with kitoken, the fastest

Before a run (`fastest`) an encoder must give the tokenizer's ids for a sample of the very input and for adversarial
text; during the run some blocks are encoded by both (see tokens.py). Two kinds of text never go to kitoken, because
implementations may read them in different ways: text with unusual characters (libraries carry different versions of
Unicode, which decide about combining marks and letters), and text with a special token's name.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Protocol

import numpy as np

from firefly.data.pieces import PieceEncoder
from firefly.data.sequences import EncodedTexts
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
    """Encodes many texts at once, each to what `ModelTokenizer.encode_texts` gives."""

    def encode_many(self, texts: list[str]) -> EncodedTexts:
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

    def encode_many(self, texts: list[str]) -> EncodedTexts:
        """The ids of each text, nothing added; the names of special tokens stay text."""
        ordinary = [self._is_ordinary(text) for text in texts]
        if all(ordinary):
            return EncodedTexts.of(self._quick.encode_all(texts, False))
        pairs = list(zip(texts, ordinary, strict=True))
        encoded = EncodedTexts.of(
            self._quick.encode_all([text if fits else "" for text, fits in pairs], False)
        )
        rest = self.tokenizer.encode_texts([text for text, fits in pairs if not fits])
        return encoded.replaced(~np.asarray(ordinary), rest)

    def _is_ordinary(self, text: str) -> bool:
        if any(map(text.__contains__, self._openers)) and self._special.search(text):
            return False
        return _ORDINARY.fullmatch(text) is not None


def _pieces_of_kitoken(tokenizer: ModelTokenizer) -> Encoder:
    return PieceEncoder(tokenizer, KitokenEncoder(tokenizer).encode_many)


ENCODERS: Mapping[str, Callable[[ModelTokenizer], Encoder]] = {
    "pieces of kitoken": _pieces_of_kitoken,
    "kitoken": KitokenEncoder,
    "pieces": PieceEncoder,
}
"""The faster encoders by name, the fastest first."""


def fastest(
    tokenizer: ModelTokenizer, texts: Sequence[str], names: Sequence[str] = tuple(ENCODERS)
) -> tuple[Encoder | None, dict[str, str]]:
    """The first of the named encoders that proves itself on texts like these, and why others did not."""
    refused: dict[str, str] = {}
    for name in names:
        found = proved(name, tokenizer, texts)
        if not isinstance(found, str):
            return found, refused
        refused[name] = found
    return None, refused


def proved(name: str, tokenizer: ModelTokenizer, texts: Sequence[str]) -> Encoder | str:
    """The encoder of that name if it gives the tokenizer's ids for texts like these, or why it must not be used.

    Compared are `texts`, `PROBES`, made-up mixtures of the characters of both, tokens in random order, and every
    order of four kinds of characters.
    """
    try:
        fast = ENCODERS[name](tokenizer)
        made = [*texts, *PROBES, *_mixtures(texts), *_strings_of_tokens(tokenizer)]
        made += map("".join, product("的aB1 \n，.'", repeat=4))
        slow = tokenizer.encode_texts(made)
        for quick in (
            fast.encode_many(made),
            fast.encode_many(made),
        ):  # what is new to it, and what it remembers
            if not (np.array_equal(quick.ids, slow.ids) and np.array_equal(quick.borders, slow.borders)):
                each = zip(made, quick.lists(), slow.lists(), strict=True)
                different = next(text for text, ours, theirs in each if ours != theirs)
                return f"it reads {different[:40]!r} differently"
    except ValueError as error:
        return f"it cannot read this tokenizer ({error})"
    except Exception as error:
        return f"it fails ({error})"
    return fast


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
    numbers = sorted(tokenizer.vocabulary.values())
    found: list[str] = tokenizer.rust.decode_batch([rng.choices(numbers, k=12) for _ in range(count)])
    return found
