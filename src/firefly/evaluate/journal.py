"""What is found out is kept as it comes: a killed evaluation goes on where it was, and asks nothing twice.

    journal = Journal(out / "journal" / "tuned.jsonl", {"model": …, "generation": …})
    journal.get(key)                    # what was kept under that key, or None
    journal.keep(key, value)            # one JSON line more

The identity is all that every value depends on (weights, options); a file that was begun under another one is begun
anew. A key is all that a value depends on besides, so that data may change and what is still asked counts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from firefly.console import say
from firefly.files import sha256_json, write_atomic, writing_to


class Journal:
    """Values by key in one file of JSON Lines; its first line is the identity's hash."""

    def __init__(self, path: Path, identity: Any) -> None:
        self.path = path
        head = json.dumps({"identity": sha256_json(identity)})
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        whole = lines[:-1]  # a line that was cut by a kill has no end
        self._values: dict[str, Any] = {}
        if whole[:1] == [head]:
            for line in whole[1:]:
                entry = json.loads(line)
                self._values[entry["key"]] = entry["value"]
        elif lines:
            say(f"{path.stem}: the model or the settings changed since {path} was begun; it is done anew")
        if lines != [*whole, ""] or whole[:1] != [head]:
            kept = whole if whole[:1] == [head] else [head]
            write_atomic(path, "\n".join(kept) + "\n")

    def get(self, key: str) -> Any:
        """The value under `key`, None when there is none."""
        return self._values.get(key)

    def keep(self, key: str, value: Any) -> None:
        """Add a value; it is on its way to the disk when this returns."""
        self._values[key] = value
        with writing_to(self.path), self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n")
