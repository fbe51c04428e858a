"""The faster encoder is used only where it gives the standard one's tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE

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
    assert fast.encode_many(texts) == tokenizer.encode_packed(texts)


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
    for name in ("qwen3", "llama3", "deepseek_v3", "gptoss", "gemma3"):
        assert disagreement(opened(shared / "tokenizers" / name / "tokenizer.json"), ["床前明月光"]) is None


def test_no_cut_goes_through_a_token(shared: Path) -> None:
    """Every token of the vocabulary that is text stays one piece."""
    for tokenizer in (demo()[0], opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")):
        numbers = sorted(tokenizer.rust.get_vocab(with_added_tokens=False).values())
        texts = tokenizer.rust.decode_batch([[number] for number in numbers])
        texts = [text for text in texts if text and "\ufffd" not in text]
        assert FastEncoder(tokenizer).pieces(texts)[0] == texts


def test_chinese_is_cut_into_words(shared: Path) -> None:
    fast = FastEncoder(opened(shared / "tokenizers" / "qwen3" / "tokenizer.json"))
    assert len(fast.pieces(["这家酒店的早餐很丰盛，服务员也非常热情。"])[0]) >= 5


def test_a_token_that_ends_and_begins_inside_characters_is_no_place_for_a_cut() -> None:
    """多 ends with 9A and 部 begins with E9: a merge of the two bytes reaches from one into the other."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: number for number, symbol in enumerate([*alphabet, "ļé"])}
    rust = Tokenizer(BPE(vocab, [("ļ", "é")]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = ModelTokenizer(rust, "", "", 0, 0, "", Path())
    fast = FastEncoder(tokenizer)
    assert fast.pieces(["大多部分"])[0] == ["大", "多部", "分"]
    assert fast.encode_many(["大多部分"]) == tokenizer.encode_packed(["大多部分"])


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
    assert FastEncoder(tokenizer).encode_many(texts) == tokenizer.encode_packed(texts)


def test_an_added_token_in_a_text_is_read_as_the_standard_one_reads_it(shared: Path) -> None:
    tokenizer = opened(shared / "tokenizers" / "qwen3" / "tokenizer.json")
    texts = ["他说<think>想一想</think>就好。", "天<|im_end|>地", "<think", "没有"]
    assert FastEncoder(tokenizer).encode_many(texts) == tokenizer.encode_packed(texts)


def test_a_dictionary_that_is_full_starts_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firefly.data.encoder._KNOWN_CHARACTERS", 40)
    tokenizer, _ = demo()
    fast = FastEncoder(tokenizer)
    for start in range(0, 40, 4):
        texts = [f"第{number}章，天地玄黄，宇宙洪荒。" for number in range(start, start + 8)]
        assert fast.encode_many(texts) == tokenizer.encode_packed(texts)
    assert len(fast._known) < 60


def test_what_differs_or_cannot_be_read_is_refused_with_a_word(shared: Path) -> None:
    unigram = disagreement(opened(shared / "tokenizers" / "nmt_unigram_zh" / "tokenizer.json"), [])
    assert unigram is not None and "cannot read this tokenizer" in unigram
    changed = disagreement(opened(shared / "tokenizers" / "llama2" / "tokenizer.json"), [])
    assert changed is not None and "changes plain characters" in changed
    lines = disagreement(opened(shared / "tokenizers" / "gpt2" / "tokenizer.json"), ["one\n\ntwo"])
    assert lines is not None and "differently" in lines


def test_a_single_wrong_token_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = FastEncoder.encode_many

    def wrong(self: FastEncoder, texts: list[str]) -> list[bytes]:
        ids = honest(self, texts)
        number = next(number for number, text in enumerate(texts) if "月光" in text)
        ids[number] = ids[number][:-1] + bytes([ids[number][-1] ^ 1])
        return ids

    monkeypatch.setattr(FastEncoder, "encode_many", wrong)
    assert disagreement(demo()[0], ["床前明月光"]) == "it reads '床前明月光' differently"
