"""The tokenizer of a model directory, read without torch or transformers: ids, special tokens, identity."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from firefly.data.sequences import EncodedTexts
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
        if getattr(rust.pre_tokenizer, "prepend_scheme", None) == "first":
            # Texts are encoded one by one here, and none stands first: a special token goes before it.
            rust.pre_tokenizer.prepend_scheme = "never"
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

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """The tokens of the model proper with their ids, as tokenizer.json writes them."""
        return dict(self.rust.get_vocab(with_added_tokens=False))

    @property
    def highest_id(self) -> int:
        """The highest token id; more than the number of tokens where ids have holes."""
        return max([*self.vocabulary.values(), *self.added_tokens().values()])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added; a special token's name in the text stays plain text."""
        return list(self.rust.encode(text, add_special_tokens=False).ids)

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts at once, on all cores."""
        return [list(item.ids) for item in self.rust.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_texts(self, texts: list[str]) -> EncodedTexts:
        """`encode_many` into one array."""
        return EncodedTexts.of(
            item.ids for item in self.rust.encode_batch_fast(texts, add_special_tokens=False)
        )

    def encode_with_specials(self, text: str) -> list[int]:
        """Token ids of a rendered text, in which the names of special tokens mean the tokens."""
        self.rust.encode_special_tokens = False
        try:
            return list(self.rust.encode(text, add_special_tokens=False).ids)
        finally:
            self.rust.encode_special_tokens = True

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self.rust.decode(ids, skip_special_tokens=True))

    def added_tokens(self) -> dict[str, int]:
        """Tokens that stand outside the vocabulary proper, special ones among them, with their ids."""
        return {token.content: number for number, token in self.rust.get_added_tokens_decoder().items()}

    def special_names(self) -> list[str]:
        """The names of the special tokens, which `encode` leaves alone."""
        return [token.content for token in self.rust.get_added_tokens_decoder().values() if token.special]

    def chat_template(self) -> str | None:
        """The Jinja template of the tokenizer's directory: chat_template.jinja, else the configuration's."""
        path = self.path.with_name("chat_template.jinja")
        if path.is_file():
            return path.read_text(encoding="utf-8")
        found = _settings(self.path.with_name("tokenizer_config.json")).get("chat_template")
        if isinstance(found, list):  # several by name
            found = {one.get("name"): one.get("template") for one in found}.get("default")
        return found if isinstance(found, str) else None

    def named_tokens(self) -> dict[str, str]:
        """What transformers lets a chat template call bos_token, eos_token and the like."""
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
        found = {name: _named_token(self.path.parent, name) for name in names}
        return {name: token for name, token in found.items() if token is not None}


def _settings(path: Path) -> dict[str, Any]:
    """A JSON file's object, empty when there is no such file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch it again.") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} does not hold a JSON object; fetch it again.")
    return found


def _named_token(directory: Path, name: str) -> str | None:
    """A special token's text from tokenizer_config.json or special_tokens_map.json."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        value = _settings(directory / file).get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            return value
    return None
