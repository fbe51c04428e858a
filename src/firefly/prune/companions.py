"""The small files beside weights and tokenizer.json: the ids in them follow the new vocabulary.

`config.json`, `generation_config.json` and `tokenizer_config.json` name token ids (bos, eos, pad, suppressed
tokens, …). `required_ids` finds those that must stay in the keep-set; `write` remaps them all and carries
chat templates and licences along. Files that hold the old vocabulary in another form are left behind.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from firefly.console import say, warn
from firefly.errors import ModelError
from firefly.files import write_json
from firefly.prune.counting import strings_in
from firefly.prune.tokenizer import Json, read_json

_TOKEN_ID = re.compile(r".*_token_(id|ids|index|indices)$|force_words_ids$")
_EXCLUDED_IDS = {
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
}  # a dropped token never comes anyway
_UNSUPPORTED = {"forced_decoder_ids", "sequence_bias"}
_CONFIGS = ("config.json", "generation_config.json")
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
        for name in _CONFIGS
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
    for name in _CONFIGS:
        if (base / name).is_file():
            content = _remap(read_json(base / name), old_to_new, base / name)
            if name == "config.json":
                inner = content.get("text_config")
                (inner if isinstance(inner, dict) and "vocab_size" in inner else content)["vocab_size"] = (
                    vocab_size
                )
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


def _ids_in(content: Json, path: Path) -> Iterator[int]:
    """The ids in `content` that cannot be dropped."""
    for key, value in content.items():
        if key in _UNSUPPORTED and value:
            raise ModelError(
                f"{path}: '{key}' cannot be carried to another vocabulary; take it out of the file."
            )
        if _TOKEN_ID.match(key):
            yield from _integers(value)
        elif isinstance(value, dict):
            yield from _ids_in(value, path)


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, list):
        for item in value:
            yield from _integers(item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _remap(content: Json, old_to_new: Mapping[int, int], path: Path) -> Json:
    """`content` with every token id translated; an id without a token becomes null, with a warning."""

    def translate(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [new for new in (translate(key, item) for item in value) if new is not None]
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            return value
        if value not in old_to_new:
            warn(f"{path}: {key} names the id {value}, which no token has; it is taken out")
        return old_to_new.get(value)

    result: Json = {}
    for key, value in content.items():
        if _TOKEN_ID.match(key):
            result[key] = translate(key, value)
        elif key in _EXCLUDED_IDS and isinstance(value, list):
            # A sequence with a dropped token cannot be generated, so excluding it says nothing any more.
            sequences = [item if isinstance(item, list) else [item] for item in value]
            mapped = [[old_to_new.get(old, -1) for old in sequence] for sequence in sequences]
            kept = [new for new in mapped if -1 not in new]
            result[key] = (kept if value and isinstance(value[0], list) else [new[0] for new in kept]) or None
        elif isinstance(value, dict):
            result[key] = _remap(value, old_to_new, path)
        else:
            result[key] = value
    return json.loads(json.dumps(result))  # type: ignore[no-any-return]
