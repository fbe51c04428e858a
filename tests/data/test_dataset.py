"""The dataset directory: nothing is lost uncounted, no group is split, the same sources give the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from firefly import console
from firefly.data import dataset
from firefly.data.dataset import DatasetResult, build_dataset, read_dataset, side_of
from firefly.data.importers import IMPORTERS, Origin, Record
from firefly.data.readers import read_records
from firefly.data.stats import length_chart, length_summary
from firefly.errors import InputError, OutputError
from firefly.recipe import DataSection

HAN = "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜金生丽水玉出昆冈"


@pytest.fixture(autouse=True)
def silence() -> Any:
    console.quiet()
    yield
    console.quiet(False)


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def idioms(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [
        {"word": f"词{index}", "explanation": f"第{index}条释义"} for index in range(start, start + count)
    ]


def poems(count: int) -> list[dict[str, Any]]:
    """律诗 with characters that never face themselves."""
    made = []
    for index in range(count):
        lines = [
            "".join(HAN[(index * 7 + row * 5 + place * (index % 3 + 1)) % len(HAN)] for place in range(5))
            for row in range(8)
        ]
        made.append(
            {"title": f"题{HAN[index % len(HAN)]}", "authorName": "某", "dynasty": "唐", "content": lines}
        )
    return made


def build(out: Path, *sources: dict[str, Any], **options: Any) -> DatasetResult:
    return build_dataset(DataSection.model_validate({"sources": list(sources)} | options), out)


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]


def test_every_record_is_trained_on_held_out_or_rejected_with_its_reason(tmp_path: Path) -> None:
    records = [
        *idioms(50),
        idioms(1)[0],
        {"word": "空", "explanation": ""},
        {"word": "坏\ufffd", "explanation": "x"},
    ]
    path = write(tmp_path / "i.jsonl", records)
    result = build(tmp_path / "out", {"path": str(path), "task": "Dictionary"}, validation_fraction=0.2)
    rejects = lines(tmp_path / "out", "rejects.jsonl")
    assert result.train + result.validation + result.rejected == len(records) == 53
    assert result.validation > 0
    assert [(row["source"], row["reason"]) for row in rejects] == [
        ("i.jsonl:51", "duplicate"),
        ("i.jsonl:52", "empty_field"),
        ("i.jsonl:53", "control_characters"),
    ]
    assert "空" in rejects[1]["text"]
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    assert card["kinds"]["Dictionary"]["reasons"] == {
        "control_characters": 1,
        "duplicate": 1,
        "empty_field": 1,
    }
    assert card["sources"][0]["candidates"] == 53 and card["sources"][0]["records"] == 53
    assert card["kinds"]["Dictionary"]["characters"]["count"] == 50
    assert (tmp_path / "out" / "tasks.png").stat().st_size > 1000


def test_examples_come_back_in_the_order_of_the_sources(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", idioms(9))
    write(
        tmp_path / "a.jsonl", [{"kind": "Chat", "input": f"问{index}", "target": "答"} for index in range(9)]
    )
    build(
        tmp_path / "out",
        *({"path": str(tmp_path / name), "task": "Dictionary"} for name in ("b.jsonl", "a.jsonl")),
    )
    places = [example.source for example in read_dataset(tmp_path / "out")]
    assert places == sorted(places, key=lambda place: (place[0] == "a", place))
    assert {example.kind for example in read_dataset(tmp_path / "out")} == {"Dictionary", "Chat"}


def test_plain_text_survives_the_round_trip(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("".join(f"第{index}段。\n" for index in range(5)), "utf-8")
    build(tmp_path / "out", {"path": str(tmp_path / "t.txt")}, validation_fraction=0)
    assert [example.target for example in read_dataset(tmp_path / "out")] == [
        f"第{index}段。" for index in range(5)
    ]
    assert list(read_dataset(tmp_path / "out", "validation")) == []


def test_no_couplet_is_held_out_from_a_training_poem(tmp_path: Path) -> None:
    path = str(write(tmp_path / "p.jsonl", poems(120)))
    sources = [
        {"path": path, "importer": "couplets", "task": "Couplet"},
        {"path": path, "task": "AncientPoem"},
    ]
    build(tmp_path / "out", *sources, validation_fraction=0.3)
    # A poem and its couplets have the same line number as their source.
    sides = [
        {example.source for example in read_dataset(tmp_path / "out", side)}
        for side in ("train", "validation")
    ]
    assert sides[0] and sides[1]
    assert not sides[0] & sides[1]
    kinds = {example.kind for example in read_dataset(tmp_path / "out", "validation")}
    assert kinds == {"Couplet", "AncientPoem"}


def test_growing_sources_never_move_a_record_to_the_other_side(tmp_path: Path) -> None:
    small, extra = (
        write(tmp_path / "s.jsonl", idioms(200)),
        write(tmp_path / "e.jsonl", idioms(300, start=150)),
    )
    build(tmp_path / "one", {"path": str(small), "task": "Dictionary"}, validation_fraction=0.25)
    build(
        tmp_path / "two",
        *({"path": str(path), "task": "Dictionary", "repeat": 2} for path in (extra, small)),
        validation_fraction=0.25,
    )

    def sides(folder: Path) -> dict[str, str]:
        answers = {}
        for side in ("train", "validation"):
            for example in read_dataset(folder, side):
                number = "".join(filter(str.isdigit, example.target))
                assert answers.setdefault(number, side) == side, "variants of one record are split"
        return answers

    one, two = sides(tmp_path / "one"), sides(tmp_path / "two")
    assert len(one) == 200 and len(two) == 450
    assert {number: two[number] for number in one} == one
    assert 25 < sum(side == "validation" for side in one.values()) < 75


def test_a_larger_fraction_only_adds_to_validation() -> None:
    groups = [f"g{index}" for index in range(2000)]
    held = [{group for group in groups if side_of(group, share) == "validation"} for share in (0.0, 0.1, 0.5)]
    assert held[0] == set() and held[1] < held[2]
    assert len(held[1]) == pytest.approx(200, abs=50)


def test_the_same_sources_give_the_same_bytes(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", [*idioms(30), *idioms(3)]))
    for out in ("one", "two"):
        build(tmp_path / out, {"path": path, "task": "Dictionary", "repeat": 2})
    names = sorted(item.name for item in (tmp_path / "one").iterdir())
    assert names == ["card.json", "rejects.jsonl", "tasks.png", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_cap_takes_the_first_records_and_repeat_asks_in_other_words(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(30)))
    result = build(
        tmp_path / "out", {"path": path, "task": "Dictionary", "cap": 4, "repeat": 3}, validation_fraction=0
    )
    examples = list(read_dataset(tmp_path / "out"))
    assert result.train == len(examples) == 12
    assert {example.source for example in examples} == {f"i.jsonl:{line}" for line in (1, 2, 3, 4)}
    assert len({(example.input, example.target) for example in examples}) == 12
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    assert card["sources"][0]["capped"] is True


def test_the_tasks_own_cap_holds_over_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(30)))
    other = str(write(tmp_path / "j.jsonl", idioms(30, start=30)))
    known = dataset.task("Dictionary")
    monkeypatch.setattr(dataset, "task", lambda _: type(known)(**(vars(known) | {"cap": 40})))
    result = build(tmp_path / "out", *({"path": name, "task": "Dictionary"} for name in (path, other)))
    assert result.train + result.validation == 40


def test_deduplication_can_be_switched_off(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(10) + idioms(10)))
    assert build(tmp_path / "on", {"path": path, "task": "Dictionary"}).rejected == 10
    assert build(tmp_path / "off", {"path": path, "task": "Dictionary"}, deduplicate="off").rejected == 0


def test_a_lone_surrogate_is_rejected_and_still_written(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", [*idioms(3), {"word": "坏", "explanation": "\ud83d"}])
    build(tmp_path / "out", {"path": str(path), "task": "Dictionary"}, validation_fraction=0)
    assert [row["reason"] for row in lines(tmp_path / "out", "rejects.jsonl")] == ["control_characters"]


def test_an_earlier_dataset_survives_bad_input(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", idioms(5))
    build(tmp_path / "out", {"path": str(path), "task": "Dictionary"})
    before = {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()}
    path.write_bytes(path.read_bytes() + b'{"word": "x"}\n')
    with pytest.raises(InputError, match=r"i\.jsonl:6: task Dictionary needs .*the fields there are: word"):
        build(tmp_path / "out", {"path": str(path), "task": "Dictionary"})
    assert {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()} == before
    assert [item.name for item in tmp_path.iterdir() if "partial" in item.name] == []


def test_all_dropped_is_one_sentence_with_the_reasons(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", [{"word": "空", "explanation": ""}])
    with pytest.raises(InputError, match=r"No example is left to train on.*empty_field 1"):
        build(tmp_path / "out", {"path": str(path), "task": "Dictionary"})
    assert not (tmp_path / "out").exists()


def test_every_source_is_checked_before_work_begins(tmp_path: Path) -> None:
    good = {"path": str(write(tmp_path / "i.jsonl", idioms(5))), "task": "Dictionary"}
    for bad, message in [
        (
            {"path": str(tmp_path / "none.jsonl")},
            r"data\.sources\[1\]: the file .*none\.jsonl does not exist",
        ),
        (good | {"task": "Dictionry"}, r"data\.sources\[1\]: Unknown task 'Dictionry': did you mean"),
        (good | {"importer": "record"}, r"data\.sources\[1\]: Unknown importer 'record': did you mean"),
    ]:
        with pytest.raises(InputError, match=message):
            build(tmp_path / "out", good, bad)
        assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_dataset_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.doc").write_text("x")
    path = write(tmp_path / "i.jsonl", idioms(5))
    with pytest.raises(OutputError, match="is not a dataset"):
        build(tmp_path / "out", {"path": str(path), "task": "Dictionary"})
    assert (tmp_path / "out" / "thesis.doc").exists()


def test_reading_what_is_not_there_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run `firefly data` first"):
        read_dataset(tmp_path / "nothing")
    with pytest.raises(InputError, match="Unknown split 'valid': did you mean 'validation'"):
        read_dataset(tmp_path, "valid")


def test_the_embedded_poems_give_couplets_of_equal_length() -> None:
    path = dataset.locate("demo:lushi.jsonl.gz")
    found = [
        item
        for line, record in read_records(path)
        for item in IMPORTERS["couplets"](record, Origin(path, line, "Couplet"))
    ]
    couplets = [item.fields for item in found if isinstance(item, Record)]
    assert len(couplets) == 10_000
    assert all(len(pair["first"]) == len(pair["second"]) in (5, 7) for pair in couplets)
    assert {getattr(item, "reason", "no_middle_couplets") for item in found} == {"no_middle_couplets"}


def test_length_summary_and_chart(tmp_path: Path) -> None:
    assert length_summary([]) == {"count": 0}
    summary = length_summary(range(1, 102))
    assert (summary["count"], summary["min"], summary["p50"], summary["max"]) == (101, 1, 51, 101)
    for name, lengths in (("a.png", [3]), ("b.png", []), ("c.png", list(range(2000)))):
        length_chart(tmp_path / name, lengths)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
