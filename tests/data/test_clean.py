"""Cleaning rules: each mends or drops what it names and nothing else."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.clean import clean
from firefly.data.example import Example, Message
from firefly.data.readers import read_records
from firefly.recipe import CleanSection

SHIJING = "\n".join(
    f"采采芣苢，薄言{first}之。采采芣苢，薄言{second}之。" for first, second in ("采有", "掇捋", "袺襭")
)
LIST = "\n".join(
    f"{n}. 保持{word}，每天坚持一小时。" for n, word in enumerate("运动 阅读 睡眠 写作 散步 冥想".split())
)


def reason(question: str, answer: str, **options: Any) -> str | None:
    return clean(Example.of("K", question, answer), CleanSection(**options))[1]


def mended(answer: str, **options: Any) -> str:
    example, why = clean(Example.of("K", "问", answer), CleanSection(**options))
    assert why is None
    return example.target


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("问", "答", None),
        ("问", " \n", "empty_target"),
        ("　", "答", "empty_input"),
        ("你好", " 你好\n", "echo"),
        ("ＡＢ", "AB", "echo"),
        ("①", "1", "echo"),
        ("你好", "你好！", None),
        ("问\x00", "答", "control_characters"),
        ("问", "答\ufffd", "control_characters"),
        ("问", "\ud83d", "control_characters"),
        ("问\t一\r\n二", "答😀𠀀", None),
        ("问", "锟斤拷锟斤拷", "mojibake"),
        ("问", "itâ€™s fine", "mojibake"),
        ("问", "cafÃ© olÃ©", "mojibake"),
        ("问", "ÄãºÃÂð£¬ÊÀ½ç", "mojibake"),
        ("问", "好烫烫烫的咖啡", None),
        ("问", "Çà et là, où « l’été » naît, à 20 °C ± 3 × 2 ······ São Tomé, TÜRKÇE, ÅÄÖ", None),
        ("问", "木匠用锛子和斧凿，也认得銆这个字。", None),
        ("问", "太烫了" * 12, "repetition"),
        ("问", "I like apples.\n" * 9, "repetition"),
        ("问", "哈哈哈哈哈哈", None),
        ("问", SHIJING, None),
        ("问", LIST, None),
        ("问", "def f():\n" + "            return 1\n" * 2, None),
    ],
)
def test_a_rule_drops_what_it_names(question: str, answer: str, expected: str | None) -> None:
    assert reason(question, answer) == expected


def test_every_turn_of_a_conversation_is_looked_at() -> None:
    def judged(*contents: str) -> str | None:
        roles = ("user", "assistant") * 2
        turns = tuple(Message(role, text) for role, text in zip(roles, contents, strict=True))  # type: ignore[arg-type]
        return clean(Example("K", turns), CleanSection())[1]

    assert judged("问", "答", "再问", "再答") is None
    assert judged("问", " ", "再问", "再答") == "empty_target"
    assert judged("问", "答", "", "再答") == "empty_input"
    assert judged("问", "答\x07", "再问", "再答") == "control_characters"
    assert judged("问", "太烫了" * 12, "再问", "再答") == "repetition"


def test_plain_text_has_no_question_to_be_empty_or_echoed() -> None:
    assert clean(Example.plain("Text", "正文"), CleanSection())[1] is None
    assert clean(Example.plain("Text", " "), CleanSection())[1] == "empty_target"


def test_bounds_are_the_recipes() -> None:
    assert reason("问", "三个字", min_target_characters=4) == "too_short"
    assert reason("问", "四个字了", min_target_characters=4) is None
    assert reason("问", "四个字了", max_characters=4) == "too_long"
    assert reason("问", "太烫了" * 12, max_repetition=1) is None
    assert reason("问", "锟斤拷", mojibake="keep") is None


@pytest.mark.parametrize(
    ("text", "languages", "expected"),
    [
        ("这是中文。", ["zh"], None),
        ("这是中文，mostly English words here。", ["zh"], "wrong_language"),
        ("这是中文，mostly English words here。", ["zh", "en"], None),
        ("Это русский текст.", ["zh", "en"], "wrong_language"),
        ("これはにほんごです。", ["zh"], "wrong_language"),
        ("3.14 + 42 = ?", ["zh"], None),
    ],
)
def test_languages_are_counted_in_letters(text: str, languages: list[str], expected: str | None) -> None:
    assert reason("1?", text, min_language_share=0.5, languages=languages) == expected
    assert reason("1?", text) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("第一段。<br/>第二段。", "第一段。\n第二段。"),
        ("<p>第一段。</p>\n\n<p style='a'>第二段。</p>", "第一段。\n\n第二段。"),
        ("<strong>释名</strong>款冻", "释名款冻"),
        ("彼得&#183;林奇&amp;hellip;&nbsp;完", "彼得·林奇… 完"),
        ("a < b && c > d，List<String>，<unk>，A&B;", "a < b && c > d，List<String>，<unk>，A&B;"),
        ("HTML 用 <br> 换行，用 &lt; 写小于号。", "HTML 用 <br> 换行，用 &lt; 写小于号。"),
        ("if (a &gt; 1) {\n  show('<b>')\n}", "if (a > 1) {\n  show('<b>')\n}"),
        ("<html><body><p>页</p></body></html>", "<html><body><p>页</p></body></html>"),
    ],
)
def test_html_remains_go_and_lessons_about_html_stay(text: str, expected: str) -> None:
    assert mended(text) == expected
    assert mended(text, html="keep") == text


def test_html_can_be_a_reason_to_drop() -> None:
    assert reason("问", "一。<br>二。", html="drop") == "html"
    assert reason("写一段 HTML", "一。<br>二。", html="drop") is None
    assert reason("画一个饼图", '<img src="pie.png">') == "empty_target"


def test_script_and_width_are_options() -> None:
    text = "乾隆年間，天氣乾燥，ＡＢＣ１２３，！"
    assert mended(text) == text
    assert mended(text, simplify=True) == "乾隆年间，天气干燥，ＡＢＣ１２３，！"
    assert mended(text, half_width=True) == "乾隆年間，天氣乾燥，ABC123，！"


def test_sound_examples_are_the_same_object() -> None:
    example = Example.of("K", "问", "答")
    assert clean(example, CleanSection(half_width=True, simplify=True))[0] is example


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60), st.text(max_size=60))
def test_mending_twice_changes_nothing_more(question: str, answer: str) -> None:
    options = CleanSection(half_width=True)
    once, why = clean(Example.of("K", question, answer), options)
    assert clean(once, options) == (once, why)


@pytest.mark.parametrize(
    ("written", "read"),
    [("utf-8", "gbk"), ("utf-8", "cp1252"), ("gbk", "latin-1"), ("utf-8", "latin-1")],
)
def test_real_text_read_with_a_wrong_table_is_found_and_sound_text_is_not(
    shared: Path, written: str, read: str
) -> None:
    found, num_texts = 0, 0
    for _, record in read_records(shared / "data" / "pack" / "prose_luxun.jsonl.zst"):
        at = random.Random(record["title"]).randrange(max(1, len(record["text"]) - 60))
        text = " ".join(record["text"][at : at + 60].split())
        if len(text) < 20 or any(mark in text for mark in "�□"):
            continue
        wrong = text.encode(written, "ignore").decode(read, "replace").replace("\ufffd", "?")
        wrong = "".join(character for character in wrong if not 0x7F <= ord(character) < 0xA0)
        num_texts += 1
        found += reason("问", wrong) == "mojibake"
        assert reason("问", text) != "mojibake", text
    assert num_texts > 500 and found > 0.97 * num_texts


def test_traditional_text_is_no_mojibake(shared: Path) -> None:
    for name, field in (
        ("mrc_drcd", "context"),
        ("story_tinychinese", "story"),
        ("dict_cc_cedict", "traditional"),
    ):
        for _, record in read_records(shared / "data" / "pack" / f"{name}.jsonl.zst"):
            assert reason("问", record[field]) != "mojibake", record[field]
