"""Importers for literature: tidy fields out of what corpora hold, passages that join up, and reasons for the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firefly.data.importers import IMPORTERS, Imported, Origin, Record, Skipped, Whole
from firefly.data.literature import passages, read_verse, tidy
from firefly.data.readers import read_records
from firefly.data.tasks import task
from firefly.errors import InputError

DENGGAO = {
    "title": "登高",
    "authorName": "杜甫",
    "dynasty": "唐",
    "content": [
        "风急天高猿啸哀，渚清沙白鸟飞回。",
        "无边落木萧萧下，不尽长江滚滚来。",
        "万里悲秋常作客，百年多病独登台。",
        "艰难苦恨繁霜鬓，潦倒新停浊酒杯。",
    ],
}
GUANQUELOU = {
    "title": "登鹳雀楼",
    "authorName": "王之涣",
    "dynasty": "唐",
    "content": ["白日依山尽，黄河入海流。", "欲穷千里目，更上一层楼。"],
}


def write(path: Path, records: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
    return path


def read(path: Path, name: str, kind: str) -> list[Imported]:
    records = read_records(path)
    return [item for line, record in records for item in IMPORTERS[name](record, Origin(path, line, kind))]


def imported(name: str, kind: str, record: dict[str, Any]) -> list[Imported]:
    return list(IMPORTERS[name](record, Origin(Path("x.jsonl"), 7, kind)))


def fields(name: str, kind: str, record: dict[str, Any]) -> dict[str, str]:
    (item,) = imported(name, kind, record)
    assert isinstance(item, Record), item
    return item.fields


def reasons(name: str, kind: str, record: dict[str, Any]) -> list[str]:
    return [getattr(item, "reason", "kept") for item in imported(name, kind, record)]


def test_couplets_are_the_two_middle_couplets(tmp_path: Path) -> None:
    found = read(write(tmp_path / "p.jsonl", [DENGGAO]), "couplets", "Couplet")
    assert [item.fields for item in found if isinstance(item, Record)] == [
        {"first": "无边落木萧萧下", "second": "不尽长江滚滚来", "form": "七言律诗"},
        {"first": "万里悲秋常作客", "second": "百年多病独登台", "form": "七言律诗"},
    ]
    assert len(found) == 2


def test_poems_have_their_form_first_line_and_full_text(tmp_path: Path) -> None:
    found = read(write(tmp_path / "p.jsonl", [GUANQUELOU]), "poems", "AncientPoem")
    assert isinstance(found[0], Record)
    assert found[0].fields == {
        "title": "登鹳雀楼",
        "author": "王之涣",
        "dynasty": "唐",
        "form": "五言绝句",
        "first_line": "白日依山尽",
        "heads": "白黄欲更",
        "poem": "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
    }
    assert found[0].source == "p.jsonl:1"


def test_a_poem_and_its_couplets_share_a_group_however_it_is_written(tmp_path: Path) -> None:
    joined = DENGGAO | {"title": "登高（其一）", "content": ["".join(DENGGAO["content"]).replace("。", "；")]}
    path = write(tmp_path / "p.jsonl", [DENGGAO, joined, GUANQUELOU])
    poems = [item.group for item in read(path, "poems", "AncientPoem") if isinstance(item, Record)]
    couplets = {item.group for item in read(path, "couplets", "Couplet") if isinstance(item, Record)}
    assert couplets == {poems[0]} == {poems[1]}
    assert poems[2] != poems[0]


def test_a_quatrain_has_no_middle_couplets(tmp_path: Path) -> None:
    found = read(write(tmp_path / "p.jsonl", [GUANQUELOU]), "couplets", "Couplet")
    assert [item.reason for item in found if isinstance(item, Skipped)] == ["no_middle_couplets"]
    assert len(found) == 1


def test_a_character_that_faces_itself_is_no_antithesis(tmp_path: Path) -> None:
    poem = DENGGAO | {"content": [*DENGGAO["content"]]}
    poem["content"][1] = "无边落木萧萧下，不尽长木滚滚来。"
    found = read(write(tmp_path / "p.jsonl", [poem]), "couplets", "Couplet")
    assert [getattr(item, "reason", "kept") for item in found] == ["not_antithetical", "kept"]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("咏怀八十二首（其七十九）", "咏怀"),
        ("绝句二首", "绝句"),
        ("秋兴八首·其一", "秋兴"),
        ("登高", "登高"),
        ("（其一）", None),
        ("送□□归山", None),
        ("送（缺）归山", None),
    ],
)
def test_titles_lose_their_number_or_are_refused(title: str, expected: str | None) -> None:
    verse = read_verse(title, GUANQUELOU["content"])  # type: ignore[arg-type]
    assert verse == "bad_title" if expected is None else getattr(verse, "title", verse) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (["白日依山尽，黄河□海流。", "欲穷千里目，更上一层楼。"], "not_only_han"),
        (["白日依山尽，黄河入海流。（注）", "欲穷千里目，更上一层楼。"], "not_only_han"),
        (["白日依山尽，黄河入海。", "欲穷千里目，更上一层楼。"], "other_form"),
        (["白日依山尽，黄河入海流。"], "other_form"),
        ([], "other_form"),
    ],
)
def test_a_poem_of_no_known_form_is_skipped_with_its_reason(content: list[str], reason: str) -> None:
    assert read_verse("登鹳雀楼", content) == reason


def test_lines_without_punctuation_are_a_poem_too() -> None:
    verse = read_verse("登鹳雀楼", ["白日依山尽", "黄河入海流", "欲穷千里目", "更上一层楼"])
    assert getattr(verse, "text", verse) == "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。"


def test_the_heads_of_a_poem_are_what_its_lines_begin_with() -> None:
    poem = fields("poems", "AncientPoem", GUANQUELOU)
    assert poem["heads"] == "白黄欲更"
    asked = {
        task("AncientPoem").render({"heads": "白黄欲更", "poem": poem["poem"]}, source="s", variant=n).input
        for n in range(9)
    }
    assert all("白黄欲更" in question for question in asked)


def test_odes_of_any_shape_keep_their_stanzas_and_lose_their_notes() -> None:
    record = {
        "collection": "曹操诗集",
        "title": "短歌行 其一",
        "paragraphs": ["对酒当歌，人生几何！", "明明如月，何时可掇？(明明 一作：佼佼)"],
    }
    assert fields("odes", "AncientPoem", record) == {
        "title": "短歌行",
        "collection": "曹操诗集",
        "first_line": "对酒当歌",
        "poem": "对酒当歌，人生几何！\n明明如月，何时可掇？",
    }
    assert reasons("odes", "AncientPoem", record | {"paragraphs": ["对酒□歌。"]}) == ["not_only_han"]
    assert reasons("odes", "AncientPoem", record | {"paragraphs": ["长" * 401]}) == ["too_long"]


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("海纳百川,有容乃大", "壁立千仞，无欲则刚。", "kept"),
        ("海纳百川有容乃大", "壁立千仞，无欲则刚", "unequal_lines"),
        ("海纳百川", "壁立千山仞", "unequal_lines"),
        ("百川归海", "千川入山", "not_antithetical"),
        ("春□花开", "秋去叶落", "not_only_han"),
        ("字画", "蚊蝇", "too_short"),
        ("长" * 61, "短" * 61, "too_long"),
    ],
)
def test_collected_couplets_must_answer_each_other(first: str, second: str, reason: str) -> None:
    assert reasons("couplet_lines", "Couplet", {"first": first, "second": second}) == [reason]


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("越调・天净沙秋思", {"tune": "天净沙", "title": "秋思"}),
        ("感天动地窦娥冤・仙吕/点绛唇", {"tune": "点绛唇", "work": "感天动地窦娥冤"}),
        ("草桥店梦莺莺(第四本)・滚绣球", {"tune": "滚绣球", "work": "草桥店梦莺莺"}),
        ("诈妮子调风月・幺篇", {"work": "诈妮子调风月"}),
        ("前腔", {}),
    ],
)
def test_the_heading_of_a_yuanqu_is_tune_title_or_play(title: str, expected: dict[str, str]) -> None:
    record = {
        "title": title,
        "author": "无名氏",
        "paragraphs": ["枯藤老树昏鸦，小桥流水人家？。", "断肠人在天涯。"],
    }
    assert fields("lyrics", "LyricGeneration", record) == expected | {
        "genre": "元曲",
        "first_line": "枯藤老树昏鸦",
        "lyric": "枯藤老树昏鸦，小桥流水人家？\n断肠人在天涯。",
    }


def test_a_song_that_begins_in_its_heading_is_put_together() -> None:
    record = {"title": "尾声・赏心乐事休教欠，醉倒樽", "author": "张可久", "paragraphs": ["前任君僭。"]}
    song = fields("lyrics", "LyricGeneration", record)
    assert song["lyric"] == "赏心乐事休教欠，醉倒樽前任君僭。"
    assert "tune" not in song  # 尾声 is no tune


def test_the_other_name_of_a_tune_and_songs_with_speech_are_left_out() -> None:
    record = {"rhythmic": "醉落魄・一斛珠", "author": "吴文英", "paragraphs": ["柔怀难托。"]}
    assert fields("lyrics", "LyricGeneration", record)["tune"] == "醉落魄"
    assert reasons("lyrics", "LyricGeneration", record | {"paragraphs": ["（旦云）去来。"]}) == [
        "stage_directions"
    ]


@pytest.mark.parametrize(
    ("classical", "modern", "reason"),
    [
        ("故事成而福生。", "所以事成而得福。", "kept"),
        ("必杀之。", "子文说： 一定要杀死他！", "lost_quotation_marks"),
        ("死生契阔，忽此相过。", "死生契阔，忽此相过。", "not_translated"),
        ("竖眼恚，发疾卒。", "到了除服的祭礼，也必定赶去参加。", "misaligned"),
        ("上用□□而民不惑。", "上面用了，民众不迷惑。", "damaged"),
    ],
)
def test_translations_that_do_not_translate_are_refused(classical: str, modern: str, reason: str) -> None:
    record = {"classical": classical, "modern": modern, "book": "某书"}
    assert reasons("classical", "ClassicalChinese", record) == [reason]


def test_an_idiom_brings_meaning_sound_source_and_use() -> None:
    record = {
        "word": "不义之财",
        "pinyin": "bù yì zhī cái",
        "explanation": "不义不正当。指不应该得到的钱财◇泛指来路不明的钱。",
        "derivation": "汉·刘向《列女传·齐田稷母传》不义之财，非吾有也。”",
        "example": "这～，犬豕不顾！★明·冯梦龙《古今小说》",
    }
    assert fields("idioms", "Dictionary", record) == {
        "word": "不义之财",
        "explanation": "指不应该得到的钱财。后泛指来路不明的钱。",
        "pinyin": "bù yì zhī cái",
        "origin": "汉·刘向《列女传·齐田稷母传》",
        "sentence": "这不义之财，犬豕不顾！",
    }
    bare = record | {"explanation": "犹虎头蛇尾”。比喻做事有始无终。", "derivation": "无", "example": "无"}
    assert fields("idioms", "Dictionary", bare) == {
        "word": "不义之财",
        "explanation": "犹虎头蛇尾。比喻做事有始无终。",
        "pinyin": "bù yì zhī cái",
    }
    lost = record | {"explanation": "不义不正当。不应该得到的钱财。"}
    assert reasons("idioms", "Dictionary", lost) == ["run_together"]


@pytest.mark.parametrize(
    ("riddle", "answer", "expected"),
    [
        ("外甥打灯笼", "照旧（舅）；照旧", ("外甥打灯笼", "照旧（舅）")),
        ("张三和大虫（老虎）抢食", "狼吞虎咽", ("张三和大虫抢食", "狼吞虎咽")),
        ("程咬金的斧子", "头三下（比喻起初声势很大。）", ("程咬金的斧子", "头三下")),
        ("糌粑（x", "n b", None),
    ],
)
def test_a_xiehouyu_keeps_its_pun_and_loses_its_notes(riddle: str, answer: str, expected: Any) -> None:
    (item,) = imported("xiehouyu", "Dictionary", {"riddle": riddle, "answer": answer})
    found = tuple(item.fields.values()) if isinstance(item, Record) else None
    assert found == expected


@pytest.mark.parametrize(
    ("numbered", "marked"),
    [
        ("Zhong1 guo2", "Zhōng guó"),
        ("lu:4 se4", "lǜ sè"),
        ("jiu3 you3 dou1 gui1", "jiǔ yǒu dōu guī"),
        ("de5 r5 ai4", "de r ài"),
        ("E2", "É"),
    ],
)
def test_tones_stand_on_the_right_vowel(numbered: str, marked: str) -> None:
    record = {
        "simplified": "词",
        "pinyin": numbered,
        "meanings": ["word", "abbr. for 词汇", "Xi'an 西寧|西宁[Xi1 ning2]"],
    }
    assert fields("chinese_english", "Dictionary", record) == {
        "word": "词",
        "pinyin": marked,
        "meaning": "word; Xi'an 西宁",
    }
    assert reasons("chinese_english", "Dictionary", record | {"meanings": ["variant of 辞"]}) == [
        "cross_reference"
    ]


def chapter(text: str, **more: str) -> dict[str, str]:
    return {
        "book": "水浒传",
        "chapter": "第一回\u3000张天师祈禳瘟疫\u3000洪太尉误走妖魔",
        "text": text,
        **more,
    }


@given(
    st.lists(
        st.lists(st.integers(5, 120).map(lambda n: "话" * n), min_size=1, max_size=6), min_size=1, max_size=12
    ),
    st.booleans(),
)
def test_passages_are_the_text_cut_at_sentences_and_nothing_is_lost(
    paragraphs: list[list[str]], spoken: bool
) -> None:
    opened, closed = ("他道：“", "。”") if spoken else ("", "。")
    text = "\n".join("".join(f"{opened}{sentence}{closed}" for sentence in lines) for lines in paragraphs)
    cut = ["".join(sentences) for sentences in passages(text)]
    assert "".join(cut).lstrip("\n") == text
    assert all(len(passage) <= 400 and passage.endswith(closed) for passage in cut)


def test_a_chapter_becomes_a_beginning_and_passages_that_follow_each_other() -> None:
    text = "\n".join(f"　　第{number}日，{'行路' * 20}。那人道：“{'好酒' * 15}！”" for number in range(30))
    found = imported("fiction", "JinYongGeneration", chapter(text, type="英雄传奇", author="施耐庵"))
    records = [item.fields for item in found if isinstance(item, Record)]
    assert len(records) == len(found) > 3
    assert {record["title"] for record in records} == {"张天师祈禳瘟疫，洪太尉误走妖魔"}
    assert len({item.group for item in found if isinstance(item, Record)}) == 1
    assert "beginning" in records[0]
    written = records[0]["beginning"]
    for record in records[1:]:
        assert len(record["opening"]) <= 150
        assert len(record["continuation"]) <= 400
        assert written.replace("\n", "").endswith(record["opening"].replace("\n", ""))
        written += record["continuation"]
    assert written.replace("\n", "") == tidy(text).replace("\n", "")


def test_each_kind_takes_its_own_fiction_and_essays() -> None:
    for kind, type_, expected in [
        ("JinYongGeneration", "英雄传奇", "kept"),
        ("StoryGeneration", "英雄传奇", "other_kind"),
        ("StoryGeneration", "谴责公案", "kept"),
        ("JinYongGeneration", "谴责公案", "other_kind"),
    ]:
        assert reasons("fiction", kind, chapter("话" * 50 + "。", type=type_)) == [expected]
    essay = {"author": "鲁迅", "title": "题", "text": "说" * 50 + "。"}
    kinds = {"野草": "ProseGeneration", "呐喊": "StoryGeneration", "热风": "Composition"}
    for collection, own in kinds.items():
        for kind in kinds.values():
            found = reasons("essays", kind, essay | {"collection": collection})
            assert found == ["kept" if kind == own else "other_kind"]
    preface = essay | {"collection": "热风", "title": "题记"}
    assert reasons("essays", "Composition", preface) == ["front_matter"]


def test_damaged_passages_are_refused_one_by_one() -> None:
    good, lacuna, unclosed = ("行路" * 150 + "。", "行□路" * 100 + "。", "他道：“" + "行路" * 150 + "。")
    found = reasons("fiction", "JinYongGeneration", chapter("\n".join([good, lacuna, unclosed, good])))
    # The passage after a damaged one has no opening to follow either.
    assert found == ["kept", "damaged", "broken_quotation", "broken_quotation"]


def test_a_web_page_around_a_chapter_and_lines_cut_by_width_are_mended() -> None:
    text = "话说那人个\n个威风凛凛，" + "行路" * 20 + "。\nzj_waps2();\n上一章\n返回目录\n下一章"
    assert (
        fields("fiction", "JinYongGeneration", chapter(text))["text"]
        == "话说那人个个威风凛凛，" + "行路" * 20 + "。"
    )


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("我说,他来了;真的?", "我说，他来了；真的？"),
        ("共3.5元, about 1,000 yuan.", "共3.5元，about 1,000 yuan."),
        ("那么――好罢......", "那么——好罢……"),
        ("绥惠支(KaetheKollwitz)作〔1〕版画", "绥惠支作版画"),
        ('他说"好"。', "他说“好”。"),
        ("二十个伙计，饶命。“石铸说：”在哪里？“", "二十个伙计，饶命。”石铸说：“在哪里？”"),
        ("　　段一。\n\n 段　二。", "段一。\n段二。"),
    ],
)
def test_prose_gets_full_width_marks_and_loses_notes_and_spaces(raw: str, expected: str) -> None:
    assert tidy(raw) == expected
    assert tidy(expected) == expected


def test_a_short_essay_is_learnt_whole_with_its_length_and_outline() -> None:
    text = "\n".join(f"第{number}点如此。{'论述' * 30}。" for number in "一二三") + "\n※ ※ ※\n编者注。"
    record = {"author": "鲁迅", "collection": "热风", "title": "论事", "text": text}
    essay = fields("essays", "Composition", record)
    assert essay["outline"] == "1. 第一点如此。\n2. 第二点如此。\n3. 第三点如此。"
    assert essay["length"] == "200"
    assert essay["text"].endswith("论述。")


def test_classical_prose_and_aphorisms() -> None:
    aphorism = {"collection": "幽梦影", "content": "春听鸟声，夏听蝉声。", "comment": []}
    assert fields("classical_prose", "ProseGeneration", aphorism) == {
        "book": "幽梦影",
        "opening": "春听鸟声，",
        "continuation": "夏听蝉声。",
    }
    work = {
        "collection": "古文观止",
        "chapter": "陋室铭",
        "author": "唐代：刘禹锡 ",
        "paragraphs": ["山" * 40 + "。"],
    }
    assert fields("classical_prose", "ProseGeneration", work)["author"] == "刘禹锡"


def test_stories_of_one_theme_stay_together() -> None:
    record = {
        "names": "阿水|小月",
        "genre": "童话",
        "theme": "救鱼。",
        "story": "从前，" + "划船" * 20 + "。",
    }
    stories = imported("themed_stories", "StoryGeneration", record)
    stories += imported(
        "themed_stories", "StoryGeneration", record | {"story": "后来，" + "回家" * 20 + "。"}
    )
    assert len({item.group for item in stories if isinstance(item, Record)}) == 1
    assert fields("themed_stories", "StoryGeneration", record)["names"] == "阿水、小月"


def test_product_attributes_of_one_name_are_gathered() -> None:
    record = {"content": "类型#裙*风格#简约*颜色#蓝*风格#清新", "summary": "蓝裙。"}
    assert fields("product", "ProductDesc", record) == {
        "product": "裙",
        "attributes": "风格：简约、清新；颜色：蓝",
        "description": "蓝裙。",
    }
    assert reasons("product", "ProductDesc", record | {"summary": "BRAND的<UNK>"}) == ["placeholder"]


def test_seed_tasks_become_an_example_an_instance() -> None:
    record = {
        "instruction": "改错。",
        "instances": [{"input": "一", "output": "二"}, {"input": "", "output": "三"}],
    }
    found = [item.example for item in imported("seed_tasks", "BELLE", record) if isinstance(item, Whole)]
    assert [(example.input, example.target) for example in found] == [("改错。\n一", "二"), ("改错。", "三")]


@pytest.mark.parametrize(
    ("name", "kind", "record", "message"),
    [
        ("poems", "AncientPoem", {"title": "登高"}, "'content' must be a list"),
        ("lyrics", "LyricGeneration", {"paragraphs": "一行"}, "'paragraphs' must be a list"),
        ("couplet_lines", "Couplet", {"first": "上联"}, "'second' is missing or not text"),
        ("idioms", "Dictionary", {"word": 3, "explanation": "义"}, "'word' is missing or not text"),
        ("fiction", "JinYongGeneration", {"book": "书", "chapter": "回"}, "'text' is missing"),
        ("classical_prose", "ProseGeneration", {"content": ["列"]}, "'content' is missing or not text"),
        ("seed_tasks", "BELLE", {"instruction": "问", "instances": ["答"]}, "'instances' must be a list"),
    ],
)
def test_a_record_of_another_shape_is_named_with_file_line_and_field(
    name: str, kind: str, record: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape("x.jsonl, line 7") + ".*" + message):
        imported(name, kind, record)


SHAPES = {
    "poems": {"title": "", "authorName": "", "content": []},
    "odes": {"title": "", "collection": "", "paragraphs": []},
    "couplets": {"title": "", "content": []},
    "couplet_lines": {"first": "", "second": ""},
    "lyrics": {"title": "", "author": "", "paragraphs": []},
    "classical": {"classical": "", "modern": "", "book": ""},
    "idioms": {"word": "", "explanation": "", "pinyin": "", "derivation": "", "example": ""},
    "xiehouyu": {"riddle": "", "answer": ""},
    "chinese_english": {"simplified": "", "pinyin": "", "meanings": []},
    "fiction": {"book": "", "chapter": "", "text": ""},
    "essays": {"collection": "", "title": "", "text": ""},
    "classical_prose": {"collection": "", "chapter": "", "author": "", "paragraphs": []},
    "themed_stories": {"names": "", "genre": "", "theme": "", "story": ""},
    "product": {"content": "", "summary": ""},
}
ODD = st.text('话说山水人。，！？…“”‘’（）()[]□～★◇・/《》# *|;:"\n\u3000aü1５-—', max_size=60)


@pytest.mark.parametrize("name", SHAPES)
@given(data=st.data())
def test_whatever_the_text_it_is_read_or_skipped(name: str, data: st.DataObject) -> None:
    record = {
        field: data.draw(
            st.lists(ODD, max_size=6) if isinstance(empty, list) else ODD | ODD.map(lambda t: t * 9)
        )
        for field, empty in SHAPES[name].items()
    }
    for item in imported(name, "Composition", record):
        if isinstance(item, Record):
            assert item.group and item.source == "x.jsonl:7"
            assert any(text.strip() for text in item.fields.values())
        else:
            assert isinstance(item, Skipped) and item.reason


@pytest.mark.parametrize(
    ("file", "name", "kind"),
    [
        ("couplet_duilian", "couplet_lines", "Couplet"),
        ("poem_shijing_chuci", "odes", "AncientPoem"),
        ("lyric_yuanqu", "lyrics", "LyricGeneration"),
        ("dict_xiehouyu", "xiehouyu", "Dictionary"),
        ("story_tinychinese", "themed_stories", "StoryGeneration"),
        ("prose_luxun", "essays", "Composition"),
        ("prose_guwen", "classical_prose", "ProseGeneration"),
        ("product_advertisegen", "product", "ProductDesc"),
    ],
)
def test_whole_files_of_the_pack_render(shared: Path, file: str, name: str, kind: str) -> None:
    """Every record is rendered or skipped, and most are rendered."""
    found = read(shared / "data" / "pack" / f"{file}.jsonl.zst", name, kind)
    records = [item for item in found if isinstance(item, Record)]
    assert 0.5 * len(found) < len(records)
    for item in records[::7]:
        example = task(kind).render(item.fields, source=item.source)
        assert example.input.strip() and example.target.strip()
        assert not re.search("[□■�]", example.target)
