"""Streaming: the pieces join to the whole text, no character is torn, and none waits for a later token."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from firefly.errors import ModelError
from firefly.text import StreamDecoder, token_bytes

REAL = ["qwen3", "llama2", "gemma3"]  # byte-level; byte fallback with and without a space in front
REPLACEMENT = "\ufffd"
SENTENCES = [
    "你好，流萤！",
    "👩‍👩‍👧 和 👍🏽",
    "𠮷野家\n\t两  三",
    " hello  world",
    "",
    " ",
    "▁<0xE4>",
    "é́ Ġ ½",
]
any_text = st.text(st.characters(codec="utf-8", exclude_characters=REPLACEMENT), max_size=40)
some_text = st.lists(
    st.sampled_from([*SENTENCES, "萤", "的", "😀", "a", "\u200d"]) | any_text, max_size=6
).map("".join)


@cache
def tiny() -> Tokenizer:
    """A byte-level BPE so small that most Chinese characters lie over two or three tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["流萤是一种会发光的昆虫。你好，世界！hello world 😀😃😄"] * 3, trainer)
    return tokenizer


def pieces_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = StreamDecoder.of(tokenizer)
    return [*(decoder.push(number) for number in ids), decoder.finish()]


def assert_streams(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == whole
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing was still held back


@given(some_text)
def test_pieces_join_to_the_whole_and_no_character_is_torn(text: str) -> None:
    assert_streams(tiny(), text)
    assert "".join(pieces_of(tiny(), tiny().encode(text).ids)) == text


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(shared: Path, name: str) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / name / "tokenizer.json"))
    for text in SENTENCES:
        assert_streams(tokenizer, text)

    @settings(max_examples=60, deadline=None)
    @given(some_text)
    def check(text: str) -> None:
        assert_streams(tokenizer, text)

    check()


@given(some_text)
def test_every_character_comes_with_its_last_byte(text: str) -> None:
    """After k tokens the pieces are exactly the characters whose bytes are all there."""
    ids = tiny().encode(text).ids
    table, decoder = token_bytes(tiny()), StreamDecoder.of(tiny())
    data, shown = b"", ""
    for number in ids:
        data += table(number) or b""
        shown += decoder.push(number)
        assert shown == data.decode("utf-8", errors="ignore")


@given(st.lists(st.integers(0, 400), max_size=30))
def test_any_ids_give_what_the_tokenizer_decodes(ids: list[int]) -> None:
    """A model may write anything: broken bytes become �, special and unknown ids are silent."""
    known = [number for number in ids if number < tiny().get_vocab_size()]
    assert "".join(pieces_of(tiny(), ids)) == tiny().decode(known, skip_special_tokens=True)


def test_an_unfinished_character_is_flushed_as_replacement() -> None:
    decoder = StreamDecoder({1: b"\xe6\xb5", 2: b"\x81\xe8", 3: b"A"}.get)
    assert [decoder.push(1), decoder.push(2), decoder.finish()] == ["", "流", REPLACEMENT]
    decoder = StreamDecoder({1: b"\xe6\xb5", 3: b"A"}.get)
    assert [decoder.push(1), decoder.push(3), decoder.finish()] == ["", REPLACEMENT + "A", ""]


def test_added_tokens_stand_for_their_own_text() -> None:
    tokenizer = Tokenizer.from_str(tiny().to_str())
    tokenizer.add_tokens(["<think>", "思考中"])
    ids = tokenizer.encode("<s>流<think>思考中萤</s>").ids
    assert "".join(pieces_of(tokenizer, ids)) == "流<think>思考中萤"


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece()])
def test_other_decoders_are_refused(decoder: object) -> None:
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    if decoder is not None:
        tokenizer.decoder = decoder
    with pytest.raises(ModelError, match="byte-level or SentencePiece"):
        StreamDecoder.of(tokenizer)
