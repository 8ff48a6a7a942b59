"""What the tables of every study share: the printed table as Markdown and for the terminal, CSV of plain numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .records import Records, error_of

if TYPE_CHECKING:
    from rich.table import Table as RichTable


@dataclass(frozen=True)
class Table:
    """A printed table: `columns` are headings with their units, `rows` hold text, `caption` says what n and intervals
    are.
    """

    name: str
    heading: str
    columns: list[str]
    rows: list[list[str]]
    caption: str

    def markdown(self) -> str:
        """The table in GitHub's Markdown, numbers to the right."""
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        return "\n".join(lines) + f"\n\n{self.caption}\n"


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of plain values as CSV; a field that a row lacks stays empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def document(study: Records, heading: str, tables: Iterable[Table]) -> str:
    """A Markdown document: what did not finish, the tables, and what the cells note."""
    parts = [f"# {heading}\n"]
    if study.unfinished:
        lines = (f"- {study.title(cell['name'])}: {error_of(cell)}\n" for cell in study.unfinished)
        parts.append("Not finished:\n\n" + "".join(lines))
    parts += [f"## {table.heading}\n\n{table.markdown()}" for table in tables]
    if study.notes:
        parts.append("## Notes\n\n" + "".join(f"- {note}\n" for note in study.notes))
    return "\n".join(parts)


def energy_sentence(found: dict[str, Any] | None) -> str:
    """How the energy of a phase was measured, in one or two sentences."""
    if found is None:
        return "Energy was not measured."
    ways = "; ".join(f"{part}: {way}" for part, way in found["method"].items())
    kind = "read from counters" if found["counter"] else "an estimate, not a reading"
    intensity = f"{found['intensity_g_kwh']:g} g CO2e/kWh ({found['country']})"
    return f"Energy is {kind} (codecarbon, whole machine; {ways}) at {intensity}."


def terminal(table: Table) -> RichTable:
    """The table for a terminal."""
    from rich.table import Table as RichTable

    printed = RichTable(title=table.heading, caption=table.caption, caption_justify="left", title_justify="left")
    for index, column in enumerate(table.columns):
        printed.add_column(column, justify="left" if index == 0 else "right")
    for row in table.rows:
        printed.add_row(*row)
    return printed
