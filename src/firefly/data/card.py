"""What people see of a dataset directory, all of it made from its card.json by `write_cards`.

    README.md      the dataset card that the Hugging Face Hub shows: licences, tasks, sources, drops, how it was made
    report.html    the same and more as one page: pictures inside, sortable tables, no network
    tasks.png      examples a task
    lengths.png    lengths of the examples, in characters

Paths are relative and nothing depends on the day: the same card gives the same bytes. A key that the card lacks is
left out of the tables.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firefly.data.stats import draw_lengths, task_chart
from firefly.data.table import Table
from firefly.data.tasks import load_tasks
from firefly.files import read_json_lines, write_atomic

Card = Mapping[str, Any]
SIDES = ("train", "validation", "rejected")
# The Hub's names of task categories; every dataset of ours is text-generation too.
_CATEGORIES = {
    "MRC": "question-answering",
    "NER": "token-classification",
    "NLI": "text-classification",
    "OpenQA": "question-answering",
    "SentimentAnalyze": "text-classification",
    "Summary": "summarization",
    "TextMatching": "sentence-similarity",
    "Translation": "translation",
}
_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
)
_HASHES_SHOWN = 3
_TEXT = {"dtype": "string"}
# Said aloud, since a loader that guesses fails where pairs and conversations stand in one file.
_FEATURES: list[dict[str, Any]] = [
    *({"name": name} | _TEXT for name in ("kind", "input", "target")),
    {"name": "messages", "list": [{"name": name} | _TEXT for name in ("role", "content")]},
    {"name": "source"} | _TEXT,
]
_CREATIVE_COMMONS = re.compile(r"\bcc[ -]by((?:[ -](?:nc|sa|nd))*)[ -](\d\.\d)")
_LICENCES = {
    "apache-2.0": r"\bapache\b", "mit": r"\bmit\b", "cc0-1.0": r"\bcc0\b", "agpl-3.0": r"\bagpl", "gpl-3.0": r"\bgpl",
    "bsd-3-clause": r"\bbsd\b", "odc-by": r"\bodc-by\b", "pddl": r"\bpddl\b",
}  # fmt: skip
_HUB_VERSIONS = {
    "cc-by": "2.0 2.5 3.0 4.0", "cc-by-sa": "3.0 4.0", "cc-by-nc": "2.0 3.0 4.0", "cc-by-nd": "4.0",
    "cc-by-nc-sa": "2.0 3.0 4.0", "cc-by-nc-nd": "3.0 4.0",
}  # fmt: skip


def write_cards(folder: Path, card: Card) -> None:
    """Write README.md, report.html and the two charts into a dataset directory, each whole or not at all."""
    pictures = {"tasks.png": folder / "tasks.png"}
    task_chart(pictures["tasks.png"], _sizes(card), titles(card))
    if "histogram" in card.get("characters", {}):
        pictures["lengths.png"] = folder / "lengths.png"
        draw_lengths(pictures["lengths.png"], card["characters"], "character")
    write_atomic(folder / "README.md", readme(folder, card, list(pictures)))
    page = render_page("数据集 Dataset", summary(card), card_tables(card), pictures)
    write_atomic(folder / "report.html", page)


def render_page(
    title: str,
    lead: str,
    tables: Sequence[Table] = (),
    pictures: Mapping[str, Path] | None = None,
    samples: Sequence[Any] = (),
) -> str:
    """One self-contained HTML page of pictures, tables and `peek` samples; every value is escaped."""
    from jinja2 import Environment, StrictUndefined

    source = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    encoded = {
        name: base64.b64encode(path.read_bytes()).decode("ascii") for name, path in (pictures or {}).items()
    }
    return environment.from_string(source).render(
        title=title, lead=lead, tables=tables, pictures=encoded, samples=samples
    )


def titles(card: Card) -> dict[str, str]:
    """The Chinese name of each kind that has one."""
    known = {kind: task.title_zh for kind, task in load_tasks().items()}
    return known | {kind: row["title_zh"] for kind, row in _kinds(card).items() if row.get("title_zh")}


def summary(card: Card) -> str:
    """What the dataset holds, in one sentence."""
    totals = {side: sum(row.get(side, 0) for row in _kinds(card).values()) for side in SIDES}
    return (
        f"{totals['train']:,} training and {totals['validation']:,} validation examples of {len(_sizes(card))} tasks; "
        f"{totals['rejected']:,} rejected."
    )


def card_tables(card: Card) -> list[Table]:
    """The tables of a card: tasks, sources, and what was dropped; one without rows is left out."""
    return [table for table in (_task_table(card), _source_table(card), _drop_table(card)) if table.rows]


def _kinds(card: Card) -> dict[str, Card]:
    """The card's rows by kind, the largest first."""
    kinds: dict[str, Card] = card.get("kinds", {})
    return dict(
        sorted(
            kinds.items(), key=lambda item: (-item[1].get("train", 0) - item[1].get("validation", 0), item[0])
        )
    )


