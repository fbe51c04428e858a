"""Token ids to text while a model writes: every character appears as soon as its last byte is there, and never as �.

Tokens are pieces of bytes, not of text: 流 may lie over three of them. So each id becomes its bytes, and an
incremental UTF-8 decoder gives out whole characters:

    tokens   [E6 B5]   [81]   [E8 90 A4 EF]   [BC 8C]
    pieces     ""      "流"       "萤"          "，"
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable
from typing import Any

from firefly.errors import ModelError

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
# GPT-2's alphabet writes each byte as one visible character: itself where it has a shape, else one from U+0100 on.
_BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class StreamDecoder:
    """Turns token ids, one after the other, into pieces of text; for one answer.

    Args:
        token_bytes: the bytes of a token id; None for special tokens, which have no text.
        strip_space: leave out one space at the very beginning, which SentencePiece puts before every text.
    """

    def __init__(self, token_bytes: Callable[[int], bytes | None], strip_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip_space = strip_space

    @classmethod
    def of(cls, tokenizer: Any) -> StreamDecoder:
        """A decoder that writes what the `tokenizers.Tokenizer` would decode; raises `ModelError` as `token_bytes`."""
        kinds = {step["type"]: step for step in _decoder_steps(tokenizer)}
        metaspace = kinds.get("Metaspace", {"prepend_scheme": "never"})
        return cls(token_bytes(tokenizer), "Strip" in kinds or metaspace.get("prepend_scheme") != "never")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; often none, sometimes several."""
        return self._piece(self._token_bytes(token_id) or b"", final=False)

    def finish(self) -> str:
        """What is left when no token follows: � for a character that was never completed."""
        return self._piece(b"", final=True)

    def _piece(self, data: bytes, final: bool) -> str:
        text = self._decoder.decode(data, final)
        if text and self._strip_space:
            self._strip_space = False
            text = text.removeprefix(" ")
        return text


def token_bytes(tokenizer: Any) -> Callable[[int], bytes | None]:
    """The function id → bytes of a `tokenizers.Tokenizer`; None for special tokens and ids without a token.

    Knows byte-level tokenizers (GPT-2's byte alphabet) and SentencePiece's (`▁` for a space, `<0xE4>` for a byte).
    Raises `ModelError` for any other, such as WordPiece, whose spaces depend on the neighbouring tokens.
    """
    kinds = {step["type"] for step in _decoder_steps(tokenizer)}
    special = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    if "ByteLevel" in kinds:
        to_bytes = _byte_level
    elif kinds & {"ByteFallback", "Metaspace"}:
        to_bytes = _sentencepiece
    else:
        raise ModelError(
            f"The tokenizer's decoder ({', '.join(sorted(kinds)) or 'none'}) cannot write token by token; "
            "use a model with a byte-level or SentencePiece tokenizer."
        )

    def lookup(token_id: int) -> bytes | None:
        token = None if token_id in special else tokenizer.id_to_token(token_id)
        return None if token is None else to_bytes(token)

    return lookup


def _byte_level(token: str) -> bytes:
    """`æµģ` → E6 B5 81; an added token outside the alphabet stands for its own text."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    """`<0xE6>` → E6, `▁the` → ` the`."""
    if byte := _BYTE_TOKEN.fullmatch(token):
        return bytes.fromhex(byte[1])
    return token.replace("▁", " ").encode()


def _decoder_steps(tokenizer: Any) -> list[dict[str, Any]]:
    """The tokenizer's decoder as the list of its steps, as tokenizer.json has them."""
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    return list(decoder["decoders"]) if decoder["type"] == "Sequence" else [decoder]
