"""Surgery on `tokenizer.json`: the same tokenizer with fewer tokens, every other stage as it was.

`read` checks a file before anything trusts it. `rebuild` renumbers the kept tokens and remaps every id that
the other stages hold (added tokens, post-processor, padding). What differs between model types is one
function each in `_CHECK` and `_REBUILD`. `load` turns the tokenizers library's panics into a sentence.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from firefly.errors import FireflyError, ModelError
from firefly.files import write_atomic

Json = dict[str, Any]
MOST_IDS = 1 << 24  # far above every real vocabulary; an id of 2³²−1 must not allocate 32 GiB
_PLACEHOLDER = re.compile(
    r"[<\[].{0,20}(unused|reserved|place.?holder|dummy|control_\d|special_\d).{0,30}[>\]]", re.IGNORECASE
)
# Some of transformers' tokenizer classes add these of their own accord where they are lacking.
_CLASS_DEFAULT = re.compile(r"[<\[]\|?(mask|pad|unk|bos|eos|cls|sep|/?s)\|?[>\]]", re.IGNORECASE)


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


def load(source: Path | Json, content: Json | None = None) -> Tokenizer:
    """Load a tokenizer.json (a path, or its parsed content) for exact work: no truncation, padding or dropout.

    Args:
        content: what `read` made of the path, where the caller has it.

    Raises `ModelError` for anything that the tokenizers library refuses or panics at, and when the loaded
    ids are not those in the file (the library renumbers added tokens silently).
    """
    if isinstance(source, Path):
        name, content = str(source), content or read(source)
    else:
        name, content = "tokenizer.json", source
    with guarded(f"loading {name}"):
        if isinstance(source, Path):
            tokenizer = Tokenizer.from_file(name)
        else:
            tokenizer = Tokenizer.from_str(json.dumps(content, ensure_ascii=False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    if type(tokenizer.model).__name__ != model_type(content):
        raise ModelError(
            f"{name} looks like a {model_type(content)} tokenizer, but the tokenizers library loads it as "
            f"{type(tokenizer.model).__name__}; save the tokenizer again with transformers."
        )
    expected = vocabulary(content)
    same = list(map(tokenizer.token_to_id, expected)) == list(expected.values())
    if not same or tokenizer.get_vocab_size(with_added_tokens=True) != len(expected):
        loaded = tokenizer.get_vocab(with_added_tokens=True)
        wrong = next(token for token in loaded | expected if loaded.get(token) != expected.get(token))
        raise ModelError(
            f"{name}: the token {wrong!r} has id {expected.get(wrong)} in the file, but the tokenizers library "
            f"loads it as {loaded.get(wrong)}; save the tokenizer again with transformers."
        )
    if unknown := referenced_ids(content) - set(expected.values()):
        raise ModelError(
            f"{name}: a stage inserts the id {min(unknown)}, which no token has; fetch it again."
        )
    return tokenizer


def read(path: Path) -> Json:
    """Parse a tokenizer.json and check all that pruning relies on; raises `ModelError`."""
    if path.is_file() and path.open("rb").read(3) == b"\xef\xbb\xbf":
        raise ModelError(
            f"{path} begins with a byte order mark, at which the tokenizers library stops; save it without one."
        )
    content = read_json(path)
    if not isinstance(content.get("model"), dict):
        raise ModelError(
            f"{path} has no 'model'; it is not a tokenizer.json. Save it again with transformers."
        )
    kind = model_type(content)
    if kind not in _CHECK:
        raise ModelError(
            f"{path} is a {kind} tokenizer; pruning handles {', '.join(_CHECK)}. Choose a base model with "
            "such a tokenizer, or train without pruning."
        )
    try:
        _CHECK[kind](content["model"])
        _check_ids(content)
    except _Damaged as error:
        raise ModelError(f"{path}: {error}; fetch the file again.") from None
    return content


def read_json(path: Path) -> Json:
    """Parse a model directory's JSON file; raises `ModelError` naming the file."""
    if not path.is_file():
        raise ModelError(f"{path.parent} has no {path.name}; give a model directory in Hugging Face layout.")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); fetch the file again.") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} holds a JSON {type(content).__name__}, not an object; fetch the file again."
        )
    return content


def write(path: Path, content: Json) -> None:
    """Write a tokenizer.json as `json.dumps(indent=2)` lays it out, in a tenth of the time."""
    write_atomic(path, _indented(content, "\n") + "\n")


