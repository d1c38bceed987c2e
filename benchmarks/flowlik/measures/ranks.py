"""Ranks and Student's quantile, as scipy.stats has them: that package alone takes half a second to load."""

from __future__ import annotations

import numpy as np
import scipy

from flowlik.measures.arrays import Array


def ranks(values: Array) -> Array:
    """Ranks from 1 of (n,) values; equal ones share their mean rank.

    >>> ranks(np.array([0.3, 0.1, 0.3])).tolist()
    [2.5, 1.0, 2.5]
    """
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    middle: Array = np.cumsum(counts) - (counts - 1) / 2
    return middle[which]


def student_quantile(level: float, degrees: Array | float) -> Array:
    """Quantile of Student's t with that many degrees of freedom, of the normal distribution where they are infinite.

    >>> student_quantile(0.975, np.array([1.0, np.inf])).round(3).tolist()
    [12.706, 1.96]
    """
    degrees = np.asarray(degrees, dtype=np.float64)
    known = scipy.special.stdtrit(np.where(np.isinf(degrees), 1.0, degrees), level)
    quantile: Array = np.where(np.isinf(degrees), scipy.special.ndtri(level), known)
    return quantile
