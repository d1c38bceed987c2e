"""Whole-density checks: values right at the items may still belong to no density.

The mass is taken on a grid in two dimensions, and by importance sampling above; a flow map goes to the noise and back;
an estimator that also samples must say the same of a point on both ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.cells import Cell
from flowlik.evaluation.batching.batches import (
    DivergedError,
    evaluate,
    evaluate_plain,
    sample_reason,
    sample_with_log_prob,
    with_bounded_evaluations,
)
from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.tasks.grid import Grid
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import Items, Reference, Task
from flowlik_estimators.grids import time_grid
from flowlik_models.interfaces import can

BROAD = 1.1  # standard deviations of the proposal's Gaussian third, in those of the data
BROAD_KEY = 90_125
AGREEMENT_ITEMS = 128
FAR = 0.5
"""An item is elsewhere after a cycle where it ends so many standard deviations of the data away."""

FEW_FAR = 0.01
"""The share of such items from which a record says so."""


def grid_density(
    cell: Cell, task: Task, model: Any, grid: Grid, row: dict[str, Any]
) -> dict[str, NDArray[Any]]:
    """Evaluate the task's grid: `mass` goes into the row, the picture and its axes are returned."""
    shape = (len(grid.y), len(grid.x))
    try:
        values = evaluate_plain(with_bounded_evaluations(cell, row), model, grid.points)
    except DivergedError as error:
        row["extra"]["density"] = f"none: {error}"
        return {}
    row["mass"] = accuracy.mass(values, grid.cell_area)
    if (missing := float(np.isnan(values).mean())) > 0:
        row["extra"]["density_invalid_share"] = missing
    arrays: dict[str, NDArray[Any]] = {
        "density": values.astype(np.float32).reshape(shape),
        "grid_x": grid.x,
        "grid_y": grid.y,
    }
    truth = task.log_density(grid.points, 1.0 - row["eps"])
    if truth is not None:
        arrays["density_ref"] = truth.astype(np.float32).reshape(shape)
    return arrays


