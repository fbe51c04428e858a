"""The table of verse counts what its docstring says, and notices what is broken on purpose."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

TOOL = runpy.run_path(str(Path(__file__).parents[1] / "tools" / "verse_table.py"))
POEM = "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"
FIRST, SECOND = "无边落木萧萧下", "不尽长江滚滚来"


def couplet(question: str, reference: str, answer: str) -> dict[str, list[int]]:
    counts: dict[str, list[int]] = {}
    TOOL["count_couplet"](question, reference, answer, counts)
    return {name.removeprefix("couplets: "): entry for name, entry in counts.items()}


@pytest.mark.parametrize(
    ("question", "reference"),
    [(f"对下联：{FIRST}", SECOND), (f"由下联反推上联：{SECOND}", FIRST)],
)
def test_true_couplets_pass_in_both_directions(question: str, reference: str) -> None:
    assert couplet(question, reference, reference) == {
        "equal length": [1, 1],
        "even positions with opposite tones": [3, 3],
        "right closing tone": [1, 1],
    }


def test_broken_couplets_do_not() -> None:
    cut = couplet(f"对下联：{FIRST}", SECOND, SECOND[:4])
    assert cut["equal length"] == [0, 1] and cut["even positions with opposite tones"] == [2, 3]
    echoed = couplet(f"对下联：{FIRST}", SECOND, FIRST)
    assert echoed["even positions with opposite tones"] == [0, 3] and echoed["right closing tone"] == [0, 1]
    assert couplet(f"对下联：{FIRST}", SECOND, "")["right closing tone"] == [0, 1]


@pytest.mark.parametrize(
    ("question", "right"),
    [
        ("写一首五言绝句，题为《登鹳雀楼》。", True),
        ("写一首七言绝句，题为《登鹳雀楼》。", False),
        ("以《登鹳雀楼》为题写一首古诗。", True),
        ("续诗，从第一句写起：白日依山尽", True),
    ],
)
def test_the_form_is_the_one_that_was_asked_for(question: str, right: bool) -> None:
    assert TOOL["right_form"](question, POEM, POEM) is right


def test_a_first_line_sets_the_length_and_an_acrostic_the_number_of_lines() -> None:
    seven = "月落乌啼霜满天，江枫渔火对愁眠。\n姑苏城外寒山寺，夜半钟声到客船。"
    assert not TOOL["right_form"]("续诗，从第一句写起：白日依山尽", POEM, seven)
    assert TOOL["right_form"]("藏头诗：白黄欲更", POEM, seven)
    assert not TOOL["right_form"]("藏头诗：白黄欲更", POEM, f"{seven}\n{seven.replace('月', '日')}")


@pytest.mark.parametrize(("old", "rhymes"), [("", 1), ("楼", 0)])
def test_poems_rhyme_by_the_book(old: str, rhymes: int) -> None:
    counts: dict[str, Any] = {}
    TOOL["count_poem"]("五言绝句", POEM, POEM.replace(old, "山") if old else POEM, counts)
    assert counts["poems: rhyme"] == [rhymes, 1]


def test_a_given_first_line_is_kept_or_not() -> None:
    kept = "poems: the given first line, word for word"
    counts: dict[str, Any] = {}
    TOOL["count_poem"]("写一首五言绝句，题为《登鹳雀楼》。", POEM, POEM, counts)
    assert kept not in counts
    for answer in (POEM, POEM.replace("依", "西"), ""):
        TOOL["count_poem"]("续诗，从第一句写起：白日依山尽", POEM, answer, counts)
    assert counts[kept] == [1, 3]


def test_a_repeated_line_is_no_poem() -> None:
    line = POEM.split("\n")[0]
    assert not TOOL["right_form"]("写一首五言绝句", POEM, f"{line}\n{line}")


def test_every_answer_is_counted_for_every_model() -> None:
    scores = {"held_out": {"AncientPoem": {"bits_per_byte": 2.0}}, "answers": {}}
    results = {
        "models": {"base": scores, "tuned": {**scores, "held_out": {"AncientPoem": {"bits_per_byte": 1.5}}}}
    }
    asked = {"kind": "AncientPoem", "question": "写一首五言绝句", "reference": POEM}
    answers = [asked | {"answers": {"base": "春眠", "tuned": POEM}}] * 10
    lines = TOOL["table"](results, answers)
    assert "| poems: right form | 10 | 0.0% | 100.0% |" in lines
    assert "| bits per byte: AncientPoem | | 2.000 | 1.500 (-25%) |" in lines
