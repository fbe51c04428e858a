"""The judge of verse: lines checked by hand against the rhyme book, real poems against shuffled ones, each breach."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterable
from pathlib import Path

import pytest

from firefly.errors import InputError
from firefly.evaluate import rhyme
from firefly.evaluate.forms import verse_lines
from firefly.evaluate.rhyme import groups, rhyme_of, tone_of, tones
from firefly.evaluate.tunes import judge_lyric, part_of, tunes
from firefly.evaluate.verse import Poem, acrostic, judge_couplet, judge_poem, parallelism

DATA = Path(__file__).parent / "data"
CHECKED = [block.splitlines() for block in (DATA / "checked_lines.tsv").read_text("utf-8").split("# ")[1:]]
TANG = [row.split("\t") for row in (DATA / "tang_regulated.tsv").read_text("utf-8").splitlines()]
"""The 绝句 and 律诗 sections of 唐诗三百首: form, title, author, poem."""


@pytest.mark.parametrize("block", CHECKED, ids=lambda block: block[0])
def test_lines_checked_by_hand(block: list[str]) -> None:
    """Each character's entry in 平水韵, as written beside it, and what the line is known for."""
    _, form, rhyme = block[0].split("，")
    rows = [row.split("\t") for row in block[1:]]
    poem = judge_poem("".join(text for text, _, _ in rows))
    assert (poem.form, poem.rhyme) == (form, rhyme)
    for line, (_, readings, verdict) in zip(poem.lines, rows, strict=True):
        for char, mark, reading in zip(line.text, line.tones, readings.split(), strict=True):
            assert any(
                name[0] + name[-1] == reading or name[1] + name[-1] == reading for name in groups(char)
            ), char
            assert mark in ("中", "平" if reading[0] == "平" else "仄"), char
        number = poem.lines.index(line) + 1
        found = line.licence or "、".join(fault.name for fault in poem.faults if fault.line == number) or "合"
        assert found == verdict, line.text


def test_the_table_is_large_enough() -> None:
    assert sum(len(block) - 1 for block in CHECKED) >= 60
    verdicts = {row.split("\t")[2] for block in CHECKED for row in block[1:]}
    assert {"合", "孤平", "孤平拗救", "大拗", "特拗", "小拗", "失粘"} <= verdicts


def shares(poems: Iterable[Iterable[str]]) -> tuple[float, float, float]:
    """Shares of poems that rhyme, are regulated, are both."""
    judged = [judge_poem("，".join(lines)) for lines in poems]
    verdicts = [(poem.rhymed, poem.regulated, poem.rhymed and poem.regulated) for poem in judged]
    rhymed, regulated, both = (sum(column) / len(verdicts) for column in zip(*verdicts, strict=True))
    return rhymed, regulated, both


def test_real_poems_pass() -> None:
    assert len(TANG) == 213
    rhymed, regulated, _ = shares(verse_lines(poem) for *_, poem in TANG)
    assert rhymed >= 0.95 and regulated >= 0.85


def test_modern_tones_cannot_judge_them() -> None:
    judged = [judge_poem(poem, "xinyun") for *_, poem in TANG]
    assert sum(poem.regulated for poem in judged) / len(judged) < 0.5


def test_lines_dealt_anew_among_poems_of_a_form_fail() -> None:
    poems = []
    for form in ("五言绝句", "七言绝句", "五言律诗", "七言律诗"):
        group = [verse_lines(poem) for name, *_, poem in TANG if name == form]
        lines = [line for poem in group for line in poem]
        random.Random(form).shuffle(lines)
        length = len(group[0])
        poems += [lines[start : start + length] for start in range(0, len(lines), length)]
    assert all(share < 0.05 for share in shares(poems))


