"""The fixed-step solver behind converged likelihoods: RK4 in the variable r = log((t + 0.1)/(1 - t + 0.001)).

The nodes are dense near the data, where a trained field is stiff; the divergence is taken at the nodes and integrated
by the cubic spline through them, which is a weighted sum of its values (`weights_of`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik_estimators.divergence.products import Divergence, exact
from flowlik_models.numerics.reparametrised_time import NEAR_NOISE, ReparametrisedTime
from flowlik_models.numerics.runge_kutta import rk4_increments
from flowlik_models.numerics.standard_normal import standard_normal_log_prob

NEAR_DATA = 0.001
"""The rule's variable resolves 1 - t down to about this."""

RULE_TIME = ReparametrisedTime(NEAR_DATA, NEAR_NOISE)


def times_of(steps: int, end: float) -> tuple[Array, Array, Array]:
    """Nodes of the rule from `end` down to 0: r, t(r) and dt/dr, (steps + 1,) each."""
    r = np.linspace(RULE_TIME.at(end), RULE_TIME.at(0.0), steps + 1)
    t = np.clip(RULE_TIME.time(r), 0.0, end)
    t[0], t[-1] = end, 0.0
    return r, t, RULE_TIME.slope(r)


@lru_cache(maxsize=8)
def weights_of(steps: int, end: float) -> Array:
    """Weights (steps + 1,) of the nodes: sum_k w_k f(t_k) is the spline's integral of f over t in [0, end]."""
    r, _, slope = times_of(steps, end)
    # r falls from data to noise; the spline wants it rising, and then gives the integral from noise to data.
    once = scipy.interpolate.CubicSpline(r[::-1], np.eye(steps + 1)[::-1], axis=0).integrate(r[-1], r[0])
    return np.asarray(once * slope)


def states(model: Any, x: Tensor, steps: int, end: float = 1.0) -> Iterator[tuple[float, Tensor]]:
    """Time and state of every node on the way from x at t = `end` to the noise, 4 forwards a step.

    The state (batch, *event) is float64; the network sees x's dtype.
    """
    r, t, _ = times_of(steps, end)
    step = float(r[1] - r[0])

    def rate(y: Tensor, where: float) -> tuple[Tensor]:
        time = x.new_full((len(y),), float(np.clip(RULE_TIME.time(where), 0.0, end)))
        with torch.no_grad():
            v: Tensor = model.velocity(y.to(x.dtype), time)
        return (v.double() * float(RULE_TIME.slope(where)),)

    y = x.double()
    for k in range(steps + 1):
        yield float(t[k]), y
        if k == steps:
            return
        y = y + rk4_increments(rate, y, step, (r[k], r[k] + 0.5 * step, r[k] + step))[0]


def converged_log_prob(model: Any, x: Tensor, steps: int, end: float = 1.0) -> Array:
    """log p at t = `end` of every row of x by the fixed rule, (batch,) nats.

    Cost: 4 forwards a step, and d vjps at each node.
    """
    return np.asarray(log_prob_columns(model, x, steps, end, exact)[:, 0])


def log_prob_columns(model: Any, x: Tensor, steps: int, end: float, divergence: Divergence) -> Array:
    """The same with any rule for the divergence, a value for each of its columns, (batch, columns) nats."""
    r, _, slope = times_of(steps, end)
    divergences = []
    for time, y in states(model, x, steps, end):
        now = x.new_full((len(x),), time)
        _, columns = divergence(lambda z, now=now: model.velocity(z, now), y.to(x.dtype))  # type: ignore[misc]
        divergences.append(columns.double().cpu().numpy())
    integrand = np.stack(divergences) * slope[:, None, None]
    integral = scipy.interpolate.CubicSpline(r[::-1], integrand[::-1], axis=0).integrate(r[-1], r[0])
    return np.asarray(log_source(y)[:, None] - integral)


def log_source(y: Tensor) -> Array:
    """log N(y; 0, I) of every row, (batch,) nats."""
    return np.asarray(standard_normal_log_prob(y).cpu().numpy())
