"""`firefly data stats`: what a dataset or a tokens directory holds, and what other length limits would cut.

    dataset directory   lengths in characters, from card.json        → its cards renewed, stats.json
    tokens directory    lengths in tokens, from borders and masks    → stats.json, report.html, two charts

The forecast needs the length that a sample had before any cut. Where nothing of a kind was cut, its samples tell it
themselves; the other kinds are measured again from the dataset, when the dataset and the tokenizer are at hand.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from firefly.console import progress
from firefly.data.card import card_tables, render_page, titles, write_cards
from firefly.data.chatformat import open_format
from firefly.data.dataset import read_dataset
from firefly.data.stats import PERCENTILES, draw_lengths, length_summary, task_chart
from firefly.data.table import Table
from firefly.data.tokenizer import ModelTokenizer
from firefly.data.tokens import SPLITS, Tokens
from firefly.errors import InputError
from firefly.files import write_atomic, write_json, writing_to
from firefly.recipe import DataSection

LIMITS = (512, 1024, 2048)
_CHUNK, _BATCH = 1 << 16, 1000


@dataclass(frozen=True)
class StatsResult:
    """Figures of a dataset or tokens directory; `lengths` and each kind's are `length_summary`s in `unit`s.

    `forecast`: limit → kind (or "all") → {"over": share of samples, "lost": share of target tokens}.
    """

    output: str
    unit: str  # "character" or "token"
    lengths: dict[str, Any]
    kinds: dict[str, dict[str, Any]]
    forecast: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    overlong: str | None = None  # the policy that the forecast assumes
    cuts: dict[str, dict[str, int]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        """What a person wants to see of it."""
        tables = [_length_table(self)] if self.unit == "token" else []
        if self.forecast:
            tables.append(_forecast_table(self))
        if self.cuts:
            rows = [[kind, reason, n] for kind, cuts in self.cuts.items() for reason, n in cuts.items()]
            columns = {"kind": "", "what": "", "samples": ",d"}
            tables.append(Table("截断 · Cut in this directory", columns, rows))
        return [*tables, *card_tables(self.card)]


def dataset_stats(dataset: Path, out: Path | None = None) -> StatsResult:
    """Figures of a dataset directory, in characters; renews its cards, or writes them to `out`.

    Raises `InputError` when there is no readable card.json.
    """
    card, out = read_card(dataset), out or dataset
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
    write_cards(out, card)
    kinds = {kind: row.get("characters", {"count": 0}) for kind, row in card.get("kinds", {}).items()}
    result = StatsResult(str(out), "character", card.get("characters", {"count": 0}), kinds, card=card)
    _write_json(result)
    return result


def read_card(dataset: Path) -> dict[str, Any]:
    """A dataset's card.json; raises `InputError` when it is missing or no JSON object."""
    path = dataset / "card.json"
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be read ({error}); build the dataset with `firefly data`."
        ) from error
    if not isinstance(card, dict):
        raise InputError(f"{path} is not a JSON object; build the dataset again with `firefly data`.")
    return card


def tokens_stats(
    tokens: Path,
    out: Path | None = None,
    *,
    dataset: Path | None = None,
    tokenizer: ModelTokenizer | None = None,
    data: DataSection | None = None,
) -> StatsResult:
    """Figures of a tokens directory; `dataset` and `tokenizer` tell what cut samples were before.

    `data` brings the policy for overlong samples; raises `InputError` for a damaged directory.
    """
    overlong = data.overlong if data else str(DataSection.model_fields["overlong"].default)
    out = out or tokens
    digest = tokenizer.sha256 if tokenizer else None
    splits = {split: Tokens.open(tokens, split, digest) for split in SPLITS}
    limits = sorted({*LIMITS, splits["train"].max_seq_length})
    index = json.loads((tokens / "index.json").read_text("utf-8"))
    cuts: dict[str, dict[str, int]] = index.get("cuts", {})
    survey, notes = _Survey(limits, overlong), []
    again = set(cuts) if dataset and tokenizer else set()
    if cuts and not again:
        notes.append(
            "Cut samples count here at the length that they were cut to, dropped ones not at all: "
            "their dataset or tokenizer is not at hand."
        )
    for split, mapped in splits.items():
        survey.stored(split, mapped, again)
        if again and dataset and tokenizer:
            survey.measured_again(split, dataset, tokenizer, index["chat_format"], again)
    card = read_card(dataset) if dataset else {}
    result = StatsResult(
        str(out),
        "token",
        length_summary(sum(survey.lengths.values(), Counter())),
        survey.kinds(card),
        survey.forecast(),
        overlong,
        cuts,
        card,
        notes,
    )
    _write_tokens_page(result, out)
    return result


