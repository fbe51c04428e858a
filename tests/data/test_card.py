"""The dataset card: a header that the Hub understands, all that went in, nothing of the machine that made it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from firefly.data.card import card_tables, hub_licences, readme, write_cards
from firefly.data.stats import length_summary
from firefly.data.table import Table

CARD: dict[str, Any] = {
    "examples": {"train": 900, "validation": 100, "rejected": 3},
    "validation_fraction": 0.1,
    "deduplicate": "near",
    "characters": length_summary(range(1, 1001)),
    "kinds": {
        "NLI": {"train": 100, "validation": 20, "rejected": 1, "reasons": {"empty_target": 1}},
        "Couplet": {
            "train": 800,
            "validation": 80,
            "rejected": 2,
            "reasons": {"duplicate": 2},
            "characters": length_summary(range(1, 881)),
        },
    },
    "sources": [
        {
            "path": "/home/someone/private/pairs|<b>.jsonl",
            "importer": "auto",
            "files": [
                {"name": "pairs|<b>.jsonl", "importer": "records", "records": 882, "sha256": "ab" * 32}
            ],
            "task": "Couplet",
            "licence": "MIT; crawled, CC BY-NC-SA 4.0",
            "records": 882,
            "train": 800,
            "validation": 80,
            "rejected": 2,
        },
        {"path": "nli/*.jsonl", "task": "NLI", "licence": "academic research only"},
    ],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text('{"kind": "K", "input": "问", "target": "答"}\n', "utf-8")
    write_cards(tmp_path, CARD)
    return tmp_path


def header(folder: Path) -> dict[str, Any]:
    _, head, _ = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    loaded = yaml.safe_load(head)
    assert isinstance(loaded, dict)
    return loaded


def test_the_header_is_the_hubs(folder: Path) -> None:
    found = header(folder)
    assert found["license"] == ["cc-by-nc-sa-4.0", "mit", "other"]
    assert found["language"] == ["zh"] and found["size_categories"] == ["1K<n<10K"]
    assert found["task_categories"] == ["text-generation", "text-classification"]
    files = found["configs"][0]["data_files"]
    assert [entry["split"] for entry in files] == ["train", "validation"]
    assert all((folder / entry["path"]).is_file() for entry in files)
    features = found["dataset_info"][0]["features"]  # a loader needs them where pairs and conversations mix
    assert [entry["name"] for entry in features] == ["kind", "input", "target", "messages", "source"]
    from huggingface_hub import DatasetCard

    data = DatasetCard.load(folder / "README.md").data.to_dict()
    assert data["license"] == found["license"] and data["configs"] == found["configs"]


def test_everything_is_told_and_nothing_of_the_machine(folder: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")
    assert "/home" not in text and "someone" not in text
    for told in (
        "Couplet",
        "NLI",
        "empty_target",
        "abababababababab",
        "academic research only",
        "880",
        '"答"',
        "2 records were dropped as repetitions",
        "| records |",
    ):
        assert told in text
    assert "pairs\\|&lt;b>.jsonl" in text  # stays in its cell, and is no tag
    for picture in ("tasks.png", "lengths.png"):
        assert f"]({picture})" in text and (folder / picture).is_file()


def test_the_page_stands_alone(folder: Path) -> None:
    page = (folder / "report.html").read_text("utf-8")
    assert page.count("data:image/png;base64,") == 2 and "http" not in page and "/home" not in page
    assert "pairs|&lt;b&gt;.jsonl" in page and "<b>" not in page


def test_the_same_card_gives_the_same_bytes(folder: Path) -> None:
    names = ("README.md", "report.html", "tasks.png", "lengths.png")
    before = [(folder / name).read_bytes() for name in names]
    write_cards(folder, json.loads(json.dumps(CARD)))
    assert [(folder / name).read_bytes() for name in names] == before


@pytest.mark.parametrize("card", [{}, {"kinds": {"Mine": {"train": 1}}}, {"kinds": {}, "sources": [{}]}])
def test_absent_keys_are_left_out(card: dict[str, Any], tmp_path: Path) -> None:
    write_cards(tmp_path, card)
    assert (tmp_path / "README.md").is_file() and not (tmp_path / "lengths.png").exists()
    assert all(table.rows for table in card_tables(card))
    assert readme(tmp_path, card, []).startswith("---\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Apache-2.0 (repo; pairs derive from an AGPL-3.0 repo)", ["agpl-3.0", "apache-2.0"]),
        ("CC BY 2.0 FR (attribution kept per line)", ["cc-by-2.0"]),
        ("CC BY-SA 3.0; package MIT", ["cc-by-sa-3.0", "mit"]),
        ("CC BY-NC 4.0", ["cc-by-nc-4.0"]),
        ("CC BY-NC 7.7", ["other"]),
        ("none stated", ["other"]),
        ("permitted for research", ["other"]),
        ("", ["other"]),
    ],
)
def test_licences_in_the_hubs_words(text: str, expected: list[str]) -> None:
    assert hub_licences([text]) == expected


def test_no_source_no_licence() -> None:
    assert hub_licences([]) == ["unknown"]


def test_a_table_shows_a_missing_value_as_a_dash() -> None:
    table = Table("t", {"name": "", "share": ".1%"}, [["a", 0.5], ["b", None]])
    assert table.markdown().splitlines()[2:] == ["| a | 50.0% |", "| b | – |"]
