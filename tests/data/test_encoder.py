"""The faster encoder is used only where it gives the standard one's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from firefly.data.encoder import PROBES, FastEncoder, disagreement
from firefly.data.tokenizer import ModelTokenizer
from firefly.files import locate

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def opened(path: Path) -> ModelTokenizer:
    rust = Tokenizer.from_file(str(path))
    rust.encode_special_tokens = True
    return ModelTokenizer(rust, "", "", 0, 0, "", path)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(ANY | st.sampled_from(PROBES), max_size=4))
def test_it_encodes_any_text_as_the_standard_one(texts: list[str]) -> None:
    tokenizer, fast = demo()
    assert fast.encode_many(texts) == tokenizer.encode_many(texts)


def demo(made: list[Any] = []) -> tuple[ModelTokenizer, FastEncoder]:  # noqa: B006 - opened once
    if not made:
        tokenizer = ModelTokenizer.load(locate("demo:base"))
        made += [tokenizer, FastEncoder(tokenizer)]
    return made[0], made[1]


def test_byte_level_tokenizers_pass_the_proof(tiny: Callable[[str], Path], shared: Path) -> None:
    for directory in (locate("demo:base"), tiny("bloom")):
        assert (
            disagreement(ModelTokenizer.load(directory), ["床前明月光，疑是地上霜。", "quick brown"]) is None
        )
    for name in ("qwen3", "llama3"):
        assert disagreement(opened(shared / "tokenizers" / name / "tokenizer.json"), ["床前明月光"]) is None


def test_what_differs_or_cannot_be_read_is_refused_with_a_word(shared: Path) -> None:
    unigram = disagreement(opened(shared / "tokenizers" / "nmt_unigram_zh" / "tokenizer.json"), [])
    assert unigram is not None and "cannot read this tokenizer" in unigram
    wordy = disagreement(opened(shared / "tokenizers" / "t5_small" / "tokenizer.json"), [])
    assert wordy is not None and "differently" in wordy


def test_a_single_wrong_token_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FastEncoder.encode_many

    def wrong(self: FastEncoder, texts: list[str]) -> list[list[int]]:
        ids = honest(self, texts)
        number = next(number for number, text in enumerate(texts) if "月光" in text)
        ids[number] = [*ids[number][:-1], ids[number][-1] + 1]
        return ids

    monkeypatch.setattr(FastEncoder, "encode_many", wrong)
    assert disagreement(demo()[0], ["床前明月光"]) == "it reads '床前明月光' differently"
