"""The dataset directory: nothing is lost uncounted, no group is split, the same sources give the same bytes."""

from __future__ import annotations

import dataclasses
import gzip
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
from firefly.files import read_json_lines
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


def rejects_of(folder: Path) -> list[dict[str, Any]]:
    return [record for _, record in read_json_lines(folder / "rejects.jsonl.zst")]


@pytest.mark.pictures
def test_every_record_is_trained_on_held_out_or_rejected_with_its_reason(tmp_path: Path) -> None:
    records = [
        *idioms(50),
        idioms(1)[0],
        {"word": "空", "explanation": ""},
        {"word": "坏\ufffd", "explanation": "x"},
    ]
    path = write(tmp_path / "i.jsonl", records)
    result = build(tmp_path / "out", {"path": str(path), "task": "Dictionary"}, validation_fraction=0.2)
    rejects = rejects_of(tmp_path / "out")
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
    assert rejects[0]["duplicate_of"] == "i.jsonl:1"
    assert card["kinds"]["Dictionary"]["characters"]["count"] == 50
    assert (tmp_path / "out" / "tasks.png").stat().st_size > 1000


def test_the_card_tells_what_each_source_was_read_as_and_under_which_licence(tmp_path: Path) -> None:
    """A licence is the recipe's word, or the task file's about this very file: never about someone's own file."""
    own = str(write(tmp_path / "mine.jsonl", idioms(9)))
    known = str(write(tmp_path / "idioms.jsonl", idioms(9, start=9)))
    given = str(write(tmp_path / "given.jsonl", idioms(9, start=18)))
    build(
        tmp_path / "out",
        {"path": own, "task": "Dictionary"},
        {"path": known, "task": "Dictionary"},
        {"path": given, "task": "Dictionary", "licence": "CC BY 4.0"},
        validation_fraction=0,
    )
    card = json.loads((tmp_path / "out" / "card.json").read_text("utf-8"))
    licences = [source["licence"] for source in card["sources"]]
    assert licences == [None, "Firefly's own idiom glosses: Apache-2.0", "CC BY 4.0"]
    readme = (tmp_path / "out" / "README.md").read_text("utf-8")
    for source in card["sources"]:
        assert source["files"][0]["importer"] == "records"
        assert source["files"][0]["sha256"][:16] in readme
    assert "| records |" in readme and "auto" not in readme


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
    assert {"card.json", "rejects.jsonl.zst", "train.jsonl", "validation.jsonl"} < set(names)
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_cap_takes_records_by_their_hash_and_repeat_asks_in_other_words(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(30)))
    result = build(
        tmp_path / "out", {"path": path, "task": "Dictionary", "cap": 4, "repeat": 3}, validation_fraction=0
    )
    examples = list(read_dataset(tmp_path / "out"))
    assert result.train == len(examples) == 12
    assert len({example.source for example in examples}) == 4
    assert len({(example.input, example.target) for example in examples}) == 12
    assert (result.unused, result.rejected) == (26, 0)
    turned = str(write(tmp_path / "turned.jsonl", idioms(30)[::-1]))
    build(tmp_path / "again", {"path": turned, "task": "Dictionary", "cap": 4}, validation_fraction=0)
    answers = [{example.target for example in read_dataset(tmp_path / name)} for name in ("out", "again")]
    assert len({target for target in answers[1] if target in answers[0]}) >= 3  # the same four records


def test_the_tasks_own_cap_holds_over_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(30)))
    other = str(write(tmp_path / "j.jsonl", idioms(30, start=30)))
    known = dataset.load_tasks()
    smaller = dataclasses.replace(known["Dictionary"], cap=40)
    monkeypatch.setattr(dataset, "load_tasks", lambda: {**known, "Dictionary": smaller})
    result = build(tmp_path / "out", *({"path": name, "task": "Dictionary"} for name in (path, other)))
    assert result.train + result.validation == 40


def test_deduplication_can_be_switched_off(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(10) + idioms(10)))
    assert build(tmp_path / "on", {"path": path, "task": "Dictionary"}).rejected == 10
    assert build(tmp_path / "off", {"path": path, "task": "Dictionary"}, deduplicate="off").rejected == 0


def test_a_lone_surrogate_is_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", [*idioms(3), {"word": "坏", "explanation": "\ud83d"}])
    with pytest.raises(InputError, match=r"i\.jsonl, line 4: .*half of a surrogate pair"):
        build(tmp_path / "out", {"path": str(path), "task": "Dictionary"}, validation_fraction=0)