def _indented(value: Any, newline: str) -> str:
    """A JSON value on several lines; only where no value lies deeper can the C encoder indent."""
    inner = newline + "  "
    if not isinstance(value, dict | list) or not value:
        return json.dumps(value, ensure_ascii=False)
    items = value.values() if isinstance(value, dict) else value
    if not any(isinstance(item, dict | list) for item in items):
        body = json.dumps(value, ensure_ascii=False, separators=(f",{inner}", ": "))[1:-1]
    elif isinstance(value, dict):
        body = f",{inner}".join(
            f"{json.dumps(key, ensure_ascii=False)}: {_indented(item, inner)}" for key, item in value.items()
        )
    else:
        body = f",{inner}".join(_indented(item, inner) for item in value)
    return f"{'{' if isinstance(value, dict) else '['}{inner}{body}{newline}{'}' if isinstance(value, dict) else ']'}"


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


def model_vocabulary(model: Json) -> dict[str, int]:
    """The model's own tokens with their ids; a Unigram model lists [token, score] in id order."""
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        return vocab
    return {token: place for place, (token, _) in enumerate(vocab)}


def added_tokens(content: Json) -> list[Json]:
    """The entries of tokens that are found in the text before the model sees it."""
    return content.get("added_tokens") or []


def vocabulary(content: Json) -> dict[str, int]:
    """Every token with its id: the model's, then the added ones that lie outside the model."""
    tokens = dict(model_vocabulary(content["model"]))
    tokens.update((token["content"], token["id"]) for token in added_tokens(content))
    return tokens


def is_placeholder(token: str) -> bool:
    """Whether a token's name says that its maker reserved it and nothing uses it (`<unused7>`, `[control_9]`)."""
    return _PLACEHOLDER.fullmatch(token) is not None


def merge_pairs(model: Json) -> list[tuple[str, str]]:
    """The merges in order, whether written as "a b" or as ["a", "b"]."""
    return [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]


def merged(model: Json, left: str, right: str) -> str:
    """The token that a merge makes; a continuing prefix of the right part disappears inside it."""
    return left + right[len(model.get("continuing_subword_prefix") or "") :]


def merge_products(model: Json, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """`merged` for many pairs."""
    if model.get("continuing_subword_prefix"):
        return [merged(model, left, right) for left, right in pairs]
    return [left + right for left, right in pairs]


def unknown_id(content: Json) -> int | None:
    """The id that stands for what the vocabulary cannot write, if the model has one."""
    model = content["model"]
    if isinstance(model["vocab"], list):
        unknown: int | None = model.get("unk_id")
        return unknown
    return model_vocabulary(model).get(model.get("unk_token") or "")


def referenced_ids(content: Json) -> set[int]:
    """Ids that the tokenizer cannot do without: unk, those its stages insert, and special tokens in use."""
    ids = {
        token["id"]
        for token in added_tokens(content)
        if _CLASS_DEFAULT.fullmatch(token["content"])
        or (token["special"] and not is_placeholder(token["content"]))
    }
    if (unknown := unknown_id(content)) is not None:
        ids.add(unknown)
    map_stage_ids(content.get("post_processor"), ids.add)
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
            for token in added_tokens(content)
            if token["id"] in old_to_new
        ),
        key=lambda token: token["id"],
    )
    map_stage_ids(result.get("post_processor"), old_to_new.__getitem__)
    if result.get("padding"):
        result["padding"]["pad_id"] = old_to_new[result["padding"]["pad_id"]]
    return result


def map_stage_ids(stage: Any, change: Callable[[int], Any]) -> None:
    """Apply `change` to every token id inside a post-processor, in place (where it returns a new id)."""
    if not isinstance(stage, dict):
        return
    for inner in stage.get("processors") or []:
        map_stage_ids(inner, change)
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
    pairs = merge_pairs(model)
    merges = [
        merge
        for merge, (left, right), product in zip(
            model["merges"], pairs, merge_products(model, pairs), strict=True
        )
        if product in kept and left in kept and right in kept
    ]
    return {**model, "vocab": dict(sorted(kept.items(), key=lambda item: item[1])), "merges": merges}


def _rebuild_unigram(model: Json, old_to_new: Mapping[int, int]) -> Json:
    """Unigram: the kept [token, score] pairs, whose places are their ids."""
    kept = [list(piece) for old, piece in enumerate(model["vocab"]) if old in old_to_new]
    unknown = model.get("unk_id")
    return {**model, "vocab": kept, "unk_id": None if unknown is None else old_to_new[unknown]}


