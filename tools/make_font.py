"""Make the charts' font: the few glyphs that our labels need, out of Noto Sans CJK.

    python tools/make_font.py --font NotoSansCJK-Regular.ttc

Run it again when a chart gets a new label, or a task a new title; a test says when. The result goes to
src/firefly/fonts/ under a name of its own, as the SIL Open Font License asks of modified fonts. Needs fonttools
(`pip install fonttools`), which matplotlib brings. The same font gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from firefly.data.tasks import load_tasks
from firefly.plots import FONT, FONT_NAME

SOURCE = Path(__file__).parents[1] / "src" / "firefly"
FACE = "Noto Sans CJK SC"
LIMIT_BYTES = 200_000
# The titles in the article's chart, so that a task's file may come later than its name.
ARTICLE = """
    实体识别 情感分析 文本纠错 散文生成 对联 成语释义 作文生成 中英翻译 自然语言推理 歌曲评论 阅读理解 歌词生成 金庸小说
    关键词识别 文言文翻译 思维链 开放问答 文案生成 文本匹配 故事生成 文本摘要 古诗生成 编程 代码 通用指令 多轮对话
"""


def labels() -> Iterator[str]:
    """Every Chinese text that a chart may show: the tasks' titles, and the literals in calls of `label`."""
    yield from (task.title_zh for task in load_tasks().values())
    for path in sorted(SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = getattr(called, "attr", getattr(called, "id", ""))
            if isinstance(node, ast.Call) and name == "label":
                yield from _literals(node)


def _literals(call: ast.Call) -> Iterator[str]:
    for node in ast.walk(call):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def characters() -> set[str]:
    """Every character that the font needs, ASCII included so that a label is of one face."""
    wanted = (
        set(string.printable) | set("–—…·×→±%≥≤") | set("".join(ARTICLE.split())) | set("".join(labels()))
    )
    return {character for character in wanted if character.isprintable()}


def make_font(source: Path, out: Path) -> int:
    """Write the subset; returns its size in bytes."""
    from fontTools import subset
    from fontTools.ttLib import TTCollection

    faces = {font["name"].getDebugName(1): font for font in TTCollection(str(source)).fonts}
    font = faces[FACE]
    font.recalcTimestamp = False
    options = subset.Options(
        layout_features=[], hinting=False, notdef_outline=True, name_IDs=[0, 1, 2, 3, 4, 5, 6, 13, 14]
    )
    options.name_languages = [0x409]
    subsetter = subset.Subsetter(options)
    subsetter.populate(text="".join(sorted(characters())))
    subsetter.subset(font)
    _rename(font)
    out.parent.mkdir(parents=True, exist_ok=True)
    font.save(str(out))
    return out.stat().st_size


def _rename(font: Any) -> None:
    """A modified font must not bear the original's name."""
    plain = FONT_NAME.replace(" ", "")
    new = {1: FONT_NAME, 3: plain, 4: FONT_NAME, 6: plain}
    for record in font["name"].names:
        if record.nameID in new:
            record.string = new[record.nameID]
    table = font["CFF "].cff
    table.fontNames = [plain]
    table.topDictIndex[0].FullName = table.topDictIndex[0].FamilyName = FONT_NAME


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--font", type=Path, required=True, help="NotoSansCJK-Regular.ttc")
    size_bytes = make_font(parser.parse_args().font, FONT)
    assert size_bytes < LIMIT_BYTES, size_bytes
    print(f"{FONT.relative_to(SOURCE)}: {len(characters())} characters, {size_bytes:,} bytes")


if __name__ == "__main__":
    main()
