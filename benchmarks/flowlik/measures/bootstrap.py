"""Studentised bootstrap intervals of means, paired between estimators."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from flowlik.measures.arrays import Array

RESAMPLES = 1000
FEWEST = 20
"""Items below which no interval is given: the scatter of so few says little of the law's tail."""

SMALL = 8.0
"""The tails that an interval leaves out are smaller by this share over n: few items show too little of a skewed law."""

LEAST = 0.1
"""A resample's standard error counts as at least so much of the sample's: where it drew equal items it has none."""

_TAIL = 0.025
_BOOTSTRAP_SEED = 20_240_607
_ROWS = 200


@lru_cache(maxsize=2)
def resample_counts(n: int, resamples: int = RESAMPLES) -> Array:
    """How often each of n items is drawn in each bootstrap resample, (resamples, n); the same for the same n."""
    generator = np.random.default_rng((_BOOTSTRAP_SEED, n))
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def bootstrap_intervals(values: Array, resamples: int = RESAMPLES) -> list[tuple[float, float]]:
    """95 % intervals of the means of the rows of `values`, (k, n), by the studentised bootstrap (bootstrap-t).

    They are quantiles of (resampled mean - mean) / resampled standard error, times the standard error. What is not
    finite is left out; NaN where fewer than `FEWEST` are left.

    >>> ((low, high),) = bootstrap_intervals(np.arange(100.0))
    >>> low < 49.5 < high, 10 < high - low < 13
    (True, True)
    >>> bootstrap_intervals(np.arange(19.0))
    [(nan, nan)]
    """
    values = np.atleast_2d(values)
    known = np.isfinite(values)
    size = known.sum(axis=1)
    if (size < FEWEST).all():
        return [(math.nan, math.nan)] * len(values)
    few = np.maximum(size, 2)
    mean = np.where(known, values, 0.0).sum(axis=1) / few
    offset = np.where(known, values - mean[:, None], 0.0)
    error = np.sqrt((offset**2).sum(axis=1) / (few - 1) / few)
    studentised = _studentised(offset, known.astype(np.float64), error, resamples)
    intervals = []
    for column, centre, width, n in zip(studentised.T, mean, error, size, strict=True):
        if n < FEWEST:
            intervals.append((math.nan, math.nan))
            continue
        tail = _TAIL * (1.0 - SMALL / float(n))
        low, high = np.quantile(column[np.isfinite(column)], (tail, 1.0 - tail)) if width > 0 else (0.0, 0.0)
        intervals.append((float(centre - high * width), float(centre - low * width)))
    return intervals


def _studentised(offset: Array, known: Array, error: Array, resamples: int) -> Array:
    """(resampled mean - mean) / its standard error, (resamples, k), of offsets (k, n) from the mean."""
    counts = resample_counts(offset.shape[1], resamples)
    found = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, resamples, _ROWS):
            part = counts[start : start + _ROWS]
            drawn = part @ known.T
            moved = part @ offset.T / drawn
            variance = (part @ (offset**2).T / drawn - moved**2).clip(0.0) / (drawn - 1)
            found.append(moved / np.maximum(np.sqrt(variance), LEAST * error))
    return np.concatenate(found)