def _rebuild_wordpiece(model: Json, old_to_new: Mapping[int, int]) -> Json:
    """WordPiece: the kept tokens; unk goes by name."""
    kept = {token: old_to_new[old] for token, old in model["vocab"].items() if old in old_to_new}
    return {**model, "vocab": dict(sorted(kept.items(), key=lambda item: item[1]))}


_REBUILD: dict[str, Callable[[Json, Mapping[int, int]], Json]] = {
    "BPE": _rebuild_bpe,
    "Unigram": _rebuild_unigram,
    "WordPiece": _rebuild_wordpiece,
}


class _Damaged(Exception):
    """What is wrong with a tokenizer.json, without the file's name."""


def _check_bpe(model: Json) -> None:
    """A dict of tokens, and merges whose parts and products are in it (the library panics at a missing product)."""
    _check_wordpiece(model)
    vocab: dict[str, int] = model["vocab"]
    if not isinstance(model.get("merges"), list):
        raise _Damaged("the BPE model has no list of merges")
    if _merges_are_sound(model):
        return
    for place, merge in enumerate(model["merges"]):  # one is not, and this loop finds it
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(part, str) for part in parts)):
            raise _Damaged(f"merge {place} is {merge!r}, not two tokens")
        for token in (*parts, merged(model, *parts)):
            if token not in vocab:
                raise _Damaged(
                    f"merge {place}, '{parts[0]} {parts[1]}', uses {token!r}, which is not in the vocabulary"
                )


def _merges_are_sound(model: Json) -> bool:
    """Whether every merge is two strings that, like their product, are in the vocabulary."""
    if not set(map(type, model["merges"])) <= {str, list}:
        return False
    pairs = merge_pairs(model)
    if not set(map(len, pairs)) <= {2} or not set(map(type, chain.from_iterable(pairs))) <= {str}:
        return False
    used = chain(chain.from_iterable(pairs), merge_products(model, pairs))
    return all(map(model["vocab"].__contains__, used))


def _check_unigram(model: Json) -> None:
    """A list of different [token, finite score] pairs, and an unk among them."""
    vocab = model.get("vocab")
    if not isinstance(vocab, list):
        raise _Damaged("the Unigram model has no list of [token, score] pairs")
    for place, piece in enumerate(vocab):
        if not (isinstance(piece, list) and len(piece) == 2 and isinstance(piece[0], str)):
            raise _Damaged(f"piece {place} of the vocabulary is {piece!r}, not [token, score]")
        score = piece[1]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise _Damaged(f"the score of {piece[0]!r} is {score!r}, not a number")
    if len({token for token, _ in vocab}) < len(vocab):
        raise _Damaged("a token stands twice in the vocabulary")
    unknown = model.get("unk_id")
    if unknown is not None and not (_is_id(unknown) and unknown < len(vocab)):
        raise _Damaged(f"unk_id is {unknown!r}, which no token has")


def _check_wordpiece(model: Json) -> None:
    """A dict of tokens with ids, and strings where strings belong."""
    if not isinstance(model.get("vocab"), dict):
        raise _Damaged("the model has no vocabulary of tokens with ids")
    for key in ("unk_token", "continuing_subword_prefix", "end_of_word_suffix"):
        if not isinstance(model.get(key), str | None):
            raise _Damaged(f"{key} is {model[key]!r}, not a string")


def _check_ids(content: Json) -> None:
    """Every id is a number that a real vocabulary reaches, and belongs to one token alone."""
    if not isinstance(added_tokens(content), list):
        raise _Damaged("added_tokens is not a list")
    for token in added_tokens(content):
        if not (
            isinstance(token, dict)
            and isinstance(token.get("content"), str)
            and isinstance(token.get("special"), bool)
            and "id" in token
        ):
            raise _Damaged(f"the added token {str(token)[:100]} lacks its content, id or special flag")
    tokens = vocabulary(content)
    if not tokens:
        raise _Damaged("the vocabulary is empty")
    for name, token_id in tokens.items():
        if not _is_id(token_id):
            raise _Damaged(f"the token {name!r} has the id {token_id!r}, which no real vocabulary reaches")
    if len(set(tokens.values())) < len(tokens):
        raise _Damaged("two tokens share one id")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < MOST_IDS


_CHECK: dict[str, Callable[[Json], None]] = {
    "BPE": _check_bpe,
    "Unigram": _check_unigram,
    "WordPiece": _check_wordpiece,
}
