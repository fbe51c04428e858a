"""Labelled corpora: what the annotators meant arrives, the useless is skipped by name, the wrong is refused."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from firefly.data.corpora import CLUENER, group_of
from firefly.data.importers import IMPORTERS, NEED_TASK, Imported, Origin, Record, Skipped, Whole
from firefly.data.readers import read_records
from firefly.data.tasks import load_tasks, task
from firefly.errors import InputError

RAW = Path(__file__).parent / "raw_samples"


def imported(name: str, record: dict[str, Any], kind: str | None = None) -> Imported:
    (item,) = IMPORTERS[name](record, Origin(Path("corpus.jsonl"), 7, kind))
    return item


def fields(name: str, record: dict[str, Any], kind: str | None = None) -> dict[str, str]:
    item = imported(name, record, kind)
    assert isinstance(item, Record), item
    assert item.source == "corpus.jsonl:7"
    return item.fields


def reason(name: str, record: dict[str, Any]) -> str:
    item = imported(name, record)
    assert isinstance(item, Skipped), item
    assert item.text, "a rejected record can be recognised"
    return item.reason


# Entities


def bio(text: str, spans: list[tuple[int, int]], kind: str = "PER") -> dict[str, Any]:
    """Weibo's form of a text with names at [first, end)."""
    tags = ["O"] * len(text)
    for first, end in spans:
        tags[first:end] = [f"B-{kind}.NAM"] + [f"I-{kind}.NAM"] * (end - first - 1)
    return {"text": text, "chars": list(text), "tags": tags}


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=5))
def test_spans_and_tags_give_the_same_names(gaps: list[tuple[int, int]]) -> None:
    text, spans = "", []
    for gap, length in gaps:
        text += "。" * gap
        spans.append((len(text), len(text) + length))
        text += "".join(chr(0x4E00 + len(text) + offset) for offset in range(length))
    text += "。"
    names: dict[str, list[list[int]]] = {}
    for first, end in spans:
        names.setdefault(text[first:end], []).append([first, end - 1])
    by_span = fields("ner_spans", {"text": text, "label": {"name": names} if names else {}})
    by_tag = fields("ner_bio", bio(text, spans))
    assert by_span["entities"] == by_tag["entities"]
    assert json.loads(by_tag["entities_json"]) == ({"人名": [text[a:b] for a, b in spans]} if spans else {})


def test_entities_stand_in_reading_order_in_every_form() -> None:
    raw = {
        "text": "李雷在北京遇见韩梅，李雷请客",
        "label": {"name": {"韩梅": [[7, 8]], "李雷": [[0, 1], [10, 11]]}, "address": {"北京": [[3, 4]]}},
    }
    found = fields("ner_spans", raw)
    assert found["entities"] == "人名：李雷、韩梅；地址：北京"
    assert found["entity_lines"] == "李雷（人名）\n韩梅（人名）\n北京（地址）"
    assert json.loads(found["entities_json"]) == {"人名": ["李雷", "韩梅"], "地址": ["北京"]}
    assert found["types"].split("、") == list(CLUENER.values())


def test_the_type_asked_for_is_sometimes_absent_and_answered_so() -> None:
    answers = set()
    for index in range(40):
        found = fields("ner_bio", bio(f"小明第{index}次来", [(0, 2)]))
        answers.add(found["of_asked"])
        assert (found["of_asked"] == "小明") == (found["asked"] == "人名")
    assert answers == {"小明", "无"}


def test_nouns_are_no_names_and_a_stray_inside_tag_opens_one() -> None:
    text = "老师带小红去"
    tags = ["B-PER.NOM", "I-PER.NOM", "O", "I-PER.NAM", "I-PER.NAM", "O"]
    assert fields("ner_bio", {"text": text, "chars": list(text), "tags": tags})["entities"] == "人名：小红"


# Corrections


def test_a_correction_lists_the_characters_that_changed() -> None:
    found = fields("spelling", {"sentence": "想吃台湾采，有名的采。", "corrected": "想吃台湾菜，有名的菜。"})
    assert found["edits"] == "采→菜；采→菜"
    assert found["verdict"] == "有错误"
    right = fields("spelling", {"sentence": "没问题。", "corrected": "没问题。"})
    assert (right["edits"], right["verdict"], right["corrected"]) == ("无", "没有错误", "没问题。")