def test_an_earlier_dataset_survives_bad_input(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", idioms(5))
    build(tmp_path / "out", {"path": str(path), "task": "Dictionary"})
    before = {item.name: item.read_bytes() for item in (tmp_path / "out").iterdir()}
    path.write_bytes(path.read_bytes() + b'{"word": "x"}\n')
    with pytest.raises(
        InputError, match=r"i\.jsonl, line 6: task Dictionary needs .*the fields there are: word"
    ):
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
            r"data\.sources\[1\]: The file .*none\.jsonl does not exist",
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


def test_any_number_of_processes_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "_RECORDS_AT_ONCE", 7)  # many blocks
    records = [*idioms(60), *idioms(9), {"word": "空", "explanation": ""}]
    path = str(write(tmp_path / "i.jsonl", records))
    mix = {"weights": {"Dictionary": 2.4}}
    for workers in (1, 2, 3):
        build(
            tmp_path / str(workers), {"path": path, "task": "Dictionary"}, num_workers=workers, mix=mix,
            validation_fraction=0.2, deduplicate="near", near_threshold=0.95,
        )  # fmt: skip
    for name in ("train.jsonl", "validation.jsonl", "rejects.jsonl.zst", "card.json"):
        found = {(tmp_path / str(workers) / name).read_bytes() for workers in (1, 2, 3)}
        assert len(found) == 1 and len(found.pop()) > 100, name


def test_a_bad_record_stops_or_is_rejected_as_the_recipe_says(tmp_path: Path) -> None:
    path = write(tmp_path / "i.jsonl", idioms(3))
    path.write_bytes(
        path.read_bytes() + b'{"word": \n{"other": 1}\n' + json.dumps(idioms(9)[8]).encode() + b"\n"
    )
    source = {"path": str(path), "task": "Dictionary"}
    with pytest.raises(InputError, match=r"i\.jsonl, line 4: not valid JSON"):
        build(tmp_path / "out", source)
    result = build(tmp_path / "out", source, on_bad_record="skip", validation_fraction=0)
    assert (result.train, result.rejected, result.reasons) == (4, 2, {"bad_record": 2})
    assert [row["source"] for row in rejects_of(tmp_path / "out")] == ["i.jsonl:4", "i.jsonl:5"]


def test_a_file_that_breaks_off_stops_or_loses_its_rest_as_the_recipe_says(tmp_path: Path) -> None:
    """In a folder of parts: an empty one, one without a sound line, and one whose compression breaks off."""
    parts = tmp_path / "parts"
    parts.mkdir()
    write(parts / "a.jsonl", idioms(3))
    packed = gzip.compress((parts / "a.jsonl").read_bytes())
    (parts / "b.jsonl").write_bytes(b"")
    (parts / "c.jsonl").write_bytes("\ufeff词".encode("utf-16"))
    (parts / "d.jsonl.gz").write_bytes(packed[:20])
    write(parts / "e.jsonl", idioms(3, start=3))
    source = {"path": str(parts), "task": "Dictionary"}
    with pytest.raises(InputError, match=r"data\.sources\[0\]: The file .*b\.jsonl is empty"):
        build(tmp_path / "out", source)
    (parts / "b.jsonl").write_bytes(b"\n")
    with pytest.raises(InputError, match=r"data\.sources\[0\]: .*b\.jsonl has no records"):
        build(tmp_path / "out", source)
    (parts / "b.jsonl").write_bytes(b"")
    result = build(tmp_path / "out", source, on_bad_record="skip", validation_fraction=0)
    assert (result.train, result.reasons) == (6, {"bad_record": 3})
    rejects = {row["source"]: row["text"] for row in rejects_of(tmp_path / "out")}
    assert list(rejects) == ["b.jsonl:1", "c.jsonl:1", "d.jsonl.gz:1"]
    for place, why in zip(rejects, ("is empty", "not valid UTF-8", "breaks off"), strict=True):
        assert why in rejects[place]


def test_what_in_the_mix_has_no_effect_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(9)))
    console.quiet(False)
    mix = {"weights": {"Dictionarry": 2.0}, "caps": {"Dictionary": 100}}
    build(tmp_path / "out", {"path": path, "task": "Dictionary"}, mix=mix)
    told = " ".join("".join(capsys.readouterr()).split())
    assert (
        "data.mix.weights names 'Dictionarry', of which there is no record; did you mean 'Dictionary'" in told
    )
    assert "data.mix.caps" not in told


