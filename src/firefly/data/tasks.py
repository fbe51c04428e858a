"""A task turns a raw record into a question and its answer; each task is one TOML file in the folder `tasks/`.

    {"word": "画蛇添足", "explanation": "比喻……"}  ──Dictionary──▶  "“画蛇添足”是什么意思？" → "比喻……"

A task asks in one or more *directions* (word → explanation, explanation → word), each with several templates
written by hand. Which template a record gets is decided by a hash of the record, so the same record is asked in
the same way on every machine and in every run, whatever stands around it. docs/new-task.md adds a task in ten lines.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from firefly.data.example import Example
from firefly.errors import InputError, choices
from firefly.files import sha256_file

TASKS_DIR = Path(__file__).parent / "tasks"
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_STRICT = ConfigDict(extra="forbid")
MIN_TEMPLATES = 12  # fewer, and a model learns the wording instead of the task
Text = Annotated[str, Field(min_length=1)]
Metric = Literal[
    "accuracy", "entity_f1", "keyword_f1", "span_f1", "correction_f1", "bleu", "chrf", "rouge",
    "couplet", "poem", "distinct",
]  # fmt: skip


@dataclass(frozen=True, config=_STRICT)
class Direction:
    """One way to ask: the answer, and templates of the question, with `{field}` where a field's text goes."""

    name: Text
    target: Text
    templates: Annotated[tuple[Text, ...], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0)] = 1.0
    values: dict[str, dict[str, str]] = field(default_factory=dict)  # field → raw value → text

    @cached_property
    def needs(self) -> frozenset[str]:
        """The fields that a record must have for this direction."""
        return frozenset(_PLACEHOLDER.findall("".join((self.target, *self.templates))))


_Option = tuple[Direction, str, float]


@dataclass(frozen=True, config=_STRICT)
class TaskSource:
    """Where data for a task comes from, for the dataset's card."""

    name: Text
    licence: Text
    url: str = ""
    file: str = ""  # its name in the corpus pack; without one, the licence is that of every other file
    note: str = ""


@dataclass(frozen=True, config=_STRICT)
class Task:
    """One task: its name in firefly-train-1.1M, how it is judged, and how its records are asked."""

    kind: Text
    title_zh: Text
    title_en: Text
    metric: Metric
    fields: Annotated[tuple[Text, ...], Field(min_length=1)]  # what a raw record may have
    cap: Annotated[int, Field(ge=1)]  # records of this task when the recipe does not say
    directions: Annotated[tuple[Direction, ...], Field(min_length=1)]
    weight: Annotated[float, Field(gt=0)] = 1.0  # how often a record is used when the recipe does not say
    stand_in: str = ""  # what takes the place of data that may not be used, said plainly
    sources: tuple[TaskSource, ...] = ()

    def eligible(self, names: Collection[str], among: Collection[str] = ()) -> list[Direction]:
        """The directions that a record with these fields can be asked in, of all or `among` those of these names."""
        return [direction for direction in self._named(among) if direction.needs.issubset(names)]

    def _named(self, among: Collection[str]) -> list[Direction]:
        """The directions of these names; all where none is named."""
        return [direction for direction in self.directions if not among or direction.name in among]

    def _options(self, names: frozenset[str], among: tuple[str, ...]) -> tuple[list[_Option], list[slice]]:
        """The templates for such a record, each with its direction and weight, and where each direction's are."""
        if (names, among) not in self._known_options:
            options: list[_Option] = []
            spans = []
            for direction in self.eligible(names, among):
                weight = direction.weight / len(direction.templates)
                spans.append(slice(len(options), len(options) + len(direction.templates)))
                options += [(direction, template, weight) for template in direction.templates]
            self._known_options[names, among] = options, spans
        return self._known_options[names, among]

    @cached_property
    def _known_options(
        self,
    ) -> dict[tuple[frozenset[str], tuple[str, ...]], tuple[list[_Option], list[slice]]]:
        return {}

    def render(
        self,
        fields: Mapping[str, str],
        *,
        source: str,
        variant: int = 0,
        seed: int = 0,
        among: Sequence[str] = (),
    ) -> Example:
        """Ask a record: choose a direction by weight, of all or `among` those named, and a template, both by a hash of
        the record.

        Variants 0, 1, 2, … of a record get different templates until all are used up.
        Raises `InputError` when the record lacks the fields of every direction, or has an unknown value.
        """
        present = {name: text for name, text in fields.items() if text.strip()}
        options, spans = self._options(frozenset(present), tuple(among))
        if not options:
            wanted = {" + ".join(sorted(direction.needs)) for direction in self._named(among)}
            needed = " or ".join(sorted(wanted))
            there = ", ".join(sorted(present)) or "none"
            raise InputError(
                f"{source}: task {self.kind} needs the fields {needed}; the fields there are: {there}."
            )
        # One exponential clock an option, ringing at its weight's rate: the order of ringing is a weighted shuffle.
        key = json.dumps([seed, self.kind, sorted(present.items())])
        noise = hashlib.shake_256(key.encode("ascii")).digest(8 * len(options))
        numbers = struct.unpack(f">{len(options)}Q", noise)

        def ring(option: int) -> float:
            return -math.log((numbers[option] + 1) / 2**64) / options[option][2]

        if variant % len(options):
            chosen = sorted(range(len(options)), key=ring)[variant % len(options)]
        else:  # as nearly always; of the clocks of a direction, which have one rate, the highest number's rings first
            chosen = min((numbers.index(max(numbers[span])) for span in spans), key=ring)
        direction, template, _ = options[chosen]
        texts = present | {
            name: _mapped(name, present[name], mapping, source) for name, mapping in direction.values.items()
        }
        question, answer = (_filled(pattern, texts) for pattern in (template, direction.target))
        return Example.of(self.kind, question, answer, source)


