"""The faster encoders are used only where they give the standard one's tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from firefly.data.encoder import ENCODERS, PROBES, Encoder, KitokenEncoder, fastest, proved
from firefly.data.pieces import PieceEncoder
from firefly.data.sequences import EncodedTexts
from firefly.data.tokenizer import ModelTokenizer
from firefly.files import locate

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


def opened(path: Path) -> ModelTokenizer:
    rust = Tokenizer.from_file(str(path))
    rust.encode_special_tokens = True
    return ModelTokenizer(rust, "", "", 0, 0, "", path)


@cache
def demo() -> tuple[ModelTokenizer, list[Encoder]]:
    tokenizer = ModelTokenizer.load(locate("demo:base"))
    return tokenizer, [make(tokenizer) for make in ENCODERS.values()]


@settings(deadline=None, max_examples=150)
@given(st.lists(ANY | st.sampled_from(PROBES), max_size=4))
def test_they_encode_any_text_as_the_standard_one(texts: list[str]) -> None:
    tokenizer, encoders = demo()
    for encoder in encoders:
        for _ in range(2):  # new texts, and remembered ones
            assert encoder.encode_many(texts).lists() == tokenizer.encode_many(texts)


@pytest.mark.parametrize("name", ENCODERS)
def test_byte_level_tokenizers_pass_the_proof(name: str, tiny: Callable[[str], Path], shared: Path) -> None:
    texts = ["床前明月光，疑是地上霜。", "quick brown"]
    for directory in (locate("demo:base"), tiny("bloom")):
        assert not isinstance(proved(name, ModelTokenizer.load(directory), texts), str)
    for family in ("qwen3", "llama3"):
        tokenizer = opened(shared / "tokenizers" / family / "tokenizer.json")
        assert not isinstance(proved(name, tokenizer, texts), str)


def test_what_differs_or_cannot_be_read_is_refused_with_a_word(shared: Path) -> None:
    def refused(family: str, name: str, texts: list[str]) -> str:
        tokenizer = opened(shared / "tokenizers" / family / "tokenizer.json")
        found = proved(name, tokenizer, texts)
        return found if isinstance(found, str) else "accepted"

    assert "cannot read this tokenizer" in refused("nmt_unigram_zh", "kitoken", [])
    assert "differently" in refused("t5_small", "kitoken", [])
    assert "not byte-pair encoding" in refused("t5_small", "pieces", [])
    assert "changes plain characters" in refused("llama2", "pieces", [])
    # `\\s+(?!\\S)` leaves the last line feed to the word behind it, which a cut there would hide
    assert "differently" in refused("gpt2", "pieces", ["one\n\ntwo"])


def wrong_about_moonlight(self: KitokenEncoder, texts: list[str]) -> EncodedTexts:
    ids = self.tokenizer.encode_many(texts)
    for number, text in enumerate(texts):
        if "月" in text:
            ids[number][-1] ^= 1
    return EncodedTexts.of(ids)


def test_a_single_wrong_token_fails_the_proof_and_the_next_encoder_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(KitokenEncoder, "encode_many", wrong_about_moonlight)
    encoder, refused = fastest(demo()[0], ["床前明月光"])
    reason = "it reads '床前明月光' differently"
    assert isinstance(encoder, PieceEncoder) and refused == {"pieces of kitoken": reason, "kitoken": reason}
