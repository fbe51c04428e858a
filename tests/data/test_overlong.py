"""What is too long is cut as the recipe says, at the borders of characters, and every cut has its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from firefly.data.chatformat import ChatFormat, open_format
from firefly.data.example import Example, Message
from firefly.data.overlong import Part, fit
from firefly.data.tokenizer import ModelTokenizer
from firefly.errors import InputError
from firefly.recipe import DataSection

LIMIT = 48
TEXT = st.text(st.sampled_from("春眠不觉晓abc 😀\n"), max_size=60)


@pytest.fixture(scope="module")
def chat_format(tiny: Callable[[str], Path]) -> ChatFormat:
    return open_format("firefly", ModelTokenizer.load(tiny("bloom")))


def parts(example: Example, chat_format: ChatFormat, **options: Any) -> list[Part]:
    table = {"sources": [{"path": "none"}], "max_seq_length": LIMIT} | options
    whole = chat_format.render(example.messages)
    return list(fit(example, whole, chat_format, DataSection.model_validate(table)))


def conversation(*contents: str, system: str = "") -> Example:
    turns = [Message("system", system)] * bool(system)
    roles = ("user", "assistant")
    return Example("K", (*turns, *(Message(roles[i % 2], text) for i, text in enumerate(contents))), "f:1")


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["middle-of-input", "left-of-input"]),
    st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
)
def test_the_last_answer_stays_whole_or_the_sample_goes(
    chat_format: ChatFormat, policy: str, contents: list[str]
) -> None:
    (part,) = parts(conversation(*contents), chat_format, overlong=policy, allow_lost_targets=True)
    tokenizer = chat_format.tokenizer
    ending = [*tokenizer.encode(contents[-1]), tokenizer.eos_id]
    if part.sample is None:
        assert part.reasons == ("target_lost",) and len(ending) + 4 > LIMIT - 6
        return
    assert len(part.sample.ids) <= LIMIT
    assert part.sample.ids[-len(ending) :] == ending and all(part.sample.mask[-len(ending) :])
    assert "\ufffd" not in tokenizer.decode(part.sample.ids)  # no character was cut in two
    whole = chat_format.render(conversation(*contents).messages)
    assert (part.sample == whole) == (not part.reasons) == (len(whole.ids) <= LIMIT)


def test_the_middle_of_the_input_goes(chat_format: ChatFormat) -> None:
    question = "开头" + "问" * 60 + "结尾"
    (part,) = parts(conversation(question, "答"), chat_format)
    assert part.sample is not None and part.reasons == ("input_middle_cut",)
    text = chat_format.tokenizer.decode(part.sample.ids)
    assert text.startswith("开头问") and text.endswith("问结尾答") and text.count("…") == 1
    assert LIMIT - 6 <= len(part.sample.ids) <= LIMIT and part.target_bytes == 3


def test_the_beginning_of_the_input_goes(chat_format: ChatFormat) -> None:
    question = "开头" + "问" * 60 + "结尾"
    (part,) = parts(conversation(question, "答"), chat_format, overlong="left-of-input")
    assert part.sample is not None and part.reasons == ("input_start_cut",)
    assert chat_format.tokenizer.decode(part.sample.ids).startswith("…问")


def test_the_oldest_exchanges_go_first_and_the_system_message_stays(chat_format: ChatFormat) -> None:
    turns = [text for number in range(9) for text in (f"问{number}", f"答{number}")]
    (part,) = parts(conversation(*turns, system="系统"), chat_format)
    assert part.sample is not None and part.reasons == ("turns_dropped",)
    text = chat_format.tokenizer.decode(part.sample.ids)
    kept = [number for number in range(9) if f"答{number}" in text]
    assert text.startswith("系统") and kept == list(range(9 - len(kept), 9)) and 0 < len(kept) < 9
    longer = conversation(*turns[2 * (8 - len(kept)) :], system="系统")
    assert len(chat_format.render(longer.messages).ids) > LIMIT  # not one more would have fitted


def test_an_answer_that_is_too_long_alone_is_an_error_unless_allowed(chat_format: ChatFormat) -> None:
    example = conversation("问", "答" * 60)
    with pytest.raises(InputError, match=r"f:1 \(K\): the answer alone fills max_seq_length = 48"):
        parts(example, chat_format)
    assert parts(example, chat_format, allow_lost_targets=True) == [Part(None, reasons=("target_lost",))]
    (cut,) = parts(example, chat_format, overlong="right-of-target")
    assert cut.sample is not None and cut.reasons == ("target_end_cut",)
    assert cut.sample.ids[-1] != chat_format.tokenizer.eos_id and cut.sample.mask[-1]


def test_a_cut_that_falls_into_a_question_ends_with_the_answer_before(chat_format: ChatFormat) -> None:
    (part,) = parts(conversation("问", "答", "再问" * 40, "再答"), chat_format, overlong="right-of-target")
    assert part.sample == chat_format.render(conversation("问", "答").messages)
