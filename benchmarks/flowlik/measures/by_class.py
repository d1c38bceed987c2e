"""Bits/dim and errors of each class, where items have labels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import bootstrap_intervals
from flowlik.measures.judged_items import JudgedItems

MOST_CLASSES = 100
"""Labels of more values are no classes that a table could show."""


def by_class(items: JudgedItems, labels: NDArray[np.int64]) -> dict[str, list[Any]]:
    """Means over the items of each class, in bits/dim, with 95 % intervals (NaN below 20 items).

    Args:
        items: n judged items.
        labels: (n,) whole numbers.

    Returns:
        ``label``, ``items`` (how many), ``bpd`` and ``mae``, the mean |error| (NaN without a reference), each with
        ``_lo`` and ``_hi``: a list over the classes by label. Nothing for more than `MOST_CLASSES` of them.

    >>> bpd = np.array([1.0, 1.0, 3.0])
    >>> found = by_class(
    ...     JudgedItems(bpd=bpd, ref=bpd - 1, errors=np.ones(3), stderr=None, dim=2), np.array([4, 4, 7])
    ... )
    >>> found["label"], found["items"], found["bpd"], found["mae"]
    ([4, 7], [2, 1], [1.0, 3.0], [1.0, 1.0])
    """
    classes, counts = np.unique(labels, return_counts=True)
    if len(classes) > MOST_CLASSES:
        return {}
    found: dict[str, list[Any]] = {"label": classes.tolist(), "items": counts.tolist()}
    own = labels == classes[:, None]
    for name, values in (("bpd", items.bpd), ("mae", np.abs(items.errors))):
        rows = np.where(own, values, np.nan)
        found[name] = [_mean(row) for row in rows]
        low, high = zip(*bootstrap_intervals(rows), strict=True)
        found |= {f"{name}_lo": list(low), f"{name}_hi": list(high)}
    return found


def _mean(values: Array) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")