def _sizes(card: Card) -> dict[str, int]:
    """Examples of each kind; a kind of which everything was dropped is none."""
    sizes = {kind: row.get("train", 0) + row.get("validation", 0) for kind, row in _kinds(card).items()}
    return {kind: size for kind, size in sizes.items() if size}


def _task_table(card: Card) -> Table:
    columns = {"kind": "", "任务": "", **dict.fromkeys(SIDES, ",d"), "mean": ",.0f"}
    shares = ("p5", "p50", "p95", "p99", "max")
    table = Table(
        "任务 · Tasks",
        columns | dict.fromkeys(shares, ",.0f"),
        note="Examples on each side; then lengths of question and answer together, in characters.",
    )
    names = titles(card)
    for kind, row in _kinds(card).items():
        lengths = row.get("characters", {})
        table.rows.append(
            [
                kind,
                names.get(kind, ""),
                *(row.get(side) for side in SIDES),
                *(lengths.get(name) for name in ("mean", *shares)),
            ]
        )
    return table


def _source_table(card: Card) -> Table:
    counts = ("records", *SIDES)
    table = Table(
        "来源 · Sources",
        {"file": "", "task": "", "importer": "", "licence": "", **dict.fromkeys(counts, ",d"), "sha256": ""},
        note=f"sha256: how the hashes of a source's first {_HASHES_SHOWN} files begin; card.json has all of them.",
    )
    for source in card.get("sources", []):
        table.rows.append(
            [
                _shown_path(str(source.get("path", ""))),
                source.get("task") or "",
                ", ".join(dict.fromkeys(str(file["importer"]) for file in source.get("files", []))),
                source.get("licence") or "",
                *(source.get(name) for name in counts),
                " ".join(str(file["sha256"])[:16] for file in source.get("files", [])[:_HASHES_SHOWN]),
            ]
        )
    return table


def _drop_table(card: Card) -> Table:
    table = Table("未用 · Dropped", {"reason": "", "kind": "", "records": ",d"})
    drops = [
        (reason, kind, count)
        for kind, row in _kinds(card).items()
        for reason, count in row.get("reasons", {}).items()
    ]
    table.rows.extend(list(drop) for drop in sorted(drops, key=lambda drop: (drop[0], -drop[2], drop[1])))
    return table


def _shown_path(path: str) -> str:
    """A source's name without the folders of the machine that it lay on."""
    return Path(path).name if Path(path).is_absolute() else path


def hub_licences(texts: Iterable[str]) -> list[str]:
    """The Hub's identifiers of all licences that the texts name; "other" for one it does not know, or for none.

    >>> hub_licences(["MIT; the poems are in the public domain", "CC BY-SA 3.0", "academic research only"])
    ['cc-by-sa-3.0', 'mit', 'other']
    """
    found: set[str] = set()
    for text in texts:
        lower = text.lower()
        names = {name for name, pattern in _LICENCES.items() if re.search(pattern, lower)}
        for clauses, version in _CREATIVE_COMMONS.findall(lower):
            family = "cc-by" + clauses.replace(" ", "-")
            names.add(f"{family}-{version}" if version in _HUB_VERSIONS.get(family, "").split() else "other")
        found |= names or {"other"}
    return sorted(found) or ["unknown"]


