"""docs/training.md names every choice of method and objective, and no option that is not there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

from firefly.recipe import DataSection, TrainSection

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text("utf-8")
FIELDS = TrainSection.model_fields | DataSection.model_fields


@pytest.mark.parametrize("key", ["method", "objective"])
def test_every_choice_has_its_row(key: str) -> None:
    assert [name for name in get_args(FIELDS[key].annotation) if f"\n| `{name}` |" not in PAGE] == []


def test_every_option_named_is_one() -> None:
    named = re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)(?: = [^`]*)?`", PAGE)
    assert len(named) > 12 and set(named) <= set(FIELDS)
    values = dict(re.findall(r'`([a-z_]+) = "(\w+)"`', PAGE))
    assert values and all(value in get_args(FIELDS[name].annotation) for name, value in values.items())
