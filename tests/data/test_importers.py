"""Importers: every raw format becomes the right records, and bad input is one clear sentence."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from firefly.data.importers import IMPORTERS, Imported, Origin, Record, Skipped, Whole, read_verse, recognise
from firefly.data.readers import read_records
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


def read(path: Path, name: str, kind: str | None = None) -> list[Imported]:
    records = read_records(path)
    return [item for line, record in records for item in IMPORTERS[name](record, Origin(path, line, kind))]


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


def test_firefly_alpaca_and_messages_become_examples(tmp_path: Path) -> None:
    path = write(
        tmp_path / "f.jsonl",
        [
            {"kind": "Couplet", "input": "上联", "target": "下联"},
            {"instruction": "翻译", "input": "你好", "output": "Hello"},
            {"instruction": "再见", "input": "", "output": "Bye", "history": [["早", "早上好"]]},
            {
                "kind": "Chat",
                "messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}],
            },
        ],
    )
    found = [item.example for item in read(path, "firefly") if isinstance(item, Whole)]
    assert [(example.kind, example.input, example.target) for example in found] == [
        ("Couplet", "上联", "下联"),
        ("BELLE", "翻译\n你好", "Hello"),
        ("BELLE", "早\n早上好\n再见", "Bye"),
        ("Chat", "问", "答"),
    ]
    assert [example.source for example in found] == [f"f.jsonl:{line}" for line in (1, 2, 3, 4)]


def test_plain_text_is_one_assistant_message_a_document(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("第一段。\n\n第二段。\n", "utf-8")
    path = write(tmp_path / "t.jsonl", [{"text": "第一段。"}, {"text": "第二段。"}])
    for name in (tmp_path / "t.txt", path):
        found = [item.example for item in read(name, "text") if isinstance(item, Whole)]
        assert [(len(example.messages), example.target) for example in found] == [
            (1, "第一段。"),
            (1, "第二段。"),
        ]
        assert {example.kind for example in found} == {"Text"}


def test_numbers_become_text_and_foreign_fields_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"review": "好", "label": 1, "id": [3]}])
    found = read(path, "records", "SentimentAnalyze")
    assert isinstance(found[0], Record)
    assert found[0].fields == {"review": "好", "label": "1"}


@pytest.mark.parametrize(
    ("record", "kind", "expected"),
    [
        ({"kind": "X", "input": "a", "target": "b"}, None, "firefly"),
        ({"instruction": "a", "output": "b"}, None, "firefly"),
        ({"messages": []}, None, "firefly"),
        (DENGGAO, "AncientPoem", "poems"),
        (DENGGAO, "Couplet", "couplets"),
        ({"word": "a", "explanation": "b"}, "Dictionary", "records"),
        ({"text": "a"}, None, "text"),
    ],
)
def test_auto_recognises_a_format(tmp_path: Path, record: Any, kind: str | None, expected: str) -> None:
    assert recognise("auto", write(tmp_path / "r.jsonl", [record]), kind) == expected


def test_auto_takes_a_txt_file_as_text_and_guesses_nothing_from_an_odd_name(tmp_path: Path) -> None:
    for name in ("t.txt", "t.jsonl.bak"):
        (tmp_path / name).write_text('{"text": "正文"}\n', "utf-8")
    assert recognise("auto", tmp_path / "t.txt", None) == "text"
    with pytest.raises(InputError, match=r"t\.jsonl\.bak: cannot tell the format from the name"):
        recognise("auto", tmp_path / "t.jsonl.bak", None)


@pytest.mark.parametrize("suffix", ["gz", "xz", "zst"])
def test_compressed_files_read_the_same(tmp_path: Path, suffix: str) -> None:
    plain = write(tmp_path / "p.jsonl", [DENGGAO, GUANQUELOU])
    packed = tmp_path / f"p.jsonl.{suffix}"
    data = plain.read_bytes()
    if suffix == "zst":
        with pyarrow.output_stream(str(packed), compression="zstd") as stream:
            stream.write(data)
    else:
        packed.write_bytes({"gz": gzip, "xz": lzma}[suffix].compress(data))  # type: ignore[attr-defined]
    assert recognise("auto", packed, "AncientPoem") == "poems"
    fields = [
        [getattr(item, "fields", None) for item in read(path, "poems", "AncientPoem")]
        for path in (plain, packed)
    ]
    assert fields[0] == fields[1] and len(fields[0]) == 2


def test_bom_and_crlf_do_not_matter(tmp_path: Path) -> None:
    plain = write(tmp_path / "r.jsonl", [{"word": "甲", "explanation": "乙"}] * 2)
    expected = read(plain, "records", "Dictionary")
    plain.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\n", b"\r\n"))
    assert read(plain, "records", "Dictionary") == expected


@pytest.mark.parametrize(
    ("name", "kind", "content", "message"),
    [
        (
            "records",
            "Dictionary",
            b'{"word": "a", "explanation": "b"}\n{"word": \n',
            "line 2: not valid JSON",
        ),
        ("records", "Dictionary", b'{"word": "\xff"}\n', "line 1: byte 10 is not valid UTF-8"),
        ("records", "Dictionary", b"[1]\n", "line 1: a JSON list"),
        (
            "records",
            "Dictionary",
            b'{"wrod": "a"}\n',
            "line 1: task Dictionary needs .*the fields there are: wrod",
        ),
        ("records", "Dictionary", b'{"word": ["a"]}\n', "'word' is a list"),
        (
            "poems",
            "AncientPoem",
            b'{"title": "a", "text": "b"}\n',
            "line 1: field 'content' .*there are: text, title",
        ),
        ("text", None, b'{"txt": "a"}\n', "line 1: field 'text' is missing.*there are: txt"),
        ("firefly", None, b'{"kind": "A", "input": "b"}\n', "line 1: field 'target' is missing"),
        ("firefly", None, b'{"instruction": "a", "output": "b", "history": 3}\n', "line 1: field 'history'"),
        ("records", "Dictionary", b"", "is empty"),
    ],
)
def test_bad_input_names_file_line_and_field(
    tmp_path: Path, name: str, kind: str | None, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(path, name, kind)
    assert "bad.jsonl" in str(caught.value)


def test_unknown_names_list_the_choices(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [{"a": "b"}])
    with pytest.raises(InputError, match="Unknown importer 'recrods': did you mean 'records'"):
        recognise("recrods", path, None)
    with pytest.raises(InputError, match="name the task that renders them"):
        recognise("records", path, None)
    with pytest.raises(InputError, match="Unknown task 'Dictionry': did you mean 'Dictionary'"):
        recognise("records", path, "Dictionry")
    with pytest.raises(InputError, match=r"cannot tell the format from the fields of the first record \(a\)"):
        recognise("auto", path, None)
