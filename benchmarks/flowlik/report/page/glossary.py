"""What costs, measures and controls mean, in a reader's words; costs and measures out of the table of columns."""

from __future__ import annotations

from itertools import groupby
from typing import Final

from flowlik.measures.registry import own_columns
from flowlik.records.columns import DERIVED, TABLE


def costs() -> list[tuple[str, str]]:
    """Names of the costs that tables show, each with what it means."""
    return _entries("cost")


def measures() -> list[tuple[str, str]]:
    """The same of accuracy and samples, and of registered measures."""
    return _entries("accuracy", "samples", "extra")


def _entries(*groups: str) -> list[tuple[str, str]]:
    """Neighbours of one meaning share an entry."""
    columns = [
        column for column in (*TABLE, *DERIVED, *own_columns()) if column.head and column.group in groups
    ]
    return [
        (", ".join(column.head for column in alike), meaning)
        for meaning, alike in groupby(columns, key=lambda column: column.meaning)
    ]


CONTROLS: Final[tuple[tuple[str, str], ...]] = (
    ("control-mean", "gives every item the mean of the reference over the split: an oracle, but a constant"),
    (
        "control-median",
        "gives every item the median of the reference: no constant has a smaller mean |error|",
    ),
    ("control-component", "gives the mean of the reference over the item's true mixture component"),
    (
        "control-gaussian",
        "gives the density of the Gaussian with the data's mean and covariance: no network at all",
    ),
)
