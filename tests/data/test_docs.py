"""docs/data.md names everything that a recipe can choose and every reason that a record can be dropped for."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from firefly.data import conversations, dedup, importers, overlap
from firefly.data.clean import RULES
from firefly.recipe import DataSection

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text("utf-8")


@pytest.mark.parametrize("key", ["overlong", "chat_format"])
def test_every_choice_has_its_row(key: str) -> None:
    rows = [
        name for name in get_args(DataSection.model_fields[key].annotation) if f"\n| `{name}` |" not in PAGE
    ]
    assert rows == []


def test_every_reason_is_explained() -> None:
    codes = [rule.__name__.removesuffix("_remains") for rule in RULES]
    codes += ["duplicate", "near_duplicate", "contaminated", "bad_record", "empty_field"]
    codes += ["turns_dropped", "input_middle_cut", "input_start_cut", "target_end_cut", "target_lost"]
    assert [code for code in codes if f"`{code}`" not in PAGE] == []


def test_every_general_importer_has_its_row() -> None:
    names = [
        name
        for name, function in importers.IMPORTERS.items()
        if function.__module__ in (importers.__name__, conversations.__name__)
    ]
    assert len(names) >= 9
    assert [name for name in names if f"\n| `{name}` |" not in PAGE] == []


def test_the_numbers_are_the_codes() -> None:
    fields = DataSection.model_fields
    assert f"character {dedup.SHINGLE}-grams" in PAGE and f"{dedup.PERMUTATIONS} permutations" in PAGE
    assert (
        f"{dedup._RECALL:.0%} recall".replace("%", " %") in PAGE
        and f"{dedup._LONGEST_COUNTED:,} characters" in PAGE
    )
    assert f"`decontaminate_ngram` ({fields['decontaminate_ngram'].default})" in PAGE
    assert f"from {overlap._SHORTEST} characters" in PAGE and f"more than {overlap._WORDING} records" in PAGE
