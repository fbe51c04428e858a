"""Decontamination finds exactly the texts that share an n-gram, and says with what."""

from __future__ import annotations

import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.dedup import comparable
from firefly.data.overlap import EvaluationGrams
from firefly.errors import InputError

QUESTION = "请问鲁迅先生的原名是什么，他的故乡又在哪里？"
LONG = "床前明月光疑是地上霜举头望明月低头思故乡"


def load(folder: Path, *records: dict[str, Any], n: int = 10) -> EvaluationGrams:
    path = folder / "test.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return EvaluationGrams.load([path], n)


def test_a_hit_names_the_gram_and_its_place(tmp_path: Path) -> None:
    grams = load(tmp_path, {"input": "别的问题，很长很长很长很长"}, {"messages": [{"content": QUESTION}]})
    assert grams.hit(f"老师问：{QUESTION}答：") == "请问鲁迅先生的原名是 (test.jsonl:2)"
    assert grams.hit("原名是什么他的故乡又在何方") == "原名是什么他的故乡又 (test.jsonl:2)"
    assert grams.hit("原名是什么，他的故乡") is None  # nine characters
    assert grams.hit("") is None


def test_case_width_space_and_punctuation_do_not_count(tmp_path: Path) -> None:
    grams = load(tmp_path, {"text": "The Quick Brown Fox，跳过了懒狗"})
    assert grams.hit("the ｑｕｉｃｋ\nbrown-fox") is not None


def test_short_records_count_as_a_whole_by_their_longest_string(tmp_path: Path) -> None:
    grams = load(tmp_path, {"first": "晚风摇树树还挺", "second": "晨露润花"}, {"q": "天气", "a": "晴"})
    assert grams.hit("上联：晚风摇树，树还挺！") == "晚风摇树树还挺 (test.jsonl:1)"
    assert grams.hit("晚风摇树树还") is None
    assert grams.hit("晨露润花花更红，今天的天气晴好得很") is None  # too short to tell anything


def test_long_records_do_not_count_by_their_labels(tmp_path: Path) -> None:
    grams = load(tmp_path, {"input": LONG, "target": "中华人民共和国"})
    assert grams.hit("中华人民共和国成立于一九四九年十月一日") is None


def test_wording_that_many_records_share_is_no_content(tmp_path: Path) -> None:
    wording = "请根据上面的短文回答下面的问题"
    records = [{"input": f"{chr(0x4E00 + i) * 20}{wording}"} for i in range(9)]
    assert load(tmp_path, *records).hit(f"新的短文。{wording}：谁？") is None
    assert load(tmp_path, *records[:8]).hit(f"新的短文。{wording}：谁？") is not None
    assert load(tmp_path, *records).hit(f"{chr(0x4E03) * 12}") == f"{chr(0x4E03) * 10} (test.jsonl:4)"


def test_any_format_a_folder_and_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(LONG + "\n", "utf-8")
    (tmp_path / "b.csv").write_text(f"q,a\n1,{QUESTION}\n", "utf-8")
    for paths in ([tmp_path], [tmp_path / "*.*"], [tmp_path / "a.txt", tmp_path / "b.csv"]):
        grams = EvaluationGrams.load(paths, 10)
        assert grams.hit(LONG) == f"{LONG[:10]} (a.txt:1)"
        assert grams.hit(QUESTION) is not None
    with pytest.raises(InputError, match="does not exist"):
        EvaluationGrams.load([tmp_path / "no.txt"], 10)


def test_nothing_to_compare_with(tmp_path: Path) -> None:
    assert load(tmp_path, {"id": 1}).hit(LONG) is None
    assert EvaluationGrams.load([], 10).hit(LONG) is None


def test_it_travels_to_workers(tmp_path: Path) -> None:
    grams = load(tmp_path, {"text": LONG})
    assert pickle.loads(pickle.dumps(grams)).hit(LONG) == grams.hit(LONG)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.text("甲乙aB ，😀", max_size=14), max_size=5),
    st.text("甲乙ab，😀", max_size=30),
    st.integers(5, 7),
)
def test_it_is_a_search_for_common_substrings(evaluation: list[str], text: str, n: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        grams = load(Path(folder), {"x": evaluation}, n=n)
    known = [comparable(item) for item in evaluation]
    longest = max(known, key=len, default="")
    wanted = {item[at : at + n] for item in known for at in range(len(item) - n + 1)}
    if len(longest) < n:
        wanted = {longest} if len(longest) >= 5 else set()
    assert (grams.hit(text) is not None) == any(gram in comparable(text) for gram in wanted)