def test_lines_shuffled_within_a_poem_fail() -> None:
    """Rhyme alone cannot tell these: of a 绝句 that rhymes in three of four lines, half of all orders rhyme."""
    draw = random.Random(0)
    poems = [draw.sample(lines, len(lines)) for *_, poem in TANG for lines in [verse_lines(poem)]]
    _, regulated, both = shares(poems)
    assert regulated < 0.05 and both < 0.05


def test_a_wrong_tone_in_an_even_place_is_caught() -> None:
    """Every even character of every flawless poem, replaced by 东 (level) or 月 (oblique), in turn."""
    flawless = [verse_lines(text) for *_, text in TANG[80:100] if judge_poem(text).regulated]
    assert flawless
    for lines in flawless:
        poem = judge_poem("，".join(lines))
        for row, line in enumerate(poem.lines):
            for place in () if line.licence else range(1, len(line.text), 2):
                wrong = "月" if line.pattern[place] == "平" else "东"
                spoilt = line.text[:place] + wrong + line.text[place + 1 :]
                verdict = judge_poem("，".join([*lines[:row], spoilt, *lines[row + 1 :]]))
                assert not verdict.regulated or verdict.lines[row].licence in ("特拗", "小拗", "大拗"), (
                    line.text,
                    place,
                )


LANTERN = "千山鸟飞绝，万径人踪灭。孤舟蓑笠翁，独钓寒江雪。"
TOWER = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"


def faults(poem: Poem) -> list[tuple[int, int, str]]:
    return [(fault.line, fault.position, fault.name) for fault in poem.faults]


@pytest.mark.parametrize(
    ("poem", "expected"),
    [
        (TOWER, []),
        (TOWER.replace("流", "来"), [(2, 5, "失韵"), (4, 5, "失韵")]),
        (
            "欲穷千里目，黄河入海流。白日依山尽，更上一层楼。",
            [(2, 2, "失对"), (3, 2, "失粘"), (4, 2, "失对")],
        ),
        ("黄河入海流，白日依山尽。", []),  # no form: only rhyme is judged, and one closing rhymes with itself
        (TOWER.replace("黄河入海", "落河入海"), [(2, 1, "孤平")]),
        (TOWER.replace("更上一层", "更上东层"), [(4, 3, "三平尾")]),
        (TOWER.replace("白日依山尽", "白日依月尽"), [(1, 4, "拗未救")]),
        (TOWER.replace("白日依山尽，黄河入海", "白日依月尽，黄河山海"), []),  # 大拗, rescued
        (TOWER.replace("白日依山尽", "白日依山东"), [(1, 5, "出律"), (1, 5, "失韵")]),
        (LANTERN, [(3, 2, "失粘")]),  # rhymes oblique, as old quatrains may
        ("悠悠" + TOWER[2:], [(1, 2, "出律")]),
    ],
)
def test_each_breach_is_named_where_it_is(poem: str, expected: list[tuple[int, int, str]]) -> None:
    assert faults(judge_poem(poem)) == expected


def test_a_first_line_may_borrow_a_neighbouring_rhyme() -> None:
    """清明时节雨纷纷 rhymes in 文, 魂 and 村 in 元."""
    poem = judge_poem("清明时节雨纷纷，路上行人欲断魂。借问酒家何处有，牧童遥指杏花村。")
    assert (poem.rhyme, poem.rhymed) == ("上平十三元", True)
    assert not judge_poem("清明时节雨东东，路上行人欲断魂。借问酒家何处有，牧童遥指杏花村。").rhymed


def test_other_shapes_are_judged_by_rhyme_and_one_line_is_an_error() -> None:
    old = judge_poem("青青河畔草，郁郁园中柳。盈盈楼上女，皎皎当窗牖。娥娥红粉妆，纤纤出素手。")
    assert (old.form, old.regulated, old.rhyme, old.faults) == ("", False, "上二十五有", [])
    with pytest.raises(InputError, match="two lines or more"):
        judge_poem("白日依山尽")