def test_a_column_that_is_no_task_is_not_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("firefly.data.candidates._MOST_NAMES", 20)
    rows = [{"kind": f"id-{number}", "input": f"问{number}", "target": "答"} for number in range(50)]
    with pytest.raises(InputError, match="More than 20 different kinds, 'id-20' being one"):
        build(tmp_path / "out", {"path": str(write(tmp_path / "i.jsonl", rows))})
    assert not (tmp_path / "out").exists()


def test_weights_repeat_small_tasks_in_new_words_and_thin_large_ones(tmp_path: Path) -> None:
    path = str(write(tmp_path / "i.jsonl", idioms(200)))
    source = {"path": path, "task": "Dictionary"}
    for name, weight in (("more", 2.5), ("less", 0.25), ("none", 0)):
        if weight == 0:
            with pytest.raises(InputError, match="left out by the mix"):
                build(tmp_path / name, source, mix={"weights": {"Dictionary": weight}})
            continue
        result = build(
            tmp_path / name, source, mix={"weights": {"Dictionary": weight}}, validation_fraction=0
        )
        examples = list(read_dataset(tmp_path / name))
        assert result.train == len(examples) == pytest.approx(200 * weight, rel=0.25)
        assert len({(example.input, example.target) for example in examples}) == len(examples)
        assert result.unused == 200 - len({example.source for example in examples})


def test_records_with_other_field_names_and_folders_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(3):
        rows = [{"成语": row["word"], "释义": row["explanation"]} for row in idioms(5, start=5 * part)]
        write(folder / f"p{part}.jsonl", rows)
    fields = {"word": "成语", "explanation": "释义"}
    for path in (folder, folder / "p*.jsonl"):
        result = build(
            tmp_path / "out",
            {"path": str(path), "task": "Dictionary", "fields": fields},
            validation_fraction=0,
        )
        assert result.train == 15


def test_a_renamed_field_that_no_record_has_is_an_error(tmp_path: Path) -> None:
    """Even where the other fields would do: half of the directions would be lost in silence."""
    path = write(tmp_path / "i.jsonl", [{"word": "词", "释义": "意思", "explanation": "旧"}] * 3)
    for fields, message in (
        (
            {"explanation": "释意"},
            r"sources\[0\]\.fields\.explanation = '释意': no record .*; did you mean '释义'",
        ),
        (
            {"explanatoin": "释义"},
            r"sources\[0\]: fields\.explanatoin: .* no such field; did you mean 'explanation'",
        ),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path / "out", {"path": str(path), "task": "Dictionary", "fields": fields})
    assert not (tmp_path / "out").exists()


@pytest.mark.pictures
def test_length_summary_and_chart(tmp_path: Path) -> None:
    assert length_summary([]) == {"count": 0}
    summary = length_summary(range(1, 102))
    assert (summary["count"], summary["min"], summary["p50"], summary["max"]) == (101, 1, 51, 101)
    for name, lengths in (("a.png", [3]), ("b.png", []), ("c.png", list(range(2000)))):
        length_chart(tmp_path / name, lengths)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_source_may_name_its_directions(tmp_path: Path) -> None:
    path = write(tmp_path / "idioms.jsonl", idioms(60))
    source = {"path": str(path), "task": "Dictionary", "repeat": 3}
    build(tmp_path / "all", source)
    build(tmp_path / "named", source | {"directions": ["explanation_to_word"]})
    answers = {
        name: {record["target"][0] for _, record in read_json_lines(tmp_path / name / "train.jsonl")}
        for name in ("all", "named")
    }
    assert answers == {"all": {"词", "第"}, "named": {"词"}}


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ({"task": "Dictionary", "directions": ["explanation_to_wrd"]}, "'explanation_to_word'"),
        ({"directions": ["explanation_to_word"]}, "name it, too"),
        ({"task": "Dictionary", "directions": ["riddle_to_answer"]}, "riddle"),
    ],
)
def test_directions_that_cannot_be_are_a_sentence(
    source: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "idioms.jsonl", idioms(3))
    with pytest.raises(InputError, match=sentence):
        build(tmp_path / "out", {"path": str(path)} | source)
