"""Lines of a figure in as many panels as it takes to tell them apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import pandas as pd

from flowlik.report.figures.style import LINE

MOST: Final = 10
"""Lines that can be told apart in one panel."""

INTEGRATED: Final = ("ode", "whitened-ode")
"""Estimators that integrate a field, by name."""


def in_panels(shown: pd.DataFrame, most: int = MOST) -> list[tuple[str, pd.DataFrame]]:
    """The rows that share a panel, with words for them: all, or parts of at most `most` lines.

    Exact fields and networks part first, then among either ODEs and other estimators; what is still more goes on in
    further panels.
    """
    parts = [("", shown)]
    for kind in (_field, _way):
        parts = [part for words, rows in parts for part in _split(words, rows, kind, most)]
    return [part for words, rows in parts for part in _pieces(words, rows, most)]


def lines(shown: pd.DataFrame) -> int:
    """How many lines the rows make."""
    return int(shown.groupby(LINE).ngroups)


def _field(shown: pd.DataFrame) -> pd.Series[str]:
    return shown["model"].map(lambda model: "exact field" if model == "closed-form" else "networks")


def _way(shown: pd.DataFrame) -> pd.Series[str]:
    return shown["estimator"].map(lambda name: "ODE" if name in INTEGRATED else "other estimators")


def _split(
    words: str, rows: pd.DataFrame, kind: Callable[[pd.DataFrame], pd.Series[str]], most: int
) -> list[tuple[str, pd.DataFrame]]:
    if lines(rows) <= most or kind(rows).nunique() < 2:
        return [(words, rows)]
    names = kind(rows)
    return [(", ".join(filter(None, (words, name))), rows[names == name]) for name in dict.fromkeys(names)]


def _pieces(words: str, rows: pd.DataFrame, most: int) -> list[tuple[str, pd.DataFrame]]:
    """Lines in their order, evenly over as few panels as hold them."""
    place, count = rows.groupby(LINE, sort=False).ngroup(), lines(rows)
    panels = -(-count // most)
    if panels < 2:
        return [(words, rows)]
    each = -(-count // panels)
    names = [f"{words} ({k + 1} of {panels})".strip() for k in range(panels)]
    return [(name, rows[place // each == k]) for k, name in enumerate(names)]