@pytest.mark.parametrize(
    ("simplified", "traditional"),
    [
        (
            "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。",
            "國破山河在，城春草木深。感時花濺淚，恨別鳥驚心。烽火連三月，家書抵萬金。白頭搔更短，渾欲不勝簪。",
        ),
        (
            "朝辞白帝彩云间，千里江陵一日还。两岸猿声啼不住，轻舟已过万重山。",
            "朝辭白帝彩雲間，千里江陵一日還。兩岸猿聲啼不住，輕舟已過萬重山。",
        ),
    ],
)
def test_traditional_characters_are_judged_alike(simplified: str, traditional: str) -> None:
    one, two = judge_poem(simplified), judge_poem(traditional)
    assert one.regulated and two.regulated and one.rhymed and two.rhymed
    assert one.rhyme == two.rhyme and [line.pattern for line in one.lines] == [
        line.pattern for line in two.lines
    ]


def test_the_rhyme_books() -> None:
    assert {tone_of(name) for name in groups("看")} == {"平", "仄"} == tones("看")
    for entering in "国白石竹直习蝶发合出":  # level in Mandarin
        assert tones(entering) == {"仄"}, entering
        assert "平" in tones(entering, "xinyun"), entering
    assert (
        rhyme_of("中风空") == {"上平一东"}
        and not rhyme_of("东冬")
        and rhyme_of("东冬", "xinyun") == {"十一庚平"}
    )
    assert groups("她") == frozenset() and tones("她") == {"平"}  # a modern character by its modern tone
    assert tones("𠀀") == {"平", "仄"}  # in no book: it can be held against nobody
    assert groups("后") >= groups("後") and groups("發") <= groups("发") >= groups("髮")
    assert rhyme_of("资之诗", "xinyun") == {"十三支平"} and rhyme_of("鱼西儿", "xinyun") == {"十二齐平"}


def test_pingshui_has_its_106_groups_and_each_head_is_in_its_own() -> None:
    table = Path(rhyme.__file__).parent / "books" / "pingshui.txt"
    names = [line.split()[0] for line in table.read_text("utf-8").splitlines()]
    assert len(names) == 106
    assert [sum(tone_of(name) == tone for name in names) for tone in "平仄"] == [30, 76]
    assert all(name in groups(name[-1]) for name in names)
    assert all(part_of(name[-1]) for name in names)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("白日依山尽，", "黄河入海流。"),
        ("无边落木萧萧下", "不尽长江滚滚来"),
        ("风声雨声读书声，声声入耳", "家事国事天下事，事事关心"),
        ("风声雨声读书声声声入耳", "家事国事天下事，事事关心"),
        ("海內存知己", "天涯若比鄰"),
    ],
)
def test_true_couplets_pass(first: str, second: str) -> None:
    couplet = judge_couplet(first, second)
    assert couplet.well_formed and couplet.closing_tones
    assert sum(couplet.opposed) >= len(couplet.opposed) - 1 >= 1


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ("不尽长江滚滚", {"same_length", "mirrored", "closing_tones"}),
        ("不尽长江滚滚来了", {"same_length", "mirrored", "closing_tones"}),
        ("不尽长江滚急来", {"mirrored"}),  # nothing repeats where the given line repeats
        ("不不长江滚滚来", {"mirrored"}),  # it repeats where the given line does not
        ("无尽长江滚滚来", {"no_shared_character"}),
        ("不尽长江滚滚月", {"closing_tones"}),
        ("", {"same_length", "no_shared_character", "mirrored", "closing_tones"}),
        ("no Chinese", {"same_length", "no_shared_character", "mirrored", "closing_tones"}),
    ],
)
def test_broken_couplets_fail_the_very_check(answer: str, failed: set[str]) -> None:
    couplet = judge_couplet("无边落木萧萧下，", answer)
    names = ("same_length", "no_shared_character", "mirrored", "closing_tones")
    assert {name for name in names if not getattr(couplet, name)} == failed