def importance_mass(
    cell: Cell,
    task: Task,
    model: Any,
    items: Items,
    log_prob: Array,
    reference: Reference,
    row: dict[str, Any],
) -> None:
    """`mass` and `mass_se` by importance sampling, for tasks without a grid.

    Where the truth is known everywhere the proposal is two thirds the items themselves and one third draws of a
    Gaussian with the data's moments, somewhat broadened, so that mass off the data is seen; the weights are balanced
    over both. Otherwise the items alone are the proposal, which sees no mass where the reference has none; `extra` says
    so. The noise of a stochastic estimator biases `exp` upwards by half its variance.
    """
    n = items.n
    estimate, truth = log_prob[0], reference.log_prob[0]
    end = 1.0 - row["eps"]
    if task.log_density(whole(items.x[:1]), end) is None:
        known = np.isfinite(truth)
        # only draws of the reference itself are draws of the density that `truth` is
        if cell.options.split == "teacher-samples" and known.sum() > 1:
            row["extra"]["mass_on"] = "items"
            row["mass"], row["mass_se"] = _mean_exp([(estimate - truth)[known]])
        return
    moments = task.data_moments()
    mean, values, vectors = moments.mean, moments.eigenvalues, moments.eigenvectors
    noise = np.random.default_rng(BROAD_KEY).standard_normal((n // 2, task.dim))
    broad = mean + noise * BROAD * np.sqrt(values) @ vectors.T
    points = torch.from_numpy(broad).reshape(-1, *task.event_shape)
    try:
        elsewhere = evaluate_plain(with_bounded_evaluations(cell, row), model, points)
    except DivergedError as error:
        row["extra"]["density"] = f"none: {error}"
        return

    def proposal(x: Tensor) -> Array:
        flat = (x.flatten(1).double().numpy() - mean) @ vectors
        size = flat**2 / (BROAD**2 * values) + np.log(2 * math.pi * BROAD**2 * values)
        exact = task.log_density(x, end)
        assert exact is not None
        share = len(broad) / (n + len(broad))
        joined: Array = np.logaddexp(math.log1p(-share) + exact, math.log(share) - 0.5 * size.sum(1))
        return joined

    row["mass"], row["mass_se"] = _mean_exp(
        [estimate - proposal(whole(items.x[:n])), elsewhere - proposal(points)]
    )


def _mean_exp(strata: list[Array]) -> tuple[float, float]:
    """Mean of exp over all strata and its standard error from the variance within each; NaN counts as nothing."""
    total = sum(map(len, strata))
    with np.errstate(over="ignore", invalid="ignore"):
        weights = [np.nan_to_num(np.exp(part), nan=0.0, posinf=math.inf) for part in strata]
        variance = sum(len(w) * float(w.var(ddof=1)) for w in weights)
        return float(sum(w.sum() for w in weights)) / total, math.sqrt(variance) / total


def agreement(cell: Cell, model: Any, dim: int) -> float | None:
    """Mean |difference| in bits/dim between what an estimator says of its own samples on the way out and back.

    None where the family cannot sample with a likelihood.
    """
    x, there = sample_with_log_prob(cell, model, AGREEMENT_ITEMS)
    if there is None or not bool(torch.isfinite(x).all()):
        return None
    ids = torch.arange(len(x))
    cond = get_task(cell.task).for_model(model).sample_conditions(cell.options.split, ids)
    back = evaluate(cell, model, x, ids, cond).log_prob
    return float(np.mean(np.abs(back - there))) / (dim * math.log(2.0))


def cycle_error(estimator: Any, model: Any, x: Tensor, cond: Tensor | None = None) -> float | None:
    """The mean of `cycle_errors`, None where there are none."""
    errors = cycle_errors(estimator, model, x, cond)
    return None if errors is None else float(errors.mean())


def not_back(errors: Tensor, x: Tensor) -> str | None:
    """One line where a share of the items does not come back to itself; a map that folds takes them elsewhere."""
    spread = float((x - x.mean(0)).flatten(1).square().sum(1).mean().sqrt())
    far = int((~(errors <= FAR * spread)).sum())
    if far < FEW_FAR * len(x):
        return None
    return (
        f"{far} of {len(x)} items do not come back from the noise, but more than half the data's standard deviation "
        "away, as where a map folds"
    )


def folds_of_samples(cell: Cell, model: Any) -> str | None:
    """What a generator whose samples alone are asked for says of its determinants at the first of them."""
    if cell.estimator.params().get("route") != "own-samples":
        return None
    return sample_reason(cell, model, AGREEMENT_ITEMS)


def cycle_errors(estimator: Any, model: Any, x: Tensor, cond: Tensor | None = None) -> Tensor | None:
    """Euclidean distances (n,) between x and its image after data -> noise -> data in the estimator's own steps.

    None where estimator or model is no flow map.
    """
    steps = estimator.params().get("steps")
    step = _map_step(model, cond)
    if estimator.family not in ("flow-map", "joint-flow-map") or not isinstance(steps, int) or step is None:
        return None

    grid = estimator.params().get("grid", "uniform")
    times = [float(t) for t in time_grid(grid, steps, float(estimator.data_end(model)), 0.0)]
    y = x
    with torch.no_grad():
        for path in (times, times[::-1]):
            for t, s in pairwise(path):
                y = y + (s - t) * step(y, y.new_full((len(y),), t), y.new_full((len(y),), s))
    distances: Tensor = (y - x).flatten(1).norm(dim=1)
    return distances


def _map_step(model: Any, cond: Tensor | None) -> Callable[[Tensor, Tensor, Tensor], Tensor] | None:
    given = {} if cond is None else {"cond": cond}
    if can(model, "flow map"):
        average: Callable[[Tensor, Tensor, Tensor], Tensor] = partial(model.average_velocity, **given)
        return average
    if can(model, "joint flow map"):
        return lambda x, t, s: model.joint(x, t, s, **given)[0]
    return None
