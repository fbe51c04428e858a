"""Parsing answers: every form that the tasks ask for, and the ways in which models put it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.tasks import load_tasks
from firefly.evaluate.answers import corrections, edits, entities, given_line, keywords, words
from firefly.evaluate.forms import line_lengths

PAIRS = {("人名", "阿岚"), ("地名", "杭州"), ("地名", "西湖")}


@pytest.mark.parametrize(
    "text",
    [
        "人名：阿岚；地名：杭州、西湖",
        "人名: 阿岚\n地名: 杭州，西湖。",
        "阿岚（人名）\n杭州（地名）\n西湖（地名）",
        '{"人名": ["阿岚"], "地名": ["杭州", "西湖"]}',
        '```json\n{"人名": "阿岚", "地名": ["杭州", "西湖"]}\n```',
        '[{"type": "人名", "entity": "阿岚"}, {"type": "地名", "name": "杭州"}, {"类型": "地名", "实体": "西湖"}]',
        "地名：西湖、杭州；人名：“阿岚”；机构名：无",
    ],
)
def test_entities_are_read_in_every_form(text: str) -> None:
    assert entities(text) == PAIRS


@pytest.mark.parametrize("text", ["", "无", "无。", "没有", "{}", "[]", "人名：无"])
def test_no_entities(text: str) -> None:
    assert entities(text) == set()


def test_bare_names_have_no_type_and_bad_json_is_no_answer() -> None:
    assert entities("杭州、西湖") == {("", "杭州"), ("", "西湖")}
    assert not entities('{"人名": ["阿岚"') & PAIRS
    assert entities("书名：海边书简（上）") == {("书名", "海边书简（上）")}


@pytest.mark.parametrize(
    "text",
    [
        "茶树、干旱、CO2 通量",
        "关键词：茶树，干旱，co2 通量。",
        "1. 茶树\n2. 干旱\n3. CO2 通量",
        "茶树；干旱；CO2 通量",
    ],
)
def test_keywords_are_read_in_every_form(text: str) -> None:
    assert keywords(text) == {"茶树", "干旱", "co2 通量"}


def test_words_are_characters_and_latin_runs() -> None:
    assert words("《GPT-4》于 2023年 发布。") == ["gpt", "4", "于", "2023", "年", "发", "布"]


@pytest.mark.parametrize(
    ("source", "text", "expected"),
    [
        ("吃台湾采", "吃台湾菜", {(3, "采", "菜")}),
        ("非常感兴趣的。", "非常感兴趣。", {(5, "的", "")}),
        ("我明白了意义", "我明白了合作的意义", {(4, "", "合作的")}),
        ("一样", "一样", set()),
        ("", "新", {(0, "", "新")}),
        ("旧", "", {(0, "旧", "")}),
    ],
)
def test_edits(source: str, text: str, expected: set[tuple[int, str, str]]) -> None:
    assert edits(source, text) == expected


@given(st.text("甲乙丙", max_size=8), st.text("甲乙丙", max_size=8))
def test_edits_make_the_text_of_the_source_and_are_the_fewest(source: str, text: str) -> None:
    found = edits(source, text)
    inserted = {place: new for place, old, new in found if not old}
    replaced = {place: new for place, old, new in found if old}
    pieces = [inserted.get(place, "") + replaced.get(place, char) for place, char in enumerate(source)]
    assert "".join(pieces) + inserted.get(len(source), "") == text
    assert all(source[place] == old for place, old, _ in found if old)
    assert len(replaced) + sum(map(len, inserted.values())) == distance(source, text)


def distance(one: str, other: str) -> int:
    """Levenshtein's distance by its definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))


SENTENCE, RIGHT = "我明天四点有空，想不想去吃台湾采？", "我明天四点有空，想不想去吃台湾菜？"


@pytest.mark.parametrize(
    "question", [f"改正病句：{SENTENCE}", f"这一句\n{SENTENCE}\n对吗", f"“{SENTENCE}”怎样写才对？"]
)
def test_a_correction_is_judged_against_the_sentence_in_the_question(question: str) -> None:
    edit = {(SENTENCE.index("采"), "采", "菜")}
    assert corrections(question, RIGHT, RIGHT) == (edit, edit)
    assert corrections(question, RIGHT, SENTENCE) == (edit, set())
    assert corrections(question, SENTENCE, RIGHT) == (set(), edit)  # nothing was wrong


def test_the_whole_sentence_is_the_source_not_a_part_of_it() -> None:
    wrong, right = "小姐说：你走到十只路口，再右砖就到了。", "小姐说：你走到十字路口，再右转就到了。"
    wanted, _ = corrections(f"纠错：{wrong}", right, "")
    assert {(old, new) for _, old, new in wanted} == {("只", "字"), ("砖", "转")}


def test_listed_corrections_and_verdicts_are_compared_as_they_are_named() -> None:
    question = f"找出错别字：{SENTENCE}"
    wanted, given = corrections(question, "采→菜；在→再", "在→再。")
    assert len(wanted) == 2 and given < wanted
    assert corrections(question, "无", "采→菜") == (set(), {(0, "", "采→菜")})
    wanted, given = corrections(question, "有错误", "没有错误")
    assert len(wanted) == len(given) == 1 and wanted != given


@pytest.mark.parametrize("line", ["明月松间照", "春风又绿江南岸，明月何时照我还"])
def test_the_given_line_is_found_in_every_template(line: str) -> None:
    task = load_tasks()["Couplet"]
    questions = {
        task.render({"first": line, "second": "清泉石上流", "form": ""}, source="t", variant=variant).input
        for variant in range(40)
    }
    given = [question for question in questions if line in question]
    assert len(given) >= 12
    shape = line_lengths("清" * len(line))
    assert {given_line(question, shape) for question in given} == {(line, False)}


def test_the_given_line_of_a_couplet_asked_backwards_is_its_second() -> None:
    assert given_line("下联：清泉石上流\n上联：", [5]) == ("清泉石上流", True)
    assert given_line("上联：明月松间照\n下联：", [5]) == ("明月松间照", False)


def test_the_given_line_is_found_in_foreign_words_by_its_shape() -> None:
    assert given_line("给我对个对子：厚积薄发，一鸣惊人", [4, 4]) == ("厚积薄发，一鸣惊人", False)
    assert given_line("对个对子", [4, 4]) is None