def test_of_several_references_the_usable_and_the_commonest_is_taken() -> None:
    assert fields("mucgec", {"source": "他很高兴的。", "references": ["无法标注", "他很高兴。"]})[
        "corrected"
    ] == ("他很高兴。")
    assert fields("mucgec", {"source": "他很好。", "references": ["没有错误"]})["corrected"] == "他很好。"
    assert (
        reason("mucgec", {"source": "冈和电池。", "references": ["[缺失成分]和电池。"]})
        == "no_whole_reference"
    )
    notes = [
        {"correction": "甲。", "annotator_count": 9, "edits_count": 1, "is_grammatical": 0},
        {"correction": "乙。", "annotator_count": 3, "edits_count": 4, "is_grammatical": 1},
        {"correction": "丙。", "annotator_count": 3, "edits_count": 2, "is_grammatical": 1},
        {"correction": "丁。", "annotator_count": 1, "edits_count": 1, "is_grammatical": 1},
    ]
    raw = {"sentence_text": "病句。", "article_id": 5, "sentence_annos": notes}
    assert fields("yaclc", raw)["corrected"] == "丙。"
    assert reason("yaclc", raw | {"sentence_annos": notes[:1]}) == "no_grammatical_reference"


def test_sentences_of_one_learners_article_share_a_group() -> None:
    note = {"correction": "好。", "annotator_count": 1, "edits_count": 1, "is_grammatical": 1}
    raw = [{"sentence_text": text, "article_id": 5, "sentence_annos": [note]} for text in ("一。", "二。")]
    assert len({imported("yaclc", record).group for record in raw}) == 1  # type: ignore[union-attr]


# Reading, keywords, meetings


def test_reading_takes_the_commonest_answer_and_keeps_a_passage_together() -> None:
    raw = {"context": "甲乙丙丁。", "title": "", "question": "谁？", "answers": ["乙丙", "乙", "乙"]}
    first, second = imported("squad", raw), imported("squad", raw | {"question": "什么？"})
    assert isinstance(first, Record) and isinstance(second, Record)
    assert first.fields["answer"] == "乙"
    assert first.group == second.group == group_of("甲乙丙丁。")
    assert reason("squad", raw | {"answers": []}) == "no_question_or_answer"
    assert reason("squad", raw | {"question": " "}) == "no_question_or_answer"


def test_multiple_choice_letters_match_the_answer() -> None:
    raw = {
        "passage": ["男：早。", "女：早。"],
        "question": "几个人？",
        "choice": ["一个", "两个"],
        "answer": "两个",
    }
    found = fields("multiple_choice", raw)
    assert found["options"] == "A. 一个\nB. 两个"
    assert (found["letter"], found["choice"], found["passage"]) == ("B", "两个", "男：早。\n女：早。")
    assert reason("multiple_choice", raw | {"choice": ["两个", "两个"]}) == "ambiguous_choices"
    assert reason("multiple_choice", raw | {"answer": "三个"}) == "ambiguous_choices"
    assert reason("multiple_choice", raw | {"choice": ["两个", *"甲乙丙丁戊己庚辛"]}) == "ambiguous_choices"


def test_keywords_come_without_forged_tags_and_without_the_title() -> None:
    abstract = "本文研究甲。结果很好。"
    found = fields("csl_keywords", {"abst_title": abstract + " 甲的研究", "keywords": "甲_乙_甲"})
    assert (found["text"], found["keywords"], found["count"]) == (abstract, "甲、乙", "2")
    candidates = {"abst": abstract, "keyword": ["甲", "丙"]}
    assert reason("csl_candidates", candidates | {"label": "0"}) == "forged_keywords"
    assert reason("csl_candidates", candidates) == "unlabelled"
    assert fields("csl_candidates", candidates | {"label": "1"})["keyword_lines"] == "甲\n丙"
    tags = {"sentence": "小微企业贷款利率下降，银行让利", "keywords": "贷款,银行,小微企业贷款,股票"}
    assert fields("tags", tags)["keywords"] == "小微企业贷款、银行"
    assert reason("tags", tags | {"keywords": "贷款,小微企业贷款"}) == "too_few_keywords_in_text"


def test_an_abstract_has_one_group_whatever_is_asked_about_it() -> None:
    abstract = "本文研究甲。结果很好。"
    keywords = imported("csl_keywords", {"abst_title": f"{abstract} 甲的研究", "keywords": "甲"})
    title = imported("grouped", {"text": abstract, "title": "甲的研究"}, "Summary")
    assert isinstance(keywords, Record) and isinstance(title, Record)
    assert keywords.group == title.group


