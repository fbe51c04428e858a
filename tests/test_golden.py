"""Golden files: what the tasks render and how a tiny run learns. A change here is a change for every user.

To renew them on purpose: python tests/test_golden.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from firefly import api
from firefly.data.tasks import load_tasks
from firefly.recipe import Recipe
from tiny import recipe_table, save_model_dir, write_pairs

GOLDEN = Path(__file__).parent / "golden"
FIELDS = {
    "Couplet": {"first": "无边落木萧萧下", "second": "不尽长江滚滚来", "form": "七言"},
    "AncientPoem": {
        "title": "登鹳雀楼",
        "author": "王之涣",
        "dynasty": "唐",
        "form": "五言绝句",
        "first_line": "白日依山尽",
        "poem": "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
    },
    "ClassicalChinese": {
        "classical": "温故而知新，可以为师矣。",
        "modern": "温习旧的而懂得新的，就可以做老师了。",
    },
    "Dictionary": {"word": "画蛇添足", "explanation": "多此一举，反而弄糟。"},
    "SentimentAnalyze": {"review": "房间干净，还会再来。", "label": "1"},
    "StoryGeneration": {"book": "三侠五义", "opening": "且说包公端坐。", "continuation": "忽听堂下喊冤。"},
}


def rendered() -> list[str]:
    """Every template of every task, once, in the order in which the variants choose them."""
    tasks = load_tasks()
    assert set(tasks) == set(FIELDS)
    lines = []
    for kind, fields in FIELDS.items():
        seen: dict[str, None] = {}
        for variant in range(60):
            seen.setdefault(tasks[kind].render(fields, source="golden", variant=variant).to_json())
        lines += seen
    return lines


def hundred_losses(model: Path, folder: Path) -> list[float]:
    source = folder / "pairs.jsonl"
    write_pairs(source)
    table = recipe_table(folder / "out", model, source, max_steps=100, save_steps=100, learning_rate=2e-3)
    table["data"]["overlong"] = "right-of-target"
    api.train(Recipe.from_table(table))
    lines = (folder / "out" / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_tasks_render_as_before() -> None:
    assert rendered() == (GOLDEN / "rendered.jsonl").read_text("utf-8").splitlines()


def test_a_hundred_losses_as_before(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    """Equal up to what another processor's arithmetic may add up to over a hundred steps."""
    expected = json.loads((GOLDEN / "losses.json").read_text("utf-8"))
    assert hundred_losses(tiny("bloom"), tmp_path) == pytest.approx(expected, abs=5e-3)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        base = save_model_dir(Path(place) / "bloom", "bloom")
        losses = hundred_losses(base, Path(place))
    (GOLDEN / "losses.json").write_text(json.dumps(losses, indent=0) + "\n", encoding="utf-8")
    (GOLDEN / "rendered.jsonl").write_text("".join(line + "\n" for line in rendered()), encoding="utf-8")