def readme(folder: Path, card: Card, pictures: Sequence[str]) -> str:
    """The dataset card: a YAML header for the Hub, then Markdown for people."""
    parts = [
        "---\n" + "\n".join(_yaml(_header(card))) + "\n---",
        "# 流萤 Firefly: Chinese instruction data",
        summary(card),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
    ]
    tables = card_tables(card)
    parts += ["\n\n".join([f"## {table.title}", table.markdown(), table.note]).strip() for table in tables]
    if example := _first_record(folder):
        fenced = json.dumps(example, ensure_ascii=False, indent=2)
        parts.append(f"## 样例 · An example\n\n````json\n{fenced}\n````")
    parts.append("## 制作 · How it was made\n\n" + _how(card))
    return "\n\n".join(parts) + "\n"


def _header(card: Card) -> dict[str, Any]:
    """The values of the YAML header, in the Hub's words."""
    kinds = _kinds(card)
    licences = hub_licences(source.get("licence") or "" for source in card.get("sources", []))
    total = sum(_sizes(card).values())
    header: dict[str, Any] = {"pretty_name": "Firefly Chinese instruction data", "license": licences}
    if "other" in licences:
        header |= {"license_name": "mixed-see-sources", "license_link": "README.md"}
    header |= {
        "language": ["zh", "en"] if "Translation" in kinds else ["zh"],
        "task_categories": ["text-generation", *sorted({_CATEGORIES[k] for k in kinds if k in _CATEGORIES})],
        "size_categories": [next((name for limit, name in _SIZES if total < limit), "10M<n<100M")],
        "tags": ["firefly", "instruction-tuning", "chinese"],
    }
    files = [
        {"split": split, "path": f"{split}.jsonl"}
        for split in ("train", "validation")
        if any(row.get(split) for row in kinds.values())
    ]
    name = {"config_name": "default"}
    return header | {
        "configs": [name | {"data_files": files}],
        "dataset_info": [name | {"features": _FEATURES}],
    }


def _yaml(value: Mapping[str, Any], indent: str = "") -> Iterable[str]:
    """A header's lines; texts are quoted as JSON, which YAML includes."""
    for key, item in value.items():
        if not isinstance(item, list):
            yield f"{indent}{key}: {json.dumps(item, ensure_ascii=False)}"
            continue
        yield f"{indent}{key}:"
        for entry in item:
            if isinstance(entry, Mapping):
                first, *rest = _yaml(entry, indent + "  ")
                yield from (f"{indent}- {first.strip()}", *rest)
            else:
                yield f"{indent}- {json.dumps(entry, ensure_ascii=False)}"


def _first_record(folder: Path) -> dict[str, Any] | None:
    path = folder / "train.jsonl"
    if not path.is_file() or path.stat().st_size == 0:
        return None
    return next((record for _, record in read_json_lines(path)), None)


def _how(card: Card) -> str:
    """The rules that made the dataset, with the recipe's choices."""
    sentences = [
        "Each source's records became questions and answers through hand-written templates, or were taken as they are "
        "where they were conversations already. Which template a record gets depends on a hash of the record alone."
    ]
    if "deduplicate" in card:
        sentences.append(
            f"Repetitions were looked for with `deduplicate = {json.dumps(card['deduplicate'])}`."
        )
    for reasons, text in (
        (("duplicate", "near_duplicate"), "repetitions"),
        (("contaminated",), "overlaps with evaluation files"),
    ):
        rows = _kinds(card).values()
        if count := sum(row.get("reasons", {}).get(reason, 0) for row in rows for reason in reasons):
            sentences.append(f"{count:,} records were dropped as {text}.")
    if "validation_fraction" in card:
        sentences.append(
            f"A share of {card['validation_fraction']:g} was held out by content hash, so that a record never changes "
            "side when sources grow."
        )
    sentences.append(
        "Everything that was dropped lies among the rejects, with its reason; card.json has all counts."
    )
    return " ".join(sentences) + "\n\nMade with Firefly(流萤), `firefly data`."