# Knowledge and reasoning


def test_triples_give_their_parts() -> None:
    found = fields("triples", {"question": "谁写的？", "triple": "红楼梦 ||| 作者 ||| 曹雪芹"})
    assert (found["subject"], found["relation"], found["answer"]) == ("红楼梦", "作者", "曹雪芹")
    assert (
        reason("triples", {"question": "谁写的？", "triple": "红楼梦 ||| 作者 ||| "})
        == "no_question_or_answer"
    )


def test_cross_references_are_no_translations() -> None:
    raw = {"simplified": "个", "meanings": ["variant of 個|个[ge4]", "individual", "CL:個|个[ge4]", "this"]}
    assert fields("cedict", raw)["meaning"] == "individual; this"
    assert reason("cedict", raw | {"meanings": ["see 個|个[ge4]"]}) == "no_plain_meaning"


@pytest.mark.parametrize(
    ("equation", "answer", "shown"),
    [
        ("x=240/3*5", "400", "240÷3×5"),
        ("x=1-(1/5)-(1/4)", "(11/20)", "1-(1/5)-(1/4)"),
        ("x=(15/(15+1))*100%", "93.75%", "(15÷(15+1))×100%"),
        ("x=980/(3*980/(35*2))", "23(1/3)", "980÷(3×980÷(35×2))"),
        ("x=20/5%", "400", "20÷5%"),
        ("x=3.14*2**2", "12.56", "3.14×2^2"),
    ],
)
def test_an_equation_is_shown_as_in_school_when_it_gives_the_answer(
    equation: str, answer: str, shown: str
) -> None:
    found = fields("ape210k", {"original_text": "题", "equation": equation, "ans": answer})
    assert found["equation"] == shown
    assert found["solution"] == f"列式计算：{shown}＝{found['answer']}\n答案：{found['answer']}"


@pytest.mark.parametrize("equation", ["x=2+3", "x=1/0", "x=9**9**9", "x=__import__('os')", "x=((((1+", "x="])
def test_an_equation_that_does_not_give_the_answer_is_skipped(equation: str) -> None:
    assert (
        reason("ape210k", {"original_text": "题", "equation": equation, "ans": "6"}) == "equation_disagrees"
    )


def test_a_bare_number_is_no_reasoning() -> None:
    assert reason("ape210k", {"original_text": "题", "equation": "x=6", "ans": "6"}) == "no_steps"


def test_mixed_numbers_are_written_out() -> None:
    found = fields("ape210k", {"original_text": "题", "equation": "x=70/3", "ans": "23(1/3)"})
    assert found["answer"] == "23又1/3"


def test_gsm8k_loses_the_calculators_marks() -> None:
    raw = {"question": "How many?", "answer": "It is 2 + 3 = <<2+3=5>>5.\n#### 5"}
    found = fields("gsm8k", raw)
    assert found["rationale"] == "It is 2 + 3 = 5.\nThe answer is 5."
    assert found["result"] == "5"


def test_exam_questions_lose_the_pdfs_layout() -> None:
    raw = {
        "question": "3．（ 4分）下列叙述 ，正确的是（ 　　） \nA．甲   \nB．乙\n",
        "analysis": "解： A、错误；  \nB正确。\n故选： B。\n",
        "answer": ["B"],
    }
    found = fields("gaokao", raw)
    assert found["question"] == "下列叙述，正确的是（）\nA．甲\nB．乙"
    assert found["solution"] == "解：A、错误；\nB正确。\n故选：B。\n答案：B"
    blank = fields("gaokao", raw | {"question": "它属于 　   　种群。\n"})
    assert blank["question"] == "它属于____种群。"
    assert reason("gaokao", raw | {"question": "如图所示，正确的是"}) == "needs_layout"
    assert reason("gaokao", raw | {"question": "翻译画横线的句子"}) == "needs_layout"


def test_code_has_one_kind_of_line_end() -> None:
    raw = {
        "text": "Add.",
        "code": "def add(a, b): \r\n\treturn a + b\r\n",
        "test_list": ["assert add(1, 1) == 2"],
    }
    assert fields("mbpp", raw)["code"] == "def add(a, b):\n\treturn a + b"


# Whole examples


def whole(name: str, record: dict[str, Any], kind: str | None = None) -> Whole:
    item = imported(name, record, kind)
    assert isinstance(item, Whole), item
    return item


