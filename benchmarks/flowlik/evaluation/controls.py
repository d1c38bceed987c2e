"""Control rows: what a number is worth is seen beside an estimator that knows almost nothing.

`control-mean` gives every item the mean of the reference over the split and `control-median` its median, oracle
constants: no other has less bias, or a smaller mean |error|. `control-component` gives the mean over the item's true
component, `control-gaussian` the density of the Gaussian with the data's moments. No network is evaluated (NFE 0). See
docs/math.md section 9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.linalg import solve_triangular

from flowlik.cells import CONTROLS
from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.tasks.points import chunks
from flowlik.tasks.task import Items, Reference, Task
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
    density = gaussian_log_density(*task.moments())
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


def gaussian_log_density(mean: Array, covariance: Array) -> Callable[[Array], Array]:
    """log N(x; mean, covariance) as a function of points (n, d), (n,) nats."""
    factor = np.linalg.cholesky(covariance)
    log_volume = float(np.log(np.diag(factor)).sum()) + 0.5 * len(mean) * LOG_2PI

    def density(x: Array) -> Array:
        whitened = solve_triangular(factor, (x - mean).T, lower=True)
        return np.asarray(-0.5 * (whitened**2).sum(axis=0) - log_volume)

    return density
