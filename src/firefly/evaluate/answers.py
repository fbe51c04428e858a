"""What an answer says: entities, keywords, corrections, and the characters that n-grams are made of.

    entities("人名：阿岚；地名：杭州、西湖")     {("人名", "阿岚"), ("地名", "杭州"), ("地名", "西湖")}
    entities('{"人名": ["阿岚"]}')              the same pairs from JSON, or from lines 阿岚（人名）
    edits("吃台湾采", "吃台湾菜")                {(3, "采", "菜")}

Parsing is lenient about marks and strict about content: what is not understood is an entity that no reference has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from firefly.data.tasks import load_tasks
from firefly.evaluate.forms import CHINESE, line_lengths

Edit = tuple[int, str, str]
"""A place in the source, what stands there, and what it becomes; "" for nothing."""

NONE = ("无", "没有", "無")
_LIST = re.compile("[、，,]")
_ITEMS = re.compile("[；;\n]")
_LABELLED = re.compile(r"([^：:、，,（(《“]{1,12})[：:]\s*(.*)")
_TYPED = re.compile(r"(.+)[（(]([^（）()]+)[）)]")
_WORD = re.compile(r"[0-9a-z]+|[^\W_]")
_RUN = re.compile(f"[{CHINESE}，、；]+")


def entities(text: str) -> set[tuple[str, str]]:
    """Pairs of type and name; the type is "" in a bare list of names."""
    table = _json(text)
    if table is not None:
        return table
    found = set()
    for item in filter(None, map(_clean, _ITEMS.split(text))):
        if match := _LABELLED.fullmatch(item):
            found |= {(match[1].strip(), name) for name in names(match[2])}
        elif match := _TYPED.fullmatch(item):
            found |= {(match[2].strip(), match[1].strip())}
        else:
            found |= {("", name) for name in names(item)}
    return found


def names(text: str) -> set[str]:
    """The members of a list such as 杭州、西湖; none in 无."""
    return {name for part in _LIST.split(text) if (name := _clean(part)) and name not in NONE}


def keywords(text: str) -> set[str]:
    """Keywords in lower case: a list in one line or one a line, with or without a label or numbers."""
    text = re.sub(r"^\s*关键词\s*[：:]", "", text)
    lines = (re.sub(r"^\s*(\d+[.、)）]|[-*•])\s*", "", line) for line in _ITEMS.split(text))
    return {name.lower() for line in lines for name in names(line)}


def words(text: str) -> list[str]:
    """Chinese characters, and runs of Latin letters and digits in lower case; marks and spaces left out."""
    return _WORD.findall(text.lower())


def edits(source: str, text: str) -> set[Edit]:
    """The fewest single-character edits that make `text` of `source`, replacements rather than shifts (Levenshtein).

    What is inserted at one place is one edit.
    """
    start = 0
    while source[start : start + 1] == text[start : start + 1] != "":
        start += 1
    source, text = source[start:], text[start:]
    costs = [list(range(len(text) + 1))]
    for number, char in enumerate(source, 1):
        above, row = costs[-1], [number]
        for place, other in enumerate(text, 1):
            row.append(min(above[place - 1] + (char != other), above[place] + 1, row[-1] + 1))
        costs.append(row)
    found = set()
    inserted: dict[int, str] = {}
    here, there = len(source), len(text)
    while here or there:
        replaced = here and there and costs[here - 1][there - 1] + (source[here - 1] != text[there - 1])
        if here and there and costs[here][there] == replaced:
            here, there = here - 1, there - 1
            if source[here] != text[there]:
                found.add((start + here, source[here], text[there]))
        elif there and costs[here][there] == costs[here][there - 1] + 1:
            there -= 1
            inserted[here] = text[there] + inserted.get(here, "")
        else:
            here -= 1
            found.add((start + here, source[here], ""))
    return found | {(start + place, "", new) for place, new in inserted.items()}


def corrections(question: str, reference: str, answer: str) -> tuple[set[Edit], set[Edit]]:
    """The edits that a reference and an answer make: to the sentence in the question, or as they name them.

    A reference that is near to no text in the question is a list, such as 采→菜；在→再, or a verdict.
    """

    def changed(text: str) -> int:
        """Characters to change until the text is the reference."""
        return sum(len(old or new) for _, old, new in edits(text, reference))

    source = min(_texts_in(question, "correction_f1"), key=changed, default="")
    if source and changed(source) <= len(reference) / 2:
        return edits(source, reference), edits(source, answer.strip())
    return _listed(reference), _listed(answer)


def _listed(text: str) -> set[Edit]:
    """The members of a list, as edits without a place."""
    return {(0, "", name) for part in _ITEMS.split(text) for name in names(part)}


def given_line(question: str, shape: Sequence[int]) -> tuple[str, bool] | None:
    """The couplet line inside a question, and whether it is the second (下联): the answer then comes before it.

    The task's templates say where it is. A question in foreign words is searched for the last run of characters whose
    phrases have the lengths of `shape`, which counts as a first line; None when there is none.
    """
    for pattern in _templates("couplet"):
        if match := pattern.fullmatch(question):
            return match[1], match.lastgroup == "second"
    runs = [run for run in _RUN.findall(question) if [*line_lengths(run)] == [*shape]]
    return (runs[-1], False) if runs else None


def _texts_in(question: str, metric: str) -> list[str]:
    """Texts that a question may be about: where templates have a field, each line, each quotation."""
    matches = (pattern.fullmatch(question) for pattern in _templates(metric))
    found = [text for match in matches if match for text in match.groups()]
    for piece in re.split("[\n“”]", question):
        found += [piece, *(piece[colon.end() :] for colon in re.finditer("[：:]", piece))]
    return found


@cache
def _templates(metric: str) -> list[re.Pattern[str]]:
    """Every template of a metric's tasks, with a group of its name where a field goes; again, it is the same text."""
    tasks = [task for task in load_tasks().values() if task.metric == metric]
    templates = [text for task in tasks for way in task.directions for text in way.templates]
    return [re.compile(_with_groups(re.escape(text)), re.DOTALL) for text in templates]


def _with_groups(escaped: str) -> str:
    met: set[str] = set()

    def group(field: re.Match[str]) -> str:
        name = field[1]
        pattern = f"(?P={name})" if name in met else f"(?P<{name}>.+)"
        met.add(name)
        return pattern

    return re.sub(r"\\{(\w+)\\}", group, escaped)


def _clean(text: str) -> str:
    return text.strip().strip("。.\"'“”《》[]【】 ")


def _json(text: str) -> set[tuple[str, str]] | None:
    """Pairs from JSON: {type: [names]}, or a list of objects with a type and a name; None when it is none."""
    match = re.search(r"[{\[].*[}\]]", text, re.DOTALL)
    try:
        value: Any = json.loads(match[0]) if match else None
    except ValueError:
        return None
    if isinstance(value, dict):
        return {(kind, name) for kind, group in value.items() for name in _strings(group)}
    if isinstance(value, list):
        return {
            (str(item.get("type", item.get("类型", ""))), str(item[key]))
            for item in value
            if isinstance(item, dict)
            for key in ("entity", "name", "text", "实体")
            if key in item
        }
    return None


def _strings(value: Any) -> list[str]:
    return [str(item) for item in value] if isinstance(value, list) else [str(value)] if value else []
