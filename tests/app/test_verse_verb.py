"""`firefly verse`: what a text is taken for, what is shown, and what is said to bad input."""

from __future__ import annotations

import json

import pytest

from firefly import api
from firefly.cli import main
from firefly.errors import InputError
from firefly.evaluate.verse import Couplet, Poem

TOWER = "白日依山尽，黄河入海流。欲穷千里目，更上一层楼。"
LYRIC = "常记溪亭日暮，沉醉不知归路。兴尽晚回舟，误入藕花深处。争渡，争渡，惊起一滩鸥鹭。"


def printed(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> str:
    """What the verb writes to stdout, or to stderr when it fails."""
    with pytest.raises(SystemExit) as stopped:
        main(["verse", *arguments])
    said = capsys.readouterr()
    assert (stopped.value.code or 0) == status, said.err
    return said.err if status else said.out


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (TOWER, "poem"),
        ("无边落木萧萧下，不尽长江滚滚来", "couplet"),
        ("无边落木萧萧下\n不尽长江滚滚来", "couplet"),
        ("风声雨声读书声，声声入耳；家事国事天下事，事事关心。", "couplet"),
        ("青青河畔草，郁郁园中柳。盈盈楼上女，皎皎当窗牖。娥娥红粉妆，纤纤出素手。", "poem"),
        ("大江东去，浪淘尽，千古风流人物。", "poem"),
    ],
)
def test_a_text_is_taken_for_what_it_is(text: str, kind: str) -> None:
    assert api.verse(text).kind == kind


def test_two_lines_can_be_said_to_be_a_poem() -> None:
    assert isinstance(api.verse("白日依山尽，黄河入海流", kind="poem").verse, Poem)
    assert isinstance(api.verse(TOWER, kind="couplet").verse, Couplet)


def test_a_poem_shows_its_faults(capsys: pytest.CaptureFixture[str]) -> None:
    good = printed(capsys, TOWER)
    assert "五言绝句" in good and "下平十一尤" in good and "✗" not in good
    assert "－－｜｜－" in good  # 黄河入海流
    bad = printed(capsys, TOWER.replace("黄河入海流", "落河入海来"))
    assert "孤平 (1)" in bad and bad.count("失韵 (5)") == 2 and bad.count("✗") == 2


def test_a_couplet_and_a_lyric_show_their_checks(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "无边落木萧萧下，不尽长江滚滚来").count("✓") == 5
    assert "✗ 仄起平收" in printed(capsys, "不尽长江滚滚来，无边落木萧萧下")
    assert printed(capsys, LYRIC, "--tune", "如梦令").count("✓") == 3
    assert "✗ 句式 6 6 5 6 2 2 6" in printed(capsys, LYRIC[:-3], "--tune", "如梦令")


def test_the_acrostic_and_the_books(capsys: pytest.CaptureFixture[str]) -> None:
    assert "✓ 藏头 白黄欲更" in printed(capsys, TOWER, "--acrostic", "白黄欲更")
    assert "✗ 藏头" in printed(capsys, TOWER, "--acrostic", "福禄寿喜")
    modern = printed(capsys, TOWER, "--book", "xinyun")
    assert "中华新韵" in modern and "七尤平" in modern
    assert "词性相对" in printed(capsys, TOWER, "--parallel")


def test_json_has_the_same_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads(printed(capsys, TOWER, "--json"))
    assert (result["kind"], result["verse"]["form"], result["acrostic"]) == ("poem", "五言绝句", "白黄欲更")
    assert result["verse"]["regulated"] is True and result["verse"]["faults"] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hello"], "holds no Chinese verse"),
        ([""], "holds no Chinese verse"),
        (["白日依山尽"], "two lines or more"),
        (["白日依山尽，黄河，入海流", "--as", "couplet"], "a couplet has two"),
        ([LYRIC, "--tune", "如梦"], "did you mean '如梦令'"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = printed(capsys, *arguments, status=1)
    assert said.startswith("error: ") and message in said and "Traceback" not in said


def test_the_api_raises_it() -> None:
    with pytest.raises(InputError, match="no Chinese verse"):
        api.verse("…")
