"""Which script a token or a text is written in: for `--keep-script`, and for telling what pruning drops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import regex
from tokenizers import Tokenizer

from firefly.errors import RecipeError, choices
from firefly.prune.tokenizer import guarded

_SCRIPTS = (
    "Han Latin Hiragana Katakana Bopomofo Hangul Cyrillic Greek Arabic Hebrew Devanagari Bengali Tamil Telugu Kannada "
    "Malayalam Gujarati Gurmukhi Oriya Sinhala Thai Lao Myanmar Khmer Tibetan Georgian Armenian Ethiopic Mongolian"
).split()
_CLASSES = {"Digits": r"\p{N}", "Punctuation": r"[\p{P}\p{S}]", "Spaces": r"[\s\p{Cc}]", "Marks": r"\p{M}"}
_PATTERNS = {name: rf"\p{{Script={name}}}" for name in _SCRIPTS} | _CLASSES
_CHARACTER = regex.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items()))
_PART_OF_CHARACTER = "\ufffd"
_FIRST_CHARACTERS = 200


def script(text: str) -> str:
    """The script of most letters in `text`; without letters Digits, Punctuation, …, or Partial for lone bytes."""
    if _PART_OF_CHARACTER in text:
        return "Partial"
    found = [name for name in map(_kind, text[:_FIRST_CHARACTERS]) if name]
    letters = [name for name in found if name not in _CLASSES] or found
    return max(dict.fromkeys(letters), key=letters.count) if letters else "Other"


@cache
def _kind(character: str) -> str | None:
    """The script or class of one character."""
    match = _CHARACTER.match(character)
    return match.lastgroup if match else None


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """What each token by itself looks like to a reader."""
    with guarded("decoding its tokens"):
        texts: list[str] = tokenizer.decode_batch([[token_id] for token_id in ids], skip_special_tokens=False)
    return texts


def ids_in_scripts(tokenizer: Tokenizer, ids: Sequence[int], names: Iterable[str]) -> set[int]:
    """The tokens of which every character, spaces aside, belongs to the scripts (or character classes) `names`."""
    patterns = []
    for name in names:
        pattern = _PATTERNS.get(name.strip().title(), rf"\p{{Script={name.strip()}}}")
        try:
            regex.compile(pattern)
        except regex.error:
            raise RecipeError(
                f"--keep-script: there is no script '{name}'; {choices(name, _PATTERNS)}"
            ) from None
        patterns.append(pattern)
    if not patterns:
        return set()
    some = regex.compile("|".join(patterns))
    only = regex.compile(rf"(?:{'|'.join(patterns)}|\s)+")
    texts = zip(ids, token_texts(tokenizer, ids), strict=True)
    return {token_id for token_id, text in texts if some.search(text) and only.fullmatch(text)}
