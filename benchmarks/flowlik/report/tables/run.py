"""Tables of a run: the published shape (methods against steps, bits/dim / Fréchet) and one line per cell with its
accuracy and cost, as Markdown, LaTeX and CSV.

Nothing is measured here: `tables` arranges records, `render` writes them down, the report takes the same tables.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flowlik.measures.registry import own_columns
from flowlik.records.columns import TABLE, named
from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.frame import chosen
from flowlik.report.tables.accuracy import by_steps, in_detail, shown
from flowlik.report.tables.formats import FORMATS, _markdown, _nothing
from flowlik.report.tables.latex import WIDTHS, latex
from flowlik.report.tables.published import with_published
from flowlik.report.tables.samples import _one_evaluation, _samples
from flowlik.report.tables.table import Table
from flowlik.report.tables.uses import (
    _classes,
    _comparison,
    _gradient,
    _importance,
    _outliers,
    _routes,
    _training,
)
from flowlik_models.files import write_atomically
from flowlik_models.names import unknown

METHOD_AFTER: Final = "split"
"""Where in the CSV the method stands, which frames add."""


def csv_columns() -> tuple[str, ...]:
    """The columns of the CSV: those with a place in it, what else the table of accuracy and cost shows, and those of
    registered measures."""
    placed = sorted((column.csv, column.name) for column in TABLE if column.csv is not None)
    names = [name for _, name in placed]
    names.insert(names.index(METHOD_AFTER) + 1, "method")
    others = (column for column in TABLE if column.csv is None and column.head and column.place is not None)
    return (*names, *named(others), *named(own_columns()))


def tables(records: pd.DataFrame, columns: Sequence[str] = ()) -> list[Table]:
    """Per task and split the published shape, the detailed one, that beside published values and those of samples and
    uses, where there are any; with `columns` the detailed one alone, of these columns.

    Raises:
        ValueError: the table of accuracy and cost has no such column.
    """
    usable = frames.averaged(frames.usable(frames.prepare(records)))
    valid = [column.name for column in shown()]
    for name in columns:
        if name not in valid:
            raise ValueError(unknown("column", name, valid))
    found: list[Table] = []
    for _, _, frame in frames.by_task_and_split(usable):
        likelihoods = frame[frame["bpd"].notna()]
        if columns:
            found += [in_detail(likelihoods, columns)] if len(likelihoods) else []
            continue
        found += [by_steps(likelihoods), in_detail(likelihoods)] if len(likelihoods) else []
        found += with_published(likelihoods)
        found += use_tables(frame)
    return found


def render(
    df: pd.DataFrame,
    format: str,
    *,
    width: str | None = None,
    columns: Sequence[str] = (),
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
) -> str:
    """The tables of records as text.

    Args:
        df: records as `read_records` gives them.
        format: `md`, `latex` or `csv` (one line per record, failed ones too; raw numbers).
        width: of LaTeX tables: `column` (345 pt, the default) or `page` (487 pt, across two columns).
        columns: of the table of accuracy and cost, which then stands alone; by default of LaTeX the main ones.
        methods: only these, by estimator (`f2d2`) or method (`ode-euler`); controls stay.
        tasks: only these.

    Raises:
        ValueError: the format, the width, a column, a method or a task is none of the valid ones.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    if width is not None and width not in WIDTHS:
        raise ValueError(unknown("width", width, WIDTHS))
    if width is not None and format != "latex":
        raise ValueError(f"a width is that of LaTeX tables: expected the format latex, not {format}")
    if columns and format == "csv":
        raise ValueError("the CSV has all columns: expected the format md or latex with columns")
    frame = chosen(frames.prepare(df), methods, tasks)
    if format == "csv":
        return _csv(frame)
    found = tables(frame, columns)
    if not found:
        return _nothing(format)
    if format == "md":
        return "\n".join(map(_markdown, found))
    return "\n".join(latex(table if columns else table.without_more(), width or "column") for table in found)


def write_tables(run_dir: Path) -> list[Path]:
    """Write `table.md`, `table.tex` and `table.csv` of a run into its folder; their paths."""
    records = frames.load(run_dir)
    written = []
    for name, form in (("table.md", "md"), ("table.tex", "latex"), ("table.csv", "csv")):
        path = run_dir / name
        write_atomically(path, render(records, form).encode())
        written.append(path)
    return written


def _csv(frame: pd.DataFrame) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = csv_columns()
    writer.writerow(names)
    for row in labels.as_dicts(frame):
        writer.writerow([_plain(row[name]) for name in names])
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    if math.isnan(value):
        return ""
    return int(value) if value.is_integer() and abs(value) < 1e15 else repr(value)


def use_tables(frame: pd.DataFrame) -> list[Table]:
    """The tables of one task and split that its records support."""
    makers = (
        _classes,
        _one_evaluation,
        _routes,
        _samples,
        _comparison,
        _outliers,
        _importance,
        _gradient,
        _training,
    )
    return [table for make in makers if (table := make(frame)) is not None]
