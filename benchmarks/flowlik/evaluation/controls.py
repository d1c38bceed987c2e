"""Control rows: what a number is worth is seen beside an estimator that knows almost nothing.

`control-mean` gives every item the mean of the reference over the split and `control-median` its median, oracle
constants: no other has less bias, or a smaller mean |error|. `control-component` gives the mean over the item's true
component, `control-gaussian` the density of the Gaussian with the data's moments. No network is evaluated (NFE 0). See
docs/math.md section 9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy

from flowlik.cells import CONTROLS
from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.tasks.points import chunks
from flowlik.tasks.task import Items, Reference, Task
from flowlik_models.interfaces import Moments
from flowlik_models.moments.moments import FULL_LIMIT
from flowlik_models.numerics.standard_normal import LOG_2PI

ROWS = 1024


def why_not(name: str, items: Items) -> str | None:
    """None where the control can be computed on these items, else why not."""
    if name == "control-component" and items.component is None:
        return "the task has no known components"
    return None


def control_log_prob(name: str, task: Task, items: Items, reference: Reference) -> Array:
    """What the control says of each item, (draws, n) nats."""
    truth = reference.log_prob
    if name == "control-mean":
        return np.full_like(truth, np.nanmean(truth))
    if name == "control-median":
        return np.full_like(truth, np.nanmedian(_over_draws(truth)))
    if name == "control-component":
        assert items.component is not None
        size = np.bincount(items.component)
        total = np.bincount(items.component, weights=truth[0])
        return np.asarray((total / np.maximum(size, 1))[items.component][None])
    density = _data_density(task)
    rows = [density(part.double().flatten(1).numpy()) for part in chunks(items.x, ROWS)]
    return np.concatenate(rows).reshape(truth.shape)


def largest_error(task: Task, items: Items, reference: Reference) -> float:
    """The largest mean |error| in bits/dim of the task's controls on these items."""
    truth = reference.log_prob
    found = [
        accuracy.judged(
            control_log_prob(name, task, items, reference), truth, np.isfinite(truth), dim=task.dim
        )
        for name in CONTROLS
        if why_not(name, items) is None
    ]
    return max(float(np.nanmean(np.abs(one.errors))) for one in found)


def _over_draws(values: Array) -> Array:
    """Means over the draws that are known of the items that have one, (k,)."""
    return np.asarray(np.nanmean(values[:, np.isfinite(values).any(axis=0)], axis=0))


def _data_density(task: Task) -> Callable[[Array], Array]:
    """The density of the Gaussian with the data's moments, at t = 1 - eps."""
    if task.dim <= FULL_LIMIT:
        return gaussian_log_density(*task.moments())
    return low_rank_log_density(task.data_moments(), 1.0 - task.eps)


def low_rank_log_density(moments: Moments, t: float = 1.0) -> Callable[[Array], Array]:
    """The Gaussian with these moments, blurred to t, as a function of points (n, d), (n,) nats; no d x d array."""
    vectors, rest = moments.eigenvectors, moments.rest or 0.0
    values, rest = t**2 * moments.eigenvalues + (1 - t) ** 2, t**2 * rest + (1 - t) ** 2
    others = len(moments.mean) - len(values)
    log_volume = 0.5 * (np.log(values).sum() + (others * np.log(rest) if others else 0.0))
    log_volume += 0.5 * len(moments.mean) * LOG_2PI

    def density(x: Array) -> Array:
        centred = x - t * moments.mean
        inside = centred @ vectors
        outside = np.maximum((centred**2).sum(1) - (inside**2).sum(1), 0.0)
        return np.asarray(-0.5 * ((inside**2 / values).sum(1) + outside / (rest or 1.0)) - log_volume)

    return density


def gaussian_log_density(mean: Array, covariance: Array) -> Callable[[Array], Array]:
    """log N(x; mean, covariance) as a function of points (n, d), (n,) nats."""
    factor = np.linalg.cholesky(covariance)
    log_volume = float(np.log(np.diag(factor)).sum()) + 0.5 * len(mean) * LOG_2PI

    def density(x: Array) -> Array:
        whitened = scipy.linalg.solve_triangular(factor, (x - mean).T, lower=True)
        return np.asarray(-0.5 * (whitened**2).sum(axis=0) - log_volume)

    return density
