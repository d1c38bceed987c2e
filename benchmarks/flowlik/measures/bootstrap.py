"""Percentile bootstrap intervals, paired between estimators."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from flowlik.measures.arrays import Array

RESAMPLES = 1000
_BOOTSTRAP_SEED = 20_240_607


@lru_cache(maxsize=2)
def resample_counts(n: int, resamples: int = RESAMPLES) -> Array:
    """How often each of n items is drawn in each bootstrap resample, (resamples, n); the same for the same n."""
    generator = np.random.default_rng((_BOOTSTRAP_SEED, n))
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(np.float64)


def bootstrap_intervals(values: Array, resamples: int = RESAMPLES) -> list[tuple[float, float]]:
    """95 % percentile intervals of the means of the rows of `values`, (k, n); what is not finite is left out.

    >>> ((low, high),) = bootstrap_intervals(np.arange(100.0))
    >>> low < 49.5 < high, 10 < high - low < 13
    (True, True)
    """
    values = np.atleast_2d(values)
    if values.shape[1] == 0:
        return [(math.nan, math.nan)] * len(values)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    totals, sizes = [], []
    counts = resample_counts(values.shape[1], resamples)
    for start in range(0, resamples, 200):
        part = counts[start : start + 200]
        totals.append(part @ filled.T)
        sizes.append(part @ known.T.astype(np.float64))
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.concatenate(totals) / np.concatenate(sizes)
    intervals = []
    for column in means.T:
        column = column[np.isfinite(column)]
        low, high = np.quantile(column, (0.025, 0.975)) if len(column) else (math.nan, math.nan)
        intervals.append((float(low), float(high)))
    return intervals