def test_alpaca_cot_gets_its_line_ends() -> None:
    mended = whole("alpaca_cot", {"instruction": "Q?\\nOptions:\\n- a", "output": "So a.\\n"}, "Cot").example
    assert (mended.kind, mended.input, mended.target) == ("Cot", "Q?\nOptions:\n- a", "So a.")


@pytest.mark.parametrize(
    ("kind", "choices", "question", "task"),
    [
        ("nli", ["是的", "不是", "也许"], "甲？", "NLI"),
        ("mrc", None, "甲？", "MRC"),
        ("classify", ["是的", "不是"], "甲？", "TextMatching"),
        ("classify", ["是的", "体育", "财经"], "甲？", "BELLE"),
        ("generate", None, "生成摘要的关键词", "KeywordRecognition"),
        ("generate", None, "意译", "BELLE"),
    ],
)
def test_pclue_says_its_task(kind: str, choices: list[str] | None, question: str, task: str) -> None:
    raw = {"input": question, "target": "是的", "type": kind, "answer_choices": choices}
    assert whole("pclue", raw).example.kind == task


def test_pclue_with_an_answer_outside_its_choices_is_skipped() -> None:
    raw = {"input": "哪类？", "target": "电竞", "type": "classify", "answer_choices": ["体育", "游戏"]}
    assert reason("pclue", raw) == "answer_not_among_choices"


# All of them

# Corpora whose shape an importer must know: file → importer, task, the source's renaming.
PACK: dict[str, tuple[str, str | None, dict[str, str]]] = {
    "ner_cluener": ("ner_spans", "NER", {}),
    "ner_weibo": ("ner_bio", "NER", {}),
    "corr_sighan15": (
        "spelling",
        "TextCorrection",
        {"sentence": "original_text", "corrected": "correct_text"},
    ),
    "corr_yaclc": ("yaclc", "TextCorrection", {}),
    "corr_mucgec": ("mucgec", "TextCorrection", {}),
    "corr_grammar": ("grammar_chat", "TextCorrection", {}),
    "nli_ocnli": ("grouped", "NLI", {"premise": "sentence1", "hypothesis": "sentence2"}),
    "nli_cinlid": ("grouped", "NLI", {"idiom": "sentence1", "other_idiom": "sentence2"}),
    "mrc_cmrc2018_trial": ("squad", "MRC", {}),
    "mrc_c3_d": ("multiple_choice", "MRC", {}),
    "keyword_csl_kg": ("csl_keywords", "KeywordRecognition", {}),
    "keyword_fewclue_csl": ("csl_candidates", "KeywordRecognition", {}),
    "keyword_tnews": ("tags", "KeywordRecognition", {}),
    "match_qbqtc": ("grouped", "TextMatching", {"relevance": "label"}),
    "senti_eprstmt": ("grouped", "SentimentAnalyze", {"review": "sentence"}),
    "summary_vcsum": ("meetings", "Summary", {}),
    "qa_kgclue": ("triples", "OpenQA", {"triple": "answer"}),
    "cot_ape210k": ("ape210k", "Cot", {}),
    "cot_gaokao": ("gaokao", "Cot", {}),
    "cot_gsm8k": ("gsm8k", "Cot", {}),
    "cot_alpaca_cot": ("alpaca_cot", "Cot", {}),
    "prog_mbpp": ("mbpp", "Program", {}),
    "trans_wmt21": ("grouped", "Translation", {}),
    "dict_cc_cedict": ("cedict", "Translation", {}),
    "mix_pclue_9": ("pclue", None, {}),
}


@pytest.mark.parametrize("name", PACK)
def test_the_first_records_of_a_real_corpus_become_questions_and_answers(name: str, shared: Path) -> None:
    used, kind, rename = PACK[name]
    path = shared / "data" / "pack" / f"{name}.jsonl.zst"
    useful = 0
    for line, record in islice(read_records(path), 300):
        record |= {field: record[there] for field, there in rename.items()}
        for item in IMPORTERS[used](record, Origin(path, line, kind)):
            if isinstance(item, Record):
                example = task(kind or "").render(item.fields, source=item.source)
                assert example.input and example.target
            if not isinstance(item, Skipped):
                useful += 1
    assert useful >= 60


IMPORTERS_HERE = sorted(
    name for name, function in IMPORTERS.items() if function.__module__ == "firefly.data.corpora"
)


