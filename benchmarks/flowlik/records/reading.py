"""Records: append-only JSON Lines, one row per cell, and the one way to read them back.

Rows are written and read through `flowlik.records.journal`: whole or not at all, by any number of runs at a time.
Per-item arrays lie beside as `items/<cell_id>.npz`, put in place by a rename before their row is written.
"""

from __future__ import annotations

import gc
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowlik.records import journal
from flowlik.records.columns import COLUMNS, NESTED, SAME_CELL, SCHEMA_VERSION, TABLE, Kind, named
from flowlik.records.contradictions import without_contradictions

if TYPE_CHECKING:
    import pandas as pd

Column = np.ndarray[Any, np.dtype[Any]]

_TYPES: dict[Kind, tuple[type, ...]] = {
    "text": (str,),
    "number": (int, float),
    "flag": (bool,),
    "nested": (dict,),
}
_KINDS: tuple[frozenset[type], ...] = tuple(
    frozenset(_TYPES[column.kind] if column.required else (*_TYPES[column.kind], type(None)))
    for column in TABLE
)
"""Types of values that a column may hold."""

_OBJECTS = frozenset(named(TABLE, "text", "flag", "nested"))


def records_file(path: str | Path) -> Path:
    """The records file of a run folder, or the file itself.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
    """
    path = Path(path)
    file = path / "records.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no records at {file}: expected a run folder or its records.jsonl")
    return file


def run_note(run_dir: Path) -> dict[str, Any]:
    """What `run.json` tells of a run (suite, argv, started, finished); empty where it cannot be read."""
    file = run_dir / "run.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run as dicts with exactly `COLUMNS`: of a cell tried twice the last row, skipped ones only
    where nothing better is known of the same cell. Torn and damaged lines, and rows of another schema version, are left
    out with a warning.
    """
    return latest_rows(journal.read(records_file(path))[0])


def latest_rows(found: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """As `read_rows`, of rows that are read already."""
    rows = [dict(zip(COLUMNS, values, strict=True)) for values in _sound(found)]
    kept = _latest([row["cell_id"] for row in rows], [row["status"] for row in rows], rows.__getitem__)
    return [rows[number] for number in kept]


def read_records(path: str | Path) -> pd.DataFrame:
    """Read a run into a frame with exactly the columns of `COLUMNS`.

    Args:
        path: a run's folder or its `records.jsonl`.

    Returns:
        One row per cell, in the order in which they were written; `params` and `extra` hold dicts, numbers that are
        not known are NaN, texts that are not known None. The last row of a cell that was tried twice counts; rows
        that contradict themselves, as after an edit, are left out with a warning. What measures of one's own
        (`flowlik.measures`) say stands in `extra`, installed here or not.

    Raises:
        FileNotFoundError: there are no records at `path`.

    >>> import tempfile
    >>> from flowlik.records.writing import append_line
    >>> with tempfile.TemporaryDirectory() as run:
    ...     append_line(Path(run) / "records.jsonl", {"cell_id": "a", "task": "gmm-2d", "status": "ok", "bpd": 2.5})
    ...     records = read_records(run)
    >>> records[["task", "bpd"]].to_dict("records")
    [{'task': 'gmm-2d', 'bpd': 2.5}]
    """
    import pandas as pd

    parts: dict[str, list[Column]] = {name: [_column(name, ())] for name in COLUMNS}
    with _collector_paused():
        for rows in journal.chunks(records_file(path)):
            for name, values in zip(COLUMNS, zip(*_sound(rows)), strict=False):  # noqa: B905 - no rows, no columns
                parts[name].append(_column(name, values))
    columns = {name: np.concatenate(found[1:] or found) for name, found in parts.items()}
    frame = pd.DataFrame({name: pd.Series(column, dtype=column.dtype) for name, column in columns.items()})
    kept = _latest(list(frame["cell_id"]), list(frame["status"]), frame.iloc.__getitem__)
    frame = frame if len(kept) == len(frame) else frame.iloc[kept].reset_index(drop=True)
    return without_contradictions(frame)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Rows hold no cycles, and looking for some among millions of new objects takes a third of the reading."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _sound(found: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """The rows as tuples in the order of `COLUMNS`, without those of another schema or with values of wrong kinds."""
    found = _of_this_schema(found)
    pick = itemgetter(*COLUMNS)
    try:
        rows = list(map(pick, found))
    except KeyError:  # a row of another version, or of another hand
        rows = [tuple(row.get(name) for name in COLUMNS) for row in found]
    if all(set(map(type, column)) <= kinds for column, kinds in zip(zip(*rows), _KINDS)):  # noqa: B905 - as above
        return rows
    sound = [row for row in rows if all(type(v) in kinds for v, kinds in zip(row, _KINDS, strict=True))]
    lost = len(rows) - len(sound)
    warnings.warn(f"{lost} records hold values of the wrong kind and were left out", stacklevel=4)
    return sound


def _of_this_schema(found: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """The rows whose columns mean what they mean here; one that names no version is taken at its word."""
    ours = [row for row in found if row.get("schema_version") in (SCHEMA_VERSION, None)]
    if len(ours) < len(found):
        warnings.warn(
            f"records of another schema version than {SCHEMA_VERSION} were left out: "
            "the version of flowlik that wrote them reads them",
            stacklevel=5,
        )
    return ours


def _column(name: str, values: Sequence[Any]) -> Column:
    if name in _OBJECTS:
        column = np.empty(len(values), dtype=object)
        column[:] = [value or {} for value in values] if name in NESTED else values
        return column
    whole = bool(values) and set(map(type, values)) == {int}
    try:
        return np.array(values, dtype=np.int64 if whole else np.float64)
    except OverflowError:  # a whole number beyond any that a run writes
        return np.full(len(values), np.nan)


def _latest(cells: list[str], statuses: list[str], row: Callable[[int], Any]) -> list[int]:
    """Which rows count: of each cell the last one, skipped ones only where nothing better is known of the cell."""
    last = {cell: number for number, cell in enumerate(cells)}
    kept = sorted(last.values())
    if "skipped" not in statuses:
        return kept
    same = {number: tuple(row(number)[name] for name in SAME_CELL) for number in kept}
    known = {same[number] for number in kept if statuses[number] != "skipped"}
    return [number for number in kept if statuses[number] != "skipped" or same[number] not in known]
