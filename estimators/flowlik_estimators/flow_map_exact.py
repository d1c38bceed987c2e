r"""The exact density of a discrete flow map: the change of variables of every step.

Each step ``f(x) = x + (s - t) u(x, t, s)`` is a map of R^d to itself, whatever u is, so with x_0 the point
that the steps from data reach,

    log p(x) = log N(x_0; 0, I) + sum_k log |det (I + (s_k - t_k) du/dx)|

is the density that N(0, I) gets when it is carried back through the inverted steps. It is what `meanflow`
approximates by a trace. The value belongs to the map, not to the ODE that the map was trained on: where u is
not the average velocity of a flow, the two differ.

A step is one-to-one only if its determinant keeps one sign. Where it is negative at a point the map has
folded: the value is finite and reported, but the density no longer integrates to 1 (it integrates to the mean
number of points that share an x_0). ``reason`` says of how many rows that is so,
``extra`` per item: ``sign_changes``, the steps with a negative
determinant; ``non_invertible``, those with determinant zero, whose density is 0 and counts as invalid;
``min_log_abs_det``, the smallest log |det| of a step.

Sampling takes the steps from noise to data and their own determinants; for a map that is no flow, stepping up
is not the inverse of stepping down, and the density is that of the samples.

Cost: ``steps`` forwards and ``steps`` d vjps per sample, one forward shared by the vjps of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.divergence.products import jacobian_rows, with_graph
from flowlik_estimators.grids import Grid
from flowlik_estimators.registry import register
from flowlik_models.interfaces import lacks

MAX_DIM = 784
"""28 x 28 pixels: beyond it the d vector-Jacobian products and the d^3 determinant of a step are out of proportion."""

JACOBIAN_NUMBERS = 2**24
"""Entries of the Jacobians in memory at once, 128 MiB in float64: larger batches are cut into pieces."""


@register("flow-map-exact")
@dataclass(frozen=True, kw_only=True)
class FlowMapExact(Estimator):
    """The determinant estimator with ``steps`` steps on ``grid``."""

    family = "flow-map"

    steps: int = 4
    grid: Grid = "uniform"

    def _check(self) -> None:
        self._at_least_one("steps")

    def supports(self, model: object) -> str | None:
        """Needs the map, in at most `MAX_DIM` dimensions."""
        if why := lacks(model, "flow map"):
            return why
        dim = math.prod(getattr(model, "event_shape", ()))
        if dim > MAX_DIM:
            return f"determinants are taken up to {MAX_DIM} dimensions, the model has {dim}"
        return None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        x0, signs, logs = self._walk(model, x, run, start=run.data_end, end=run.noise_end)
        extra = {
            "sign_changes": (signs < 0).sum(1),
            "non_invertible": (signs == 0).sum(1),
            "min_log_abs_det": logs.detach().amin(1),
        }
        return Estimate(log_prob=run.source_log_prob(x0) + logs.sum(1), reason=_folds(signs), extra=extra)

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if not log_prob:
            x = x0
            for t, s in pairwise(run.times(self.grid, self.steps, run.noise_end, run.data_end)):
                x = x + (s - t) * _average_velocity(model, run, slice(None), t, s, x)
                run.stepped()
            return Samples(x=x)
        x, signs, logs = self._walk(model, x0, run, start=run.noise_end, end=run.data_end)
        return Samples(x=x, log_prob=run.source_log_prob(x0) - logs.sum(1), reason=_folds(signs))

    def _walk(
        self, model: Any, x: Tensor, run: Run, *, start: float, end: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x at ``end``; sign and log-modulus of every step's determinant, (batch, steps) float64."""
        piece = max(1, JACOBIAN_NUMBERS // x[0].numel() ** 2)
        signs, logs = [], []
        for t, s in pairwise(run.times(self.grid, self.steps, start, end)):
            rows = [slice(i, i + piece) for i in range(0, run.batch, piece)]
            done = [_step(model, run, part, t, s, x[part]) for part in rows]
            x, sign, log = (torch.cat(pieces) for pieces in zip(*done, strict=True))
            signs.append(sign)
            logs.append(log)
            run.stepped()
        return x, torch.stack(signs, 1), torch.stack(logs, 1)


def _folds(signs: Tensor) -> str | None:
    """One line where a step's determinant is negative, signs (batch, steps)."""
    count = int((signs < 0).any(1).sum())
    return (
        f"the map folds: the determinant of a step is negative at {count} of {len(signs)} rows"
        if count
        else None
    )


def _step(model: Any, run: Run, rows: slice, t: float, s: float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rows after one step, and sign and log-modulus of its determinant."""
    x, u = with_graph(lambda y: _average_velocity(model, run, rows, t, s, y), x, run.differentiable)
    jacobian = torch.stack(list(jacobian_rows(u, x, run.differentiable)), 1).double()
    if not run.differentiable:
        x, u = x.detach(), u.detach()
    identity = torch.eye(jacobian.shape[1], dtype=torch.float64, device=x.device)
    sign, log = torch.linalg.slogdet(identity + (s - t) * jacobian)
    return x + (s - t) * u, sign.detach(), log


def _average_velocity(model: Any, run: Run, rows: slice, t: float, s: float, x: Tensor) -> Tensor:
    cond = run.condition(rows)
    u: Tensor = model.average_velocity(x, run.at(t)[rows], run.at(s)[rows], cond=cond)
    if u.shape != x.shape:
        raise ValueError(
            f"the model's average velocity has shape {tuple(u.shape)}, expected {tuple(x.shape)}"
        )
    return u.to(run.dtype)