@cache
def _split(pattern: str) -> list[str]:
    """Fixed text and names of fields in turn."""
    return _PLACEHOLDER.split(pattern)


def _filled(pattern: str, texts: Mapping[str, str]) -> str:
    parts = _split(pattern).copy()
    parts[1::2] = [texts[name] for name in parts[1::2]]
    return "".join(parts)


def _mapped(name: str, value: str, mapping: Mapping[str, str], source: str) -> str:
    """The text that a task's `values` table gives to a raw value."""
    if value not in mapping:
        raise InputError(f"{source}: field '{name}' is {value!r}; allowed: {', '.join(mapping)}.")
    return mapping[value]


@cache
def load_tasks(folder: Path = TASKS_DIR) -> Mapping[str, Task]:
    """Every task of a folder, by kind, in the order of the file names.

    Raises `InputError` for a wrong file, and for a template that two tasks share: its questions would have two
    kinds of answer.
    """
    tasks = {path: _load(path) for path in sorted(folder.glob("*.toml"))}
    places: dict[str, Path] = {}
    for path, loaded in tasks.items():
        for template in {text for direction in loaded.directions for text in direction.templates}:
            if template in places:
                raise InputError(f"{path}: the template '{template}' is also in {places[template]}.")
            places[template] = path
    return {loaded.kind: loaded for loaded in tasks.values()}


def task_files_mark(kinds: Collection[str]) -> list[Any]:
    """What a dataset of these kinds takes from the task files: their contents, and the weights of the others.

    A kind without a task, such as a source of plain text may have, takes nothing.
    """
    tasks = load_tasks()
    contents = [sha256_file(TASKS_DIR / f"{kind.lower()}.toml") for kind in sorted({*kinds} & tasks.keys())]
    weights = {kind: known.weight for kind, known in tasks.items() if known.weight != 1}
    return [contents, weights]


def task(kind: str) -> Task:
    """The task of that name; raises `InputError` with the choices when there is none."""
    tasks = load_tasks()
    if kind not in tasks:
        raise InputError(f"Unknown task '{kind}': {choices(kind, tasks)}.")
    return tasks[kind]


def _load(path: Path) -> Task:
    """Read and check one task file; raises `InputError` naming the file and all of its mistakes."""
    try:
        table = tomllib.loads(path.read_text("utf-8"))
        loaded = TypeAdapter(Task).validate_python(table)
        mistakes = _mistakes(loaded, path.stem)
    except ValidationError as error:
        mistakes = [_sentence(detail) for detail in error.errors()]
    except ValueError as error:  # bad TOML or bad UTF-8
        raise InputError(f"{path}: not valid TOML in UTF-8: {error}.") from error
    if mistakes:
        raise InputError("\n  ".join([f"{path} has {len(mistakes)} mistake(s):", *mistakes]))
    return loaded


def _mistakes(task: Task, stem: str) -> list[str]:
    """What a well-formed task file can still have wrong."""
    found = []
    if stem != task.kind.lower():
        found.append(f"kind = '{task.kind}': the file must be named {task.kind.lower()}.toml")
    templates: set[str] = set()
    for direction in task.directions:
        place = f"direction '{direction.name}'"
        answer = set(_PLACEHOLDER.findall(direction.target))
        found += [
            f"{place}: placeholder {{{name}}} is no field: {choices(name, task.fields)}"
            for name in sorted(direction.needs.difference(task.fields))
        ]
        found += [
            f"{place}: values of '{name}', which neither target nor templates use"
            for name in sorted(set(direction.values) - direction.needs)
        ]
        if not answer:
            found.append(f"{place}: the target '{direction.target}' names no field")
        for template in direction.templates:
            leaked = sorted(answer.intersection(_PLACEHOLDER.findall(template)))
            if leaked:
                found.append(f"{place}: the template '{template}' gives away its target {{{leaked[0]}}}")
            if template in templates:
                found.append(f"{place}: the template '{template}' is there twice")
            templates.add(template)
        found += [
            f"{place}: '{pattern}' has a brace that is no {{field}}"
            for pattern in (direction.target, *direction.templates)
            if re.search(r"[{}]", _PLACEHOLDER.sub("", pattern))
        ]
    if len(templates) < MIN_TEMPLATES:
        found.append(f"{len(templates)} templates over all directions; write at least {MIN_TEMPLATES}")
    return found


def _sentence(detail: Any) -> str:
    """One schema error: where it is, and what is wrong."""
    location = detail["loc"]
    name = ".".join(str(part) for part in location)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owner = {"directions": Direction, "sources": TaskSource}.get(location[0], Task)
        return f"{name}: unknown key; {choices(str(location[-1]), [item.name for item in fields(owner)])}"
    return f"{name}: {detail['msg']}"