def test_even_positions_of_each_phrase_are_opposed() -> None:
    assert judge_couplet("白日依山尽", "黄河入海流").opposed == [True, True]
    assert judge_couplet("白日依山尽", "黄月入东流").opposed == [False, False]
    assert judge_couplet("声声入耳，白日依山尽", "事事关心，黄河入海流").opposed == [True, True, True, True]


def test_parts_of_speech_are_a_hint() -> None:
    parallel, crossed = (
        parallelism("两个黄鹂鸣翠柳", "一行白鹭上青天"),
        parallelism("两个黄鹂鸣翠柳", "欲说还休却道天"),
    )
    assert 0 <= crossed < parallel <= 1
    poem = judge_poem(TOWER, parallel=True)
    assert set(poem.parallel) == {1, 2} and judge_couplet("明月", "清风", parallel=True).parallel is not None
    assert judge_poem(TOWER).parallel == {} and judge_couplet("白日", "黄河").parallel is None


def test_a_missing_jieba_names_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install 'firefly-zh\[verse\]'"):
        judge_poem(TOWER, parallel=True)


LYRICS = {
    "如梦令": "常记溪亭日暮，沉醉不知归路。兴尽晚回舟，误入藕花深处。争渡，争渡，惊起一滩鸥鹭。",
    "浣溪沙": "一曲新词酒一杯，去年天气旧亭台。夕阳西下几时回？无可奈何花落去，似曾相识燕归来。小园香径独徘徊。",
    "菩萨蛮": "平林漠漠烟如织，寒山一带伤心碧。暝色入高楼，有人楼上愁。"
    "玉阶空伫立，宿鸟归飞急。何处是归程？长亭更短亭。",
    "蝶恋花": "庭院深深深几许，杨柳堆烟，帘幕无重数。玉勒雕鞍游冶处，楼高不见章台路。"
    "雨横风狂三月暮，门掩黄昏，无计留春住。泪眼问花花不语，乱红飞过秋千去。",
    "西江月": "明月别枝惊鹊，清风半夜鸣蝉。稻花香里说丰年，听取蛙声一片。"
    "七八个星天外，两三点雨山前。旧时茅店社林边，路转溪桥忽见。",
    "卜算子": "缺月挂疏桐，漏断人初静。时见幽人独往来，缥缈孤鸿影。"
    "惊起却回头，有恨无人省。拣尽寒枝不肯栖，寂寞沙洲冷。",
}  # fmt: skip


@pytest.mark.parametrize("tune", LYRICS)
def test_lyrics_keep_their_tune(tune: str) -> None:
    lyric = judge_lyric(LYRICS[tune], tune)
    assert lyric.well_formed and lyric.rhymed and lyric.tones >= 0.93


@pytest.mark.parametrize("tune", LYRICS)
def test_lyrics_to_another_tune_or_in_disorder_fail(tune: str) -> None:
    lines = verse_lines(LYRICS[tune])
    for other in LYRICS.keys() - {tune}:
        assert not judge_lyric(LYRICS[tune], other).well_formed
    shorter = judge_lyric("，".join([*lines[:-1], lines[-1][:-1]]), tune)
    assert (shorter.well_formed, shorter.tones, shorter.rhymed) == (False, 0.0, False)
    backwards = judge_lyric("，".join(line[::-1] for line in lines), tune)
    assert backwards.well_formed and (not backwards.rhymed or backwards.tones < 0.8)


def test_tunes_have_other_names_and_unknown_ones_say_what_there_is() -> None:
    assert tunes()["凤栖梧"] is tunes()["蝶恋花"]
    with pytest.raises(InputError, match="did you mean '如梦令'"):
        judge_lyric("常记溪亭日暮", "如梦")


def test_the_acrostic_is_the_first_characters() -> None:
    assert acrostic("芦花丛里一扁舟，俊杰俄从此地游。义士若能知此理，反躬逃难可无忧。") == "芦俊义反"
