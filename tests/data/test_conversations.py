"""Conversations: however one is published, it becomes the same example; what is none is skipped with a reason."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

import firefly.data.conversations  # noqa: F401  registers its importers
from firefly.data.example import Example, Message
from firefly.data.importers import IMPORTERS, Imported, Origin, Skipped, Whole, recognise
from firefly.data.readers import read_records
from firefly.errors import InputError

Pairs = list[tuple[str, str]]
Writer = Callable[[str, Pairs], dict[str, Any]]


def firefly_form(system: str, pairs: Pairs) -> dict[str, Any]:
    return {"kind": "BELLE"} | messages_form(system, pairs)


def alpaca_form(system: str, pairs: Pairs) -> dict[str, Any]:
    question, answer = pairs[-1]
    return {
        "instruction": question,
        "input": "",
        "output": answer,
        "history": [list(p) for p in pairs[:-1]],
    } | {"system": system}


def conversation_form(system: str, pairs: Pairs) -> dict[str, Any]:
    return {
        "conversation_id": 3,
        "system": system,
        "conversation": [{"human": question, "assistant": answer} for question, answer in pairs],
    }


def sharegpt_form(system: str, pairs: Pairs) -> dict[str, Any]:
    turns = [
        {"from": name, "value": text} for p in pairs for name, text in zip(("human", "gpt"), p, strict=True)
    ]
    return {"id": "a", "conversations": [{"from": "system", "value": system}] * bool(system) + turns}


def sharegpt_with_system_beside(system: str, pairs: Pairs) -> dict[str, Any]:
    return sharegpt_form("", pairs) | {"system": system}


def messages_form(system: str, pairs: Pairs) -> dict[str, Any]:
    turns = [
        {"role": name, "content": text}
        for p in pairs
        for name, text in zip(("user", "assistant"), p, strict=True)
    ]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + turns}


def messages_with_parts(system: str, pairs: Pairs) -> dict[str, Any]:
    form = messages_form(system, pairs)
    for turn in form["messages"]:
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    return form


def moss_form(system: str, pairs: Pairs) -> dict[str, Any]:
    none = {"Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>: None<eor>\n"}
    return {
        "kind": "brainstorming",
        "meta_instruction": system,
        "chat": {
            f"turn_{number}": {
                "Human": f"<|Human|>: {question} <eoh>\n",
                "MOSS": f"<|MOSS|>: {answer}<eom>\n",
            }
            | none
            for number, (question, answer) in enumerate(pairs, start=1)
        },
    }


FORMS: dict[str, tuple[str, Writer]] = {
    writer.__name__: (name, writer)
    for name, writer in [
        ("firefly", firefly_form),
        ("alpaca", alpaca_form),
        ("conversation", conversation_form),
        ("sharegpt", sharegpt_form),
        ("sharegpt", sharegpt_with_system_beside),
        ("messages", messages_form),
        ("messages", messages_with_parts),
        ("moss", moss_form),
    ]
}
TEXT = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]) | st.sampled_from("\n\t好😀"), max_size=12
).map(str.strip)
SPOKEN = TEXT.filter(bool)


def imported(path: Path, kind: str | None = None) -> list[Imported]:
    name = recognise("auto", path, kind)
    records = read_records(path)
    return [item for line, record in records for item in IMPORTERS[name](record, Origin(path, line, kind))]


def json_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def csv_file(path: Path, records: list[dict[str, Any]]) -> Path:
    """Lists and objects become JSON text in a cell."""
    with path.open("w", encoding="utf-8", newline="") as handle:
        rows = csv.DictWriter(handle, records[0], lineterminator="\n")
        rows.writeheader()
        for record in records:
            rows.writerow(
                {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in record.items()}
            )
    return path


def parquet_file(path: Path, records: list[dict[str, Any]]) -> Path:
    parquet.write_table(pyarrow.Table.from_pylist(records), path)
    return path


@settings(max_examples=50, deadline=None)
@given(system=TEXT, pairs=st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=11))
def test_one_conversation_in_any_form_is_the_same_example(system: str, pairs: Pairs) -> None:
    messages = [Message("system", system)] * bool(system)
    for question, answer in pairs:
        messages += [Message("user", question), Message("assistant", answer)]
    expected = Example("BELLE", tuple(messages))
    with tempfile.TemporaryDirectory() as folder:
        for form, (name, write) in FORMS.items():
            record = write(system, pairs)
            for writer, suffix in ((json_lines, "jsonl"), (csv_file, "csv"), (parquet_file, "parquet")):
                if suffix == "csv" and name == "firefly":
                    continue  # our own datasets are JSON Lines
                path = writer(Path(folder) / f"{form}.{suffix}", [record])
                assert recognise("auto", path, None) == name
                (item,) = imported(path)
                assert isinstance(item, Whole), (form, suffix, item)
                assert (item.example.kind, item.example.messages) == (expected.kind, expected.messages)
                assert item.example.source == f"{path.name}:{2 if suffix == 'csv' else 1}"


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(codec="utf-8")), st.text(st.characters(codec="utf-8")), st.booleans())
def test_our_own_datasets_come_back_as_they_were(question: str, answer: str, longer: bool) -> None:
    example = Example.of("Couplet", question, answer, "x.jsonl:1")
    if longer:
        example = Example("Couplet", (Message("system", ""), *example.messages), "x.jsonl:1")
    (item,) = IMPORTERS["firefly"](json.loads(example.to_json()), Origin(Path("x.jsonl"), 1))
    assert isinstance(item, Whole) and item.example == example


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "tool_calls"),
        ({"messages": [{"role": "tool", "content": "7"}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "not_only_text"),
        ({"conversations": [{"from": "observation", "value": "7"}]}, "tool_calls"),
        ({"conversations": [{"from": "旁白", "value": "7"}]}, "unknown_speaker"),
        ({"conversations": [{"from": "gpt", "value": "你好"}]}, "turns_do_not_alternate"),
        ({"conversations": [{"from": "human", "value": "你好"}]}, "no_answer"),
        ({"conversations": []}, "no_answer"),
        ({"chat": {"turn_1": {"Human": "问", "Commands": "<|Commands|>: Search(x)<eoc>", "MOSS": "答"}}}, "tool_calls"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_of_two_is_skipped(tmp_path: Path, record: Any, reason: str) -> None:
    (item,) = imported(json_lines(tmp_path / "x.jsonl", [record]))
    assert isinstance(item, Skipped) and item.reason == reason
    assert json.loads(item.text) == record


@pytest.mark.parametrize("form", FORMS)
def test_conversations_of_different_lengths_share_a_parquet_file(tmp_path: Path, form: str) -> None:
    """Parquet gives every record the fields of all the others, as nulls."""
    pairs = [("一", "二"), ("三", "四"), ("五", "六")]
    records = [FORMS[form][1](system, pairs[:length]) for length, system in ((1, ""), (3, "七"), (2, ""))]
    found = imported(parquet_file(tmp_path / "x.parquet", records))
    lengths = [len(item.example.messages) for item in found if isinstance(item, Whole)]
    assert lengths == [2, 7, 4]


def test_a_last_question_without_an_answer_is_left_out(tmp_path: Path) -> None:
    record = sharegpt_form("", [("问", "答"), ("还有呢", "")])
    record["conversations"].pop()
    (item,) = imported(json_lines(tmp_path / "x.jsonl", [record]))
    assert isinstance(item, Whole) and [m.content for m in item.example.messages] == ["问", "答"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": 3}, "'messages' is a int where a list of turns is needed"),
        ({"messages": "[3"}, "'messages' is text that is not valid JSON"),
        ({"messages": '[{"role": "user", "role": "x"}]'}, "'messages' is text that is not valid JSON .*occurs twice"),
        ({"messages": '["\\ud83d"]'}, "'messages' is text that is not valid JSON .*surrogate"),
        ({"messages": [3]}, "'messages' must be a list of objects"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\] needs 'role' and 'content'"),
        ({"messages": [{"role": 7, "content": "x"}]}, r"messages\[0\] needs 'role' and 'content'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, r"'messages\[0\].content' is a dict"),
        ({"conversations": [{"from": "human", "value": ["a"], "x": 1}]}, None),
        ({"conversation": [{"human": "x", "assistant": True}]}, "'assistant' is a bool"),
        ({"conversation": [{"human": "x"}]}, r"conversation\[0\] needs 'human' and 'assistant'"),
        ({"instruction": "a", "output": "b", "history": 3}, "'history'"),
        ({"instruction": "a", "output": "b", "history": [["x"]]}, r"'history' must be a list of \[question, answer\]"),
        ({"instruction": "a", "output": ["b"]}, "'output' is a list"),
        ({"chat": []}, "'chat' must be an object of turns"),
        ({"chat": {"turn_1": {"Human": "x"}}}, "'chat' needs 'Human' and 'MOSS' in every turn"),
    ],
)  # fmt: skip
def test_wrong_types_and_missing_fields_are_one_sentence(
    tmp_path: Path, record: Any, says: str | None
) -> None:
    path = json_lines(tmp_path / "x.jsonl", [record])
    if says is None:
        assert imported(path)
        return
    with pytest.raises(InputError, match=rf"x\.jsonl, line 1: .*{says}"):
        imported(path)


def test_the_recipes_task_names_the_kind_and_numbers_become_text(tmp_path: Path) -> None:
    record = {"instruction": "1+1", "output": 2, "history": ""}
    (item,) = imported(json_lines(tmp_path / "x.jsonl", [record]), "Cot")
    assert isinstance(item, Whole) and item.example == Example.of("Cot", "1+1", "2", "x.jsonl:1")


def test_the_packs_conversations(shared: Path) -> None:
    """Real files of each form are recognised, and next to nothing in them is unusable."""
    expected = {
        "inst_moss_sample": ("moss", 579, {}),
        "inst_sharegpt_zh_1k": ("sharegpt", 932, {"no_answer": 1}),
        "corr_grammar": ("sharegpt", 1058, {}),
        "inst_oasst_zh": ("alpaca", 399, {}),
        "inst_en_lima": ("alpaca", 979, {}),
    }
    for name, (importer, num_records, reasons) in expected.items():
        path = shared / "data" / "pack" / f"{name}.jsonl.zst"
        assert recognise("auto", path, None) == importer
        found = imported(path)
        assert len(found) == num_records
        skipped = [item.reason for item in found if isinstance(item, Skipped)]
        assert {reason: skipped.count(reason) for reason in skipped} == reasons
        assert not any(
            mark in m.content
            for item in found
            if isinstance(item, Whole) and importer == "moss"
            for m in item.example.messages
            for mark in ("<eoh>", "<eom>", "<|Human|>", "<|MOSS|>")
        )
