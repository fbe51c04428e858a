"""Form checks: real couplets and 唐诗 pass, and each way of breaking them is caught by its own check."""

from __future__ import annotations

import subprocess
import sys

import pytest

from firefly.data.tasks import load_tasks
from firefly.evaluate.forms import FORMS, couplet, given_line, line_lengths, poem, verse_lines

COUPLETS = [
    ("白日依山尽，", "黄河入海流。"),
    ("无边落木萧萧下", "不尽长江滚滚来"),
    ("风声雨声读书声，声声入耳", "家事国事天下事，事事关心"),
]
SPRING_DAWN = "春眠不觉晓，处处闻啼鸟。\n夜来风雨声，花落知多少。"
FOREST = "独怜幽草涧边生，上有黄鹂深树鸣。\n春潮带雨晚来急，野渡无人舟自横。"
SPRING_VIEW = (
    "国破山河在，城春草木深。感时花溅泪，恨别鸟惊心。烽火连三月，家书抵万金。白头搔更短，浑欲不胜簪。"
)
HEIGHT = (
    "风急天高猿啸哀，渚清沙白鸟飞回。无边落木萧萧下，不尽长江滚滚来。\n"
    "万里悲秋常作客，百年多病独登台。艰难苦恨繁霜鬓，潦倒新停浊酒杯。"
)
POEMS = {"五言绝句": SPRING_DAWN, "七言绝句": FOREST, "五言律诗": SPRING_VIEW, "七言律诗": HEIGHT}


@pytest.mark.parametrize(("first", "second"), COUPLETS)
def test_true_couplets_are_well_formed(first: str, second: str) -> None:
    assert set(couplet(first, second).values()) == {1.0}


@pytest.mark.parametrize(
    ("answer", "failed"),
    [
        ("不尽长江滚滚", {"same_length", "mirrored"}),
        ("不尽长江滚滚来了", {"same_length", "mirrored"}),
        ("不尽长江滚急来", {"mirrored"}),  # nothing repeats where the given line repeats
        ("不不长江滚滚来", {"mirrored"}),  # it repeats where the given line does not
        ("无尽长江滚滚来", {"no_shared_character"}),
        ("", {"same_length", "no_shared_character", "mirrored"}),
        ("no Chinese", {"same_length", "no_shared_character", "mirrored"}),
    ],
)
def test_broken_couplets_fail_the_very_check(answer: str, failed: set[str]) -> None:
    checks = couplet("无边落木萧萧下，", answer)
    assert {name for name, value in checks.items() if value == 0} == failed | {"well_formed"}


@pytest.mark.parametrize("form", POEMS)
def test_tang_poems_have_their_form(form: str) -> None:
    text = POEMS[form]
    assert FORMS[line_lengths(text)] == form
    checks = poem(text, text.replace("\n", ""))
    repeated = checks.pop("repeated_characters")
    assert set(checks.values()) == {1.0}
    assert 0 <= repeated < 0.1


@pytest.mark.parametrize("form", POEMS)
def test_broken_poems_fail_the_very_check(form: str) -> None:
    text = POEMS[form]
    lines = verse_lines(text)
    broken = {
        "，".join(lines[:-1]): {"num_lines", "line_lengths"},
        "，".join([*lines, lines[0][::-1]]): {"num_lines", "line_lengths"},
        "，".join([*lines[:-1], lines[-1][:-1]]): {"line_lengths", "equal_lengths"},
        "，".join([*lines[:-1], lines[0]]): {"no_repeated_line"},
        "，".join(line[:4] for line in lines): {"line_lengths"},
        "": {"num_lines", "line_lengths", "equal_lengths", "no_repeated_line"},
    }
    for answer, failed in broken.items():
        checks = poem(text, answer)
        del checks["repeated_characters"]
        assert {name for name, value in checks.items() if value == 0} == failed | {"well_formed"}, answer


def test_uneven_verse_is_asked_with_its_own_lengths() -> None:
    lyric = "昨夜雨疏风骤，浓睡不消残酒。试问卷帘人，却道海棠依旧。"
    assert poem(lyric, lyric)["well_formed"] == 1
    assert poem(lyric, "昨夜雨疏风骤，浓睡不消残酒。试问卷帘人儿，却道海棠依旧。")["well_formed"] == 0


def test_repeated_characters_are_a_share() -> None:
    assert poem("山山水水", "山山水水")["repeated_characters"] == 0.5
    assert poem("山山水水", "")["repeated_characters"] == 0


@pytest.mark.parametrize("line", ["明月松间照", "春风又绿江南岸，明月何时照我还"])
def test_the_given_line_is_found_in_every_template(line: str) -> None:
    task = load_tasks()["Couplet"]
    questions = {
        task.render({"first": line, "second": "清泉石上流", "form": ""}, source="t", variant=variant).input
        for variant in range(40)
    }
    given = [question for question in questions if line in question]
    assert len(given) >= 12
    assert {given_line(question, "清" * len(line)) for question in given} == {line}


def test_the_given_line_is_found_in_foreign_words_by_its_shape() -> None:
    assert given_line("给我对个对子：厚积薄发，一鸣惊人", "高瞻远瞩，再创辉煌") == "厚积薄发，一鸣惊人"
    assert given_line("对个对子", "高瞻远瞩，再创辉煌") is None


def test_forms_and_metrics_import_no_torch() -> None:
    code = (
        "import sys; from firefly.evaluate import forms, metrics; "
        "metrics.score('chrf', [metrics.Answered('q', '好', '好')]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
