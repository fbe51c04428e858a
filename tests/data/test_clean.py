"""Cleaning rules: each drops what it names and nothing else."""

from __future__ import annotations

import pytest

from firefly.data.clean import Duplicates, reject_reason
from firefly.data.example import Example


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("问", "答", None),
        ("问", " \n", "empty_target"),
        ("　", "答", "empty_input"),
        ("你好", " 你好\n", "echo"),
        ("ＡＢ", "AB", "echo"),
        ("你好", "你好！", None),
        ("问\x00", "答", "control_characters"),
        ("问", "答\ufffd", "control_characters"),
        ("问", "\ud83d", "control_characters"),
        ("问\t一\r\n二", "答😀𠀀", None),
    ],
)
def test_a_rule_drops_what_it_names(question: str, answer: str, reason: str | None) -> None:
    assert reject_reason(Example.of("K", question, answer)) == reason


def test_plain_text_has_no_question_to_be_empty_or_echoed() -> None:
    assert reject_reason(Example.plain("Text", "正文")) is None
    assert reject_reason(Example.plain("Text", " ")) == "empty_target"


def test_duplicates_are_found_across_kinds_sources_and_spacing() -> None:
    duplicates = Duplicates()
    assert duplicates(Example.of("A", "问 一", "答", "a:1")) is None
    assert duplicates(Example.of("B", " 问  一\n", "答", "b:9")) == "duplicate"
    assert duplicates(Example.of("A", "问 一", "答案", "a:2")) is None
    assert duplicates(Example.plain("A", "答")) is None
