"""Surgery on `tokenizer.json`: the same tokenizer with fewer tokens, every other stage as it was.

`rebuild` renumbers the kept tokens, keeps the merges that live among them in their order, and remaps every
id that the other stages hold (added tokens, post-processor, padding). What differs between model types is
one function each in `_REBUILD`; BPE is there. `load` turns the tokenizers library's panics into a sentence.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.errors import FireflyError, ModelError

Json = dict[str, Any]


@contextlib.contextmanager
def guarded(doing: str) -> Iterator[None]:
    """Turn whatever the tokenizers library throws while `doing` something into a `ModelError`.

    Rust panics arrive as `pyo3_runtime.PanicException`, which is *not* a subclass of `Exception`.
    """
    try:
        yield
    except (FireflyError, KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:
        raise ModelError(
            f"The tokenizer broke while {doing}: {str(error)[:200]}. Its tokenizer.json is damaged or of an unknown "
            "version; fetch it again, or save it again with transformers."
        ) from error


def load(source: Path | Json) -> Tokenizer:
    """Load a tokenizer.json (a path, or its parsed content) for exact work: no truncation, padding or dropout.

    Raises `ModelError` for anything that the tokenizers library refuses or panics at, and when the loaded
    ids are not those in the file (the library renumbers added tokens silently).
    """
    content = read(source) if isinstance(source, Path) else source
    name = str(source) if isinstance(source, Path) else "tokenizer.json"
    with guarded(f"loading {name}"):
        tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    loaded, expected = tokenizer.get_vocab(with_added_tokens=True), vocabulary(content)
    if loaded != expected:
        wrong = next(token for token in loaded | expected if loaded.get(token) != expected.get(token))
        raise ModelError(
            f"{name}: the token {wrong!r} has id {expected.get(wrong)} in the file, but the tokenizers library "
            f"loads it as {loaded.get(wrong)}; save the tokenizer again with transformers."
        )
    return tokenizer


def read(path: Path) -> Json:
    """Parse a tokenizer.json and check that its model type can be pruned; raises `ModelError`."""
    content = read_json(path)
    if not isinstance(content.get("model"), dict):
        raise ModelError(
            f"{path} has no 'model'; it is not a tokenizer.json. Save it again with transformers."
        )
    kind = model_type(content)
    if kind not in _REBUILD:
        raise ModelError(
            f"{path} is a {kind} tokenizer; pruning handles {', '.join(_REBUILD)} so far. Choose a base model with "
            "such a tokenizer (BLOOM, Qwen, Llama, GPT-2, …), or train without pruning."
        )
    vocab = content["model"].get("vocab")
    if not (isinstance(vocab, dict) and isinstance(content["model"].get("merges"), list)):
        raise ModelError(f"{path}: the {kind} model lacks its vocab or merges; fetch the file again.")
    if len(set(vocab.values())) < len(vocab):
        raise ModelError(f"{path}: two tokens share one id; fetch the file again.")
    return content


def read_json(path: Path) -> Json:
    """Parse a model directory's JSON file; raises `ModelError` naming the file."""
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}; give a model directory in Hugging Face layout.")
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} holds a JSON {type(content).__name__}, not an object; fetch the file again."
        )
    return content


def model_type(content: Json) -> str:
    """BPE, Unigram, WordPiece or WordLevel; older files do not say, so it is told by the fields."""
    model = content["model"]
    if model.get("type"):
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def vocabulary(content: Json) -> dict[str, int]:
    """Every token with its id: the model's, then the added ones that lie outside the model."""
    tokens: dict[str, int] = dict(content["model"]["vocab"])
    tokens.update((token["content"], token["id"]) for token in content["added_tokens"] or [])
    return tokens


def merge_pairs(model: Json) -> Iterator[tuple[str, str]]:
    """The merges in order, whether written as "a b" or as ["a", "b"]."""
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        yield left, right


def merged(model: Json, left: str, right: str) -> str:
    """The token that a merge makes; a continuing prefix of the right part disappears inside it."""
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def referenced_ids(content: Json) -> set[int]:
    """Ids that the tokenizer cannot do without: special tokens, unk, and those its stages insert."""
    tokens = vocabulary(content)
    ids = {token["id"] for token in content["added_tokens"] or [] if token["special"]}
    if (unknown := content["model"].get("unk_token")) in tokens:
        ids.add(tokens[unknown])
    _map_stage_ids(content.get("post_processor"), ids.add)
    if content.get("padding"):
        ids.add(content["padding"]["pad_id"])
    return ids


def rebuild(content: Json, new_to_old: NDArray[np.int64]) -> Json:
    """The tokenizer.json that holds the tokens `new_to_old` alone, renumbered 0, 1, 2, ….

    `new_to_old` [K] lists old ids: tokens of the model first, then added tokens outside it. The input is
    left as it was.
    """
    old_to_new = {int(old): new for new, old in enumerate(new_to_old)}
    result: Json = json.loads(json.dumps({**content, "model": None}))
    result["model"] = _REBUILD[model_type(content)](content["model"], old_to_new)
    result["added_tokens"] = sorted(
        (
            {**token, "id": old_to_new[token["id"]]}
            for token in content["added_tokens"] or []
            if token["id"] in old_to_new
        ),
        key=lambda token: token["id"],
    )
    _map_stage_ids(result.get("post_processor"), old_to_new.__getitem__)
    if result.get("padding"):
        result["padding"]["pad_id"] = old_to_new[result["padding"]["pad_id"]]
    return result


def _map_stage_ids(stage: Any, change: Callable[[int], int | None]) -> None:
    """Apply `change` to every token id inside a post-processor, in place (where it returns a new id)."""
    if not isinstance(stage, dict):
        return
    for inner in stage.get("processors") or []:
        _map_stage_ids(inner, change)
    for special in (stage.get("special_tokens") or {}).values():  # TemplateProcessing
        changed = [change(token_id) for token_id in special["ids"]]
        special["ids"] = [
            old if new is None else new for old, new in zip(special["ids"], changed, strict=True)
        ]
    for role in ("sep", "cls"):  # BertProcessing, RobertaProcessing: [token, id]
        if isinstance(stage.get(role), list):
            token, token_id = stage[role]
            new = change(token_id)
            stage[role] = [token, token_id if new is None else new]


def _rebuild_bpe(model: Json, old_to_new: Mapping[int, int]) -> Json:
    """BPE: the kept tokens, and the merges whose two parts and result are kept, in order."""
    vocab: dict[str, int] = model["vocab"]
    kept = {token: old_to_new[old] for token, old in vocab.items() if old in old_to_new}
    merges = [
        merge
        for merge, (left, right) in zip(model["merges"], merge_pairs(model), strict=True)
        if left in kept and right in kept and merged(model, left, right) in kept
    ]
    return {**model, "vocab": dict(sorted(kept.items(), key=lambda item: item[1])), "merges": merges}


_REBUILD: dict[str, Callable[[Json, Mapping[int, int]], Json]] = {"BPE": _rebuild_bpe}