class _Survey:
    """Sums over samples, a kind at a time; nothing is kept of a single sample."""

    def __init__(self, limits: Sequence[int], overlong: str) -> None:
        self.limits, self.overlong = limits, overlong
        self.lengths: defaultdict[str, Counter[int]] = defaultdict(Counter)  # as stored
        self.sides: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.targets: Counter[str] = Counter()  # target tokens as stored
        self.whole_samples: Counter[str] = Counter()  # before any cut, as all that follows
        self.whole_tokens: Counter[str] = Counter()
        self.whole_targets: Counter[str] = Counter()
        self.over: Counter[tuple[int, str]] = Counter()
        self.lost: Counter[tuple[int, str]] = Counter()

    def stored(self, split: str, tokens: Tokens, again: set[str]) -> None:
        """Count what lies in the directory; of the kinds `again`, which `measured_again` counts, only the lengths."""
        with progress(f"survey {split}", len(tokens), "samples") as bar:
            for start in range(0, len(tokens), _CHUNK):
                borders = tokens.borders[start : start + _CHUNK + 1]
                lengths = np.diff(borders)
                learned = np.cumsum(tokens.mask[borders[0] : borders[-1]], dtype=np.int64)
                targets = np.diff(np.concatenate([[0], learned])[borders - borders[0]])
                kinds = tokens.kinds[start : start + _CHUNK]
                for number in np.unique(kinds):
                    kind, mine = tokens.kind_names[number], kinds == number
                    found = np.unique(lengths[mine], return_counts=True)
                    self.lengths[kind].update(dict(zip(*(part.tolist() for part in found), strict=True)))
                    self.sides[kind][split] += int(mine.sum())
                    self.targets[kind] += int(targets[mine].sum())
                    if kind in again:
                        continue
                    self._count(kind, lengths[mine], targets[mine])
                    for sample in np.flatnonzero(mine & (lengths > self.limits[0])):
                        self._cut(kind, tokens.mask[borders[sample] : borders[sample + 1]])
                bar.advance(len(lengths))

    def measured_again(
        self, split: str, dataset: Path, tokenizer: ModelTokenizer, data_format: str, again: set[str]
    ) -> None:
        """Count the examples of the kinds `again` as they were before any cut, rendered once more."""
        chat_format = open_format(data_format, tokenizer)
        examples = (example for example in read_dataset(dataset, split) if example.kind in again)
        with progress(f"measure what was cut in {split}", None, "examples") as bar:
            while batch := list(islice(examples, _BATCH)):
                rendered = chat_format.render_many([example.messages for example in batch]).samples()
                for example, sample in zip(batch, rendered, strict=True):
                    mask = np.asarray(sample.mask, np.uint8)
                    self._count(example.kind, np.asarray([len(mask)]), mask.sum(keepdims=True))
                    self._cut(example.kind, mask)
                bar.advance(len(batch))

    def _count(self, kind: str, lengths: NDArray[Any], targets: NDArray[Any]) -> None:
        self.whole_samples[kind] += len(lengths)
        self.whole_tokens[kind] += int(lengths.sum())
        self.whole_targets[kind] += int(targets.sum())

    def _cut(self, kind: str, mask: NDArray[Any]) -> None:
        """What each limit would do to one sample."""
        for limit in self.limits:
            if len(mask) > limit:
                self.over[limit, kind] += 1
                self.lost[limit, kind] += lost_targets(mask, limit, self.overlong)

    def kinds(self, card: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The figures of each kind, the largest first."""
        rows = {}
        for kind in sorted(self.lengths, key=lambda kind: (-self.sides[kind].total(), kind)):
            characters = card.get("kinds", {}).get(kind, {}).get("characters", {}).get("total")
            tokens = sum(length * count for length, count in self.lengths[kind].items())
            rows[kind] = {
                **{split: self.sides[kind][split] for split in SPLITS},
                "tokens": tokens,
                "target_tokens": self.targets[kind],
                "tokens_per_character": round(self.whole_tokens[kind] / characters, 4)
                if characters
                else None,
                "lengths": length_summary(self.lengths[kind]),
            }
        return rows

    def forecast(self) -> dict[str, dict[str, dict[str, float]]]:
        """Limit → kind → shares; "all" comes first."""
        made: dict[str, dict[str, dict[str, float]]] = {}
        for limit in self.limits:
            groups = {"all": list(self.whole_samples)} | {kind: [kind] for kind in sorted(self.whole_samples)}
            made[str(limit)] = {
                name: {
                    "over": _share(
                        sum(self.over[limit, k] for k in kinds), sum(self.whole_samples[k] for k in kinds)
                    ),
                    "lost": _share(
                        sum(self.lost[limit, k] for k in kinds), sum(self.whole_targets[k] for k in kinds)
                    ),
                }
                for name, kinds in groups.items()
            }
        return made


def lost_targets(mask: NDArray[Any], limit: int, overlong: str) -> int:
    """Target tokens that a sample longer than `limit` would lose; mask [L], exact but for the few tokens between turns.

    Where the input gives way, the oldest exchanges go until the rest fits; the last answer stays, or else the sample is
    dropped. "error" stops the run, which counts here as dropping. A plain text is split and loses nothing.
    """
    targets = int(mask.sum())
    if targets >= len(mask) - 1:
        return 0
    if overlong == "right-of-target":
        return int(mask[limit:].sum())
    if overlong not in ("middle-of-input", "left-of-input"):
        return targets
    last = int(np.flatnonzero(mask)[-1]) if targets else 0
    answered = (np.flatnonzero(mask[:-1] > mask[1:]) + 1).tolist()
    exchanges = [0, *(end for end in answered if end <= last)]  # where each begins
    start = next((begin for begin in exchanges if len(mask) - begin <= limit), exchanges[-1])
    kept = int(mask[start:].sum())
    return targets - kept if kept < limit else targets


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _length_table(result: StatsResult) -> Table:
    columns = {
        "kind": "",
        "任务": "",
        "samples": ",d",
        "tokens": ",d",
        "learned": ".1%",
        "tokens/char": ".3f",
    }
    shares = [*(f"p{share}" for share in PERCENTILES), "max"]
    table = Table(
        "长度 · Lengths in tokens",
        columns | dict.fromkeys(shares, ",.0f"),
        note="learned: share of the tokens under the loss; tokens/char: before any cut, over question and answer.",
    )
    names = titles(result.card)
    for kind, row in result.kinds.items():
        lengths = row["lengths"]
        table.rows.append(
            [
                kind,
                names.get(kind, ""),
                lengths["count"],
                row["tokens"],
                row["target_tokens"] / row["tokens"],
                row["tokens_per_character"],
                *(lengths[name] for name in shares),
            ]
        )
    tokens = sum(row["tokens"] for row in result.kinds.values())
    targets = sum(row["target_tokens"] for row in result.kinds.values())
    everything = [result.lengths["count"], tokens, targets / tokens, None]
    table.rows.append(["all", "合计", *everything, *(result.lengths[name] for name in shares)])
    return table


def _forecast_table(result: StatsResult) -> Table:
    columns = {"kind": ""}
    for limit in result.forecast:
        columns |= {f"over {limit}": ".2%", f"lost {limit}": ".2%"}
    table = Table(
        "截断预测 · What a limit would cut",
        columns,
        note="over: share of samples longer than the limit, in tokens; lost: share of the target tokens that go, with "
        f"data.overlong = {result.overlong}. " + " ".join(result.notes),
    )
    for kind in [
        *result.kinds,
        *sorted(set(result.forecast[str(LIMITS[0])]) - {"all", *result.kinds}),
        "all",
    ]:
        cells = [[limit[kind]["over"], limit[kind]["lost"]] for limit in result.forecast.values()]
        table.rows.append([kind, *(value for pair in cells for value in pair)])
    return table


def _write_tokens_page(result: StatsResult, out: Path) -> None:
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
    sizes = {kind: row["lengths"]["count"] for kind, row in result.kinds.items()}
    pictures = {name: out / name for name in ("tasks.png", "lengths.png")}
    task_chart(pictures["tasks.png"], sizes, titles(result.card))
    draw_lengths(pictures["lengths.png"], result.lengths, "token")
    tokens = sum(row["tokens"] for row in result.kinds.values())
    lead = f"{sum(sizes.values()):,} samples of {len(sizes)} tasks, {tokens:,} tokens."
    write_atomic(out / "report.html", render_page("词元 Tokens", lead, result.tables(), pictures))
    _write_json(result)


def _write_json(result: StatsResult) -> None:
    """Everything but the card, which has its own file, and the place."""
    values = {name: value for name, value in asdict(result).items() if name not in ("card", "output")}
    write_json(Path(result.output) / "stats.json", values)
