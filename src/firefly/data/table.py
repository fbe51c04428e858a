"""A table of numbers, made once and shown three ways: on a terminal, in Markdown, and on an HTML page."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """`columns` maps a name to the format of its cells: "" for text, else a number's, such as ",d" or ".1%".

    A cell without a value is None and shows as a dash.
    """

    title: str
    columns: dict[str, str]
    rows: list[list[Any]] = field(default_factory=list)
    note: str = ""

    def cells(self, row: list[Any]) -> list[str]:
        """One row as texts."""
        return [
            "–" if value is None else format(value, how)
            for value, how in zip(row, self.columns.values(), strict=True)
        ]

    def markdown(self) -> str:
        """The table in GitHub's Markdown, without its title."""
        rule = ["---:" if how else "---" for how in self.columns.values()]
        rows = [list(self.columns), rule, *map(self.cells, self.rows)]
        return "\n".join("| " + " | ".join(map(_markdown_cell, row)) + " |" for row in rows)

    def rich(self) -> RichTable:
        """The table for a terminal."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=self.title, caption=self.note or None, box=box.SIMPLE_HEAD, title_justify="left"
        )
        table.caption_justify = "left"
        for name, how in self.columns.items():
            table.add_column(name, justify="right" if how else "left", no_wrap=bool(how))
        for row in self.rows:
            table.add_row(*map(Text, self.cells(row)))
        return table


def _markdown_cell(text: str) -> str:
    """Text that stays in its cell and is nothing but text."""
    text = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return text.replace("<", "&lt;").replace("`", "\\`").replace("[", "\\[")
