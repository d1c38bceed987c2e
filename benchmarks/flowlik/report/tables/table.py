"""The shape of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import pandas as pd

from flowlik.report import numbers

MOST_SHOWN: Final = 8
"""Columns that fit on a page."""


@dataclass(frozen=True)
class Cell:
    """What a cell says, the number it is sorted by (None: by its text), what is wrong with it (the report marks it and
    shows these words), and whether it was printed in a paper and not measured here (shown in grey)."""

    text: str
    value: float | None = None
    flag: str = ""
    published: bool = False


@dataclass(frozen=True)
class Table:
    """Header and lines; the first `names` columns hold words, the others numbers. `note` stands under the table.

    Columns at the places in `more` wait behind a switch in the report; without any, those beyond `MOST_SHOWN`. `ids`
    are the records behind the lines.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 2
    note: str = ""
    more: tuple[int, ...] = ()
    ids: tuple[str, ...] = ()

    def waits(self, place: int) -> bool:
        """Whether a column is shown only when a reader asks for all."""
        return place in self.more if self.more else place >= MOST_SHOWN

    def without_more(self) -> Table:
        """The table without the columns named in `more`."""
        kept = [k for k in range(len(self.columns)) if k not in self.more]
        rows = tuple(tuple(row[k] for k in kept) for row in self.rows)
        return replace(self, columns=tuple(self.columns[k] for k in kept), rows=rows, more=())

    def holds_words(self, place: int) -> bool:
        """Whether a column is set as words: a name, or text that is no number."""
        if place < self.names:
            return True
        cells = [row[place] for row in self.rows]
        return all(cell.value is None for cell in cells) and any(
            cell.text not in ("–", "") and not cell.published for cell in cells
        )

    def line_id(self, line: int) -> str:
        """What an anchor of a line is made of: its record, or the table and what the line is named by."""
        if line < len(self.ids) and self.ids[line]:
            return self.ids[line]
        words = (self.title, *(cell.text for cell in self.rows[line][: max(self.names, 1)]))
        return sha256("\n".join(words).encode()).hexdigest()[:10]


def seeds_note(frame: pd.DataFrame) -> str:
    """What stands under a table whose numbers are means over seeds; empty where none is."""
    seeds = int(frame["n_seeds"].max()) if "n_seeds" in frame and len(frame) else 1
    if seeds < 2:
        return ""
    return f"Means over up to {seeds} seeds and repeats; ± is the standard deviation over them."


def _title(frame: pd.DataFrame, words: str) -> str:
    return f"{frame['task'].iloc[0]}: {words}"


def _cell(value: Any, low: Any = math.nan, high: Any = math.nan, digits: int = 3) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell("–")
    text = numbers.number(float(value), digits)
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        text += f" [{numbers.number(float(low), digits)}, {numbers.number(float(high), digits)}]"
    return Cell(text, float(value))


def _over_seeds(row: dict[str, Any], name: str, low: Any = math.nan, high: Any = math.nan) -> Cell:
    """A number with its standard deviation over seeds; of a single seed with its interval, where it has one."""
    spread, value = row.get(f"{name}_sd"), row.get(name)
    if spread is None or value is None or math.isnan(spread):
        return _cell(value, low, high)
    return Cell(numbers.with_spread(numbers.number(value), spread), float(value))


def _head(row: dict[str, Any]) -> tuple[Cell, ...]:
    return Cell(row["row"]), Cell(row["model"]), _cell(row["nfe_mean"])


def _interval(row: dict[str, Any], name: str, digits: int = 3) -> Cell:
    return _cell(row[name], row[f"{name}_lo"], row[f"{name}_hi"], digits)


def _without_empty(table: Table) -> Table:
    """The table without columns that hold nothing."""
    kept = [k for k in range(len(table.columns)) if any(row[k].text != "–" for row in table.rows)]
    rows = tuple(tuple(row[k] for k in kept) for row in table.rows)
    return replace(table, columns=tuple(table.columns[k] for k in kept), rows=rows)
