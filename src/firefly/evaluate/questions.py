"""The held-out questions: examples by task, from a dataset directory's validation side or from files of one's own."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from firefly.data.dataset import read_dataset
from firefly.data.example import Example
from firefly.data.readers import files_of, read_records
from firefly.data.tasks import load_tasks
from firefly.errors import InputError, choices

Questions = dict[str, list[Example]]
"""Examples by kind, kinds in alphabetical order."""


def read_questions(data: Path, tasks: Collection[str] = ()) -> Questions:
    """The examples to evaluate on; with `tasks`, theirs alone.

    `data` is a dataset directory, of which the validation side counts, or a file, folder or pattern of records with
    `kind`, and `input` and `target` or `messages`. Raises `InputError` when there are none, for an unknown task, and
    for an example without a reference answer.
    """
    found: Questions = {}
    for example in _examples(data):
        if not example.target.strip():
            raise InputError(
                f"{data}: the example {example.source} ({example.kind}) has no reference answer to judge by; "
                "give it one, or take it out."
            )
        found.setdefault(example.kind, []).append(example)
    for name in tasks:
        if name not in found:
            if name not in load_tasks():
                raise InputError(f"Unknown task '{name}': {choices(name, {*load_tasks(), *found})}.")
            raise InputError(
                f"{data} has no example of the task '{name}'; it has {', '.join(sorted(found))}."
            )
    if not found:
        raise InputError(
            f"{data} has no held-out sample; raise data.validation_fraction and run `firefly data` again."
        )
    return {kind: group for kind, group in sorted(found.items()) if kind in tasks or not tasks}


def _examples(data: Path) -> Iterator[Example]:
    if (data / "card.json").is_file():
        yield from read_dataset(data, "validation")
        return
    for path in files_of(data):
        for line, record in read_records(path):
            yield Example.from_record(record, path, line)
