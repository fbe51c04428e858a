"""Shape checks: 唐诗 pass, and each way of breaking them is caught by its own check."""

from __future__ import annotations

import subprocess
import sys

import pytest

from firefly.evaluate.forms import FORMS, line_lengths, poem, verse_lines

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


def test_lines_may_repeat_where_the_reference_repeats() -> None:
    lyric = "试问卷帘人，却道海棠依旧。知否，知否，应是绿肥红瘦。"
    assert poem(lyric, lyric)["well_formed"] == 1
    assert poem(lyric, "知否知否知，知否知否知否。知否，知否，知否知否知否。")["no_repeated_line"] == 0


def test_repeated_characters_are_a_share() -> None:
    assert poem("山山水水", "山山水水")["repeated_characters"] == 0.5
    assert poem("山山水水", "")["repeated_characters"] == 0


def test_forms_and_metrics_import_no_torch() -> None:
    code = (
        "import sys; from firefly.evaluate import forms, metrics, verse; "
        "metrics.score('chrf', [metrics.Answered('q', '好', '好')]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