@pytest.mark.parametrize("name", IMPORTERS_HERE)
@pytest.mark.parametrize(
    "record",
    [
        {},
        {"text": 3},
        {
            "text": "x", "label": {"name": 5}, "chars": "ab", "tags": ["O"], "source": "x", "references": "x",
            "context": [["a"]], "speaker": [], "passage": "p", "question": "q", "choice": [1], "answer": "#",
            "conversations": [{"from": "human"}], "sentence_text": "x", "sentence_annos": [{}], "abst": "x",
            "keyword": "a", "triple": "a ||| b", "simplified": "x", "meanings": "x", "code": "x",
            "test_list": [1], "equation": 3, "answers": [None], "abst_title": ["x"], "sentence": [], "input": {},
        },
    ],
    ids=["empty", "number", "wrong-types"],
)  # fmt: skip
def test_a_record_of_another_shape_is_refused_in_one_sentence(name: str, record: dict[str, Any]) -> None:
    kind = "Translation" if name in NEED_TASK else None
    with pytest.raises(InputError, match=r"corpus\.jsonl, line 7: .*field") as caught:
        imported(name, record, kind)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "record", "field"),
    [
        ("ner_bio", {"chars": [1], "tags": ["O"]}, "chars"),
        ("ner_bio", {"chars": ["a"], "tags": ["B-XYZ.NAM"]}, "B-XYZ.NAM"),
        ("ner_spans", {"text": "ab", "label": {"planet": {"a": [[0, 0]]}}}, "label"),
        (
            "yaclc",
            {
                "sentence_text": "a",
                "article_id": 1,
                "sentence_annos": [
                    {"correction": "b", "annotator_count": "1", "edits_count": 1, "is_grammatical": 1}
                ],
            },
            "sentence_annos",
        ),
        (
            "grammar_chat",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
            "conversations",
        ),
        ("meetings", {"context": [["a"], ["b"]], "speaker": [1]}, "speaker"),
        ("triples", {"question": "a", "triple": "a | b | c"}, "triple"),
        ("gsm8k", {"question": "a", "answer": "5"}, "answer"),
    ],
)
def test_what_is_wrong_inside_a_field_is_named(name: str, record: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=f"corpus.jsonl, line 7: .*'{re.escape(field)}'"):
        imported(name, record)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
NOTE = {"correction": "好。", "annotator_count": 1, "edits_count": 1, "is_grammatical": 1}
SOUND = [  # importer, task, record
    *(
        (
            sample["importer"],
            kind,
            sample["record"]
            | {name: sample["record"][there] for name, there in sample.get("fields", {}).items()},
        )
        for kind in load_tasks()
        for _, sample in read_records(RAW / f"{kind}.jsonl")
        if sample["importer"] in IMPORTERS_HERE
    ),
    ("yaclc", "TextCorrection", {"sentence_text": "病句。", "article_id": 5, "sentence_annos": [NOTE]}),
    ("alpaca_cot", "Cot", {"instruction": "Q?", "output": "A."}),
    ("pclue", None, {"input": "甲？", "target": "是", "type": "nli", "answer_choices": ["是", "否"]}),
]


def spoilt(value: Any, draw: st.DataObject) -> Any:
    """The value with something somewhere in it replaced by anything."""
    if isinstance(value, dict) and value and draw.draw(st.booleans()):
        name = draw.draw(st.sampled_from(sorted(value)))
        return value | {name: spoilt(value[name], draw)}
    if isinstance(value, list) and value and draw.draw(st.booleans()):
        place = draw.draw(st.integers(0, len(value) - 1))
        return [*value[:place], spoilt(value[place], draw), *value[place + 1 :]]
    return draw.draw(JSON)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SOUND), st.data())
def test_a_damaged_record_is_used_skipped_or_refused_and_never_a_crash(
    sound: tuple[str, str | None, dict[str, Any]], draw: st.DataObject
) -> None:
    name, kind, record = sound
    damaged = spoilt(record, draw)
    if not isinstance(damaged, dict):
        return
    try:
        items = list(IMPORTERS[name](damaged, Origin(Path("corpus.jsonl"), 7, kind)))
    except InputError:
        return
    assert items
    for item in items:
        if isinstance(item, Record):
            assert all(isinstance(text, str) for text in item.fields.values())


def test_every_importer_here_has_a_sound_record_above() -> None:
    assert {name for name, _, _ in SOUND} == set(IMPORTERS_HERE)
