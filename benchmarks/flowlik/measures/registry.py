"""Measures of one's own by name: filled by `register`, and by the entry-point group ``flowlik.measures``.

What they measure lands in `extra` of every record, under the names of their columns, which tables, report, glossary,
CSV and comparisons show like those of the suite. A record reads the same where the measure is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flowlik.measures.judged_items import JudgedItems
from flowlik.records.columns import BY_NAME, Column
from flowlik_models.names import unknown
from flowlik_models.plugins import load_plugins

ENTRY_POINT_GROUP = "flowlik.measures"

_REGISTRY: dict[str, Measure] = {}
_LOADED: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Columns, and the function that gives their values, by name, from the items of a cell.

    A column may be left out or NaN where there is no value.
    """

    columns: tuple[Column, ...]
    compute: Callable[[JudgedItems], Mapping[str, float]]


def register(name: str, measure: Measure) -> None:
    """Enter a measure under a name; the same one again changes nothing.

    Raises:
        ValueError: name or column is taken, or a column is none of numbers in `extra`.
    """
    if _REGISTRY.get(name, measure) is not measure:
        raise ValueError(f"a measure {name!r} is already registered")
    taken = {column.name for key, held in _REGISTRY.items() if key != name for column in held.columns}
    for column in measure.columns:
        if column.name in BY_NAME or column.name in taken:
            raise ValueError(f"measure {name!r}: there is a column {column.name!r} already")
        if (column.group, column.kind) != ("extra", "number"):
            raise ValueError(f"measure {name!r}: {column.name!r} has to be a number of the group 'extra'")
    _REGISTRY[name] = measure


def available() -> dict[str, Measure]:
    """All registered measures, name -> measure, sorted by name."""
    _load_entry_points()
    return dict(sorted(_REGISTRY.items()))


def own_columns() -> tuple[Column, ...]:
    """The columns of all registered measures."""
    return tuple(column for measure in available().values() for column in measure.columns)


def computed(items: JudgedItems) -> dict[str, Any]:
    """What all registered measures say of a cell's items, for its `extra`; of one that fails, why there is no value."""
    found: dict[str, Any] = {}
    for measure in available().values():
        names = tuple(column.name for column in measure.columns)
        try:
            found |= _values(measure, names, items)
        except Exception as error:  # a broken plug-in must not cost a cell
            found |= dict.fromkeys(names, " ".join(f"none: {type(error).__name__}: {error}".split()))
    return found


def _values(measure: Measure, names: tuple[str, ...], items: JudgedItems) -> dict[str, float]:
    values = measure.compute(items)
    for name in values:
        if name not in names:
            raise ValueError(unknown("column", name, names))
    return {name: float(value) for name, value in values.items()}


def _load_entry_points() -> None:
    if ENTRY_POINT_GROUP not in _LOADED:
        load_plugins(ENTRY_POINT_GROUP, (), register)
        _LOADED.add(ENTRY_POINT_GROUP)
