"""The shape of a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from flowlik.report import numbers


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
    """Header and lines; the first `names` columns hold words, the others numbers. `note` stands under the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    names: int = 2
    note: str = ""


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
    return Table(table.title, tuple(table.columns[k] for k in kept), rows, table.names, table.note)
