"""Texts are cut only where no token reaches across."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from firefly.data.pieces import PieceEncoder
from firefly.data.sequences import EncodedTexts
from firefly.data.tokenizer import ModelTokenizer
from firefly.files import locate


def opened(path: Path) -> ModelTokenizer:
    rust = Tokenizer.from_file(str(path))
    rust.encode_special_tokens = True
    return ModelTokenizer(rust, "", "", 0, 0, "", path)


@cache
def demo() -> ModelTokenizer:
    return ModelTokenizer.load(locate("demo:base"))


def test_no_cut_goes_through_a_token(shared: Path) -> None:
    """Every token of the vocabulary that is text stays one piece."""
    for tokenizer in (demo(), opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")):
        numbers = sorted(tokenizer.rust.get_vocab(with_added_tokens=False).values())
        texts = tokenizer.rust.decode_batch([[number] for number in numbers])
        texts = [text for text in texts if text and "\ufffd" not in text]
        assert PieceEncoder(tokenizer).pieces(texts) == texts


def test_chinese_is_cut_into_words(shared: Path) -> None:
    fast = PieceEncoder(opened(shared / "tokenizers" / "qwen3" / "tokenizer.json"))
    assert len(fast.pieces(["这家酒店的早餐很丰盛，服务员也非常热情。"])) >= 5


def test_a_token_that_ends_and_begins_inside_characters_is_no_place_for_a_cut() -> None:
    """多 ends with 9A and 部 begins with E9: a merge of the two bytes reaches from one into the other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, "ļé"])}
    rust = Tokenizer(BPE(vocab, [("ļ", "é")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = ModelTokenizer(rust, "", "", 0, 0, "", Path())
    fast = PieceEncoder(tokenizer)
    text = "宇宙洪荒大多部分天地玄黄"
    pieces = fast.pieces([text])
    assert len(pieces) > 3 and any("多部" in piece for piece in pieces)
    assert fast.encode_many([text]).lists() == tokenizer.encode_many([text])


def test_tokens_that_are_whole_words_only_are_found(shared: Path) -> None:
    """Llama 3 has tokens that no merge builds: a piece that is one may be cut out of a longer word."""
    tokenizer = opened(shared / "tokenizers" / "llama3" / "tokenizer.json")
    rust = tokenizer.rust
    strings = rust.decode_batch([[number] for number in range(128000)])
    rust.model.ignore_merges = False
    merged = rust.encode_batch_fast(strings, add_special_tokens=False)
    rust.model.ignore_merges = True
    odd = [
        text for text, ids in zip(strings, merged, strict=True) if len(ids.ids) > 1 and "\ufffd" not in text
    ]
    texts = [f"的{text}的" for text in odd] + odd
    assert PieceEncoder(tokenizer).encode_many(texts).lists() == tokenizer.encode_many(texts)


def test_an_added_token_in_a_text_is_read_as_the_standard_one_reads_it(shared: Path) -> None:
    tokenizer = opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    texts = ["他说<think>想一想</think>就好。", "天<|im_end|>地", "<think", "没有"]
    assert PieceEncoder(tokenizer).encode_many(texts).lists() == tokenizer.encode_many(texts)


def test_a_piece_that_takes_the_place_of_another_is_never_taken_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("firefly.data.pieces._MEMORY_BITS", 3)
    tokenizer = demo()
    fast = PieceEncoder(tokenizer)
    for start in [*range(0, 40, 4), *range(0, 40, 4)]:
        texts = [f"第{number}章，天地玄黄，宇宙洪荒。" for number in range(start, start + 8)]
        assert fast.encode_many(texts).lists() == tokenizer.encode_many(texts)


def test_pieces_that_differ_in_length_or_in_their_last_unit_only(shared: Path) -> None:
    tokenizer = opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    fast = PieceEncoder(tokenizer)
    texts = [
        "a" * length + end for length in range(20) for end in ("", "a", "b", "\0", "\0\0", "😀", "\U0002f600")
    ]
    for _ in range(2):
        assert fast.encode_many(texts).lists() == tokenizer.encode_many(texts)


def test_only_what_is_new_is_encoded(shared: Path) -> None:
    tokenizer = opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    asked: list[str] = []

    def encode_new(pieces: list[str]) -> EncodedTexts:
        asked.extend(pieces)
        return tokenizer.encode_texts(pieces)

    fast = PieceEncoder(tokenizer, encode_new)
    texts = ["这家酒店的早餐很丰盛，", "", "早餐很丰盛，这家酒店的服务员也非常热情。"]
    fast.encode_many(texts)
    assert len(asked) == len(set(asked)) > 5
    asked.clear()
    fast.encode_many(texts[::-1])
    assert asked == []
