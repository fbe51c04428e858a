"""What every benchmark shares: result rows with date, commit, machine and versions, and the closing JSON line."""

from __future__ import annotations

import csv
import datetime
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def machine() -> str:
    """Processor (or GPU) and cores, without the host's name."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    model = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{model}, {os.cpu_count()} cores"


def commit() -> str:
    """The checkout's commit, with a + when files differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run(
        [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=False
    )
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


def append(name: str, rows: list[dict[str, Any]]) -> Path:
    """Append rows to bench/results/NAME.csv; the columns are those of its first row."""
    path = ROOT / "bench" / "results" / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    common = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "versions": " ".join(f"{library} {version(library)}" for library in ("torch", "transformers")),
    }
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [*common, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows(common | row for row in rows)
    return path


def finish(ratios: dict[str, float]) -> None:
    """Print the last line: one JSON object of ratios."""
    print(json.dumps({name: float(f"{ratio:.4g}") for name, ratio in ratios.items()}))
