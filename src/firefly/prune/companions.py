"""The small files beside weights and tokenizer.json: the ids in them follow the new vocabulary.

`config.json`, `generation_config.json` and `tokenizer_config.json` name token ids (bos, eos, pad, suppressed
tokens, …). `required_ids` finds those that must stay in the keep-set; `write` remaps them all and carries
chat templates and licences along. Files that hold the old vocabulary in another form are left behind.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from firefly.console import say, warn
from firefly.errors import ModelError
from firefly.files import write_json
from firefly.prune.counting import strings_in
from firefly.prune.tokenizer import Json, read_json

CONFIGS = ("config.json", "generation_config.json")
_TOKEN_ID = re.compile(r".*_token_(id|ids|index|indices)$|force_words_ids$")
_IDS_BY_NAME = re.compile(r".*_to_id$")  # a dictionary of ids, such as a Whisper's lang_to_id
# A sequence with a dropped token never comes, so excluding or favouring it says nothing any more.
_EXCLUDED_IDS = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids"}
_SEQUENCE_BIAS = "sequence_bias"  # pairs of a sequence of ids and a number
_FORCED_IDS = "forced_decoder_ids"  # pairs of a place and an id
_TEXTS = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.json", "processor_config.json")
_STALE = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_COPIED = (
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


def required_ids(base: Path, tokens: Mapping[str, int], added: set[str]) -> set[int]:
    """Ids that configs name, and added tokens whose text stands in a chat template or a special-token field.

    Args:
        tokens: the whole vocabulary, token → old id.
        added: contents of the added tokens.
    """
    known = set(tokens.values())
    ids = {
        token_id
        for name in CONFIGS
        if (base / name).is_file()
        for token_id in _ids_in(read_json(base / name), base / name)
        if token_id in known
    }
    texts = [path.read_text("utf-8") for path in _templates(base)]
    for name in _TEXTS:
        if (base / name).is_file():
            content = read_json(base / name)
            content.pop("added_tokens_decoder", None)  # it lists every added token, used or not
            texts.extend(strings_in(content))
    text = "\0".join(texts)
    return ids | {tokens[token] for token in added if token in text}


def write(base: Path, out: Path, old_to_new: Mapping[int, int], vocab_size: int) -> None:
    """Write `base`'s small files into `out` with new ids; says which stale files stay behind."""
    for name in CONFIGS:
        if (base / name).is_file():
            content = _remap(read_json(base / name), old_to_new, base / name)
            if name == "config.json":
                inner = content.get("text_config")
                parts = [content, inner] if isinstance(inner, dict) else [content]
                for part in [one for one in parts if isinstance(one.get("vocab_size"), int)] or parts[-1:]:
                    part["vocab_size"] = vocab_size
            write_json(out / name, content)
    if (base / "tokenizer_config.json").is_file():
        content = read_json(base / "tokenizer_config.json")
        if isinstance(decoder := content.get("added_tokens_decoder"), dict):
            content["added_tokens_decoder"] = {
                str(old_to_new[int(old)]): token for old, token in decoder.items() if int(old) in old_to_new
            }
        write_json(out / "tokenizer_config.json", content)
    if (base / "added_tokens.json").is_file():
        added = read_json(base / "added_tokens.json")
        write_json(
            out / "added_tokens.json",
            {token: old_to_new[old] for token, old in added.items() if old in old_to_new},
        )
    for pattern in _COPIED:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, out / path.name)
    for path in _templates(base):
        target = out / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if stale := [name for name in _STALE if (base / name).is_file()]:
        say(f"prune: left behind, because tokenizer.json replaces them: {', '.join(stale)}")


def _templates(base: Path) -> list[Path]:
    found = [base / "chat_template.jinja", *sorted((base / "additional_chat_templates").glob("*.jinja"))]
    return [path for path in found if path.is_file()]


def is_id_field(key: str) -> bool:
    """Whether a field of a config, at any depth, holds token ids."""
    return bool(
        key in {*_EXCLUDED_IDS, _SEQUENCE_BIAS, _FORCED_IDS}
        or _TOKEN_ID.match(key)
        or _IDS_BY_NAME.match(key)
    )


def remapped_values(key: str, value: Any, translate: Callable[[int], int | None]) -> Any:
    """The value of the id field `key` with every id translated; what becomes None leaves its list.

    Numbers below zero stand for no token and stay.
    """

    def change(item: Any) -> Any:
        if isinstance(item, list):
            return [new for new in map(change, item) if new is not None]
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            return item
        return translate(item)

    def whole(sequence: Any) -> bool:
        items = sequence if isinstance(sequence, list) else [sequence]
        return all(change(item) is not None for item in items)

    if _IDS_BY_NAME.match(key) and isinstance(value, dict):
        changed = {name: change(item) for name, item in value.items()}
        return {name: new for name, new in changed.items() if new is not None}
    if not isinstance(value, list):
        return change(value)
    if key == _FORCED_IDS:
        return [[place, change(item)] for place, item in value]
    if key == _SEQUENCE_BIAS:
        return [[change(sequence), bias] for sequence, bias in value if whole(sequence)] or None
    if key in _EXCLUDED_IDS:
        return [change(sequence) for sequence in value if whole(sequence)] or None
    return change(value)


def _ids_in(content: Json, path: Path) -> Iterator[int]:
    """The ids in `content` that cannot be dropped."""
    for key, value in content.items():
        if is_id_field(key) and key not in {*_EXCLUDED_IDS, _SEQUENCE_BIAS}:
            found: list[int] = []
            with _named(path, key):
                remapped_values(key, value, lambda token_id, found=found: found.append(token_id))  # type: ignore[misc]
            yield from found
        elif isinstance(value, dict):
            yield from _ids_in(value, path)


@contextlib.contextmanager
def _named(path: Path, key: str) -> Iterator[None]:
    """Name the field whose value is not shaped as it should be."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: '{key}' is not written as transformers writes it ({error}); mend it, or take it out of the file."
        ) from error


def _remap(content: Json, old_to_new: Mapping[int, int], path: Path) -> Json:
    """`content` with every token id translated; an id without a token becomes null, with a warning."""
    result: Json = {}
    for key, value in content.items():
        if is_id_field(key):
            lost: list[int] = []

            def translate(old: int, lost: list[int] = lost) -> int | None:
                if old not in old_to_new:
                    lost.append(old)
                return old_to_new.get(old)

            with _named(path, key):
                result[key] = remapped_values(key, value, translate)
            if lost and key not in {*_EXCLUDED_IDS, _SEQUENCE_BIAS}:
                warn(f"{path}: {key} names the id {lost[0]}, which no token has; it is taken out")
        elif isinstance(value, dict):
            result[key] = _remap(value, old_to_new, path)
        else:
            result[key] = value
    return result
