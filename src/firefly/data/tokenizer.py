"""The tokenizer of a model directory, read without torch or transformers: ids, special tokens, identity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from firefly.errors import ModelError
from firefly.files import sha256_file


@dataclass(frozen=True)
class ModelTokenizer:
    """A loaded tokenizer; text never turns into special tokens, only `chatformat` places those.

    `bos_id`, `eos_id`: the tokens that open and close a turn. `sha256`: of tokenizer.json.
    """

    rust: Any
    bos_token: str
    eos_token: str
    bos_id: int
    eos_id: int
    sha256: str
    path: Path

    @classmethod
    def load(cls, directory: Path) -> ModelTokenizer:
        """Open `directory`/tokenizer.json; raises `ModelError` when it or its special tokens are missing."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelError(
                f"{directory} has no tokenizer.json, so it is not a model directory with a fast tokenizer; "
                "save it again with `AutoTokenizer.from_pretrained(…).save_pretrained(DIR)`."
            )
        try:
            rust = Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelError(f"{path} cannot be read as a tokenizer ({error}); fetch it again.") from error
        rust.encode_special_tokens = True
        rust.no_truncation()
        rust.no_padding()
        eos = _named_token(directory, "eos_token")
        if eos is None:
            raise ModelError(
                f"{directory} names no eos_token in tokenizer_config.json, so a model could never stop; add one."
            )
        bos = _named_token(directory, "bos_token") or eos

        def number(token: str) -> int:
            found = rust.token_to_id(token)
            if found is None:
                raise ModelError(
                    f"{directory}: the special token {token!r} is not in tokenizer.json; add it there."
                )
            return found

        return cls(rust, bos, eos, number(bos), number(eos), sha256_file(path), path)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.rust.get_vocab_size())

    @property
    def highest_id(self) -> int:
        """The highest token id; more than the number of tokens where ids have holes."""
        return int(max(self.rust.get_vocab().values()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added; a special token's name in the text stays plain text."""
        return list(self.rust.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        return [list(item.ids) for item in self.rust.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self.rust.decode(ids, skip_special_tokens=True))


def _named_token(directory: Path, name: str) -> str | None:
    """A special token's text from tokenizer_config.json or special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = directory / file
        if not path.is_file():
            continue
        try:
            value = json.loads(path.read_text(encoding="utf-8")).get(name)
        except (ValueError, AttributeError) as error:
            raise ModelError(f"{path} is not a JSON object ({error}); fetch it again.") from error
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None
