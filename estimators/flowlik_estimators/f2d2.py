r"""Few-step likelihood by a joint flow map (F2D2, arXiv 2512.02636).

One network gives the average velocity u and the average divergence D between any two times, so N steps from
data, ``t_0 = 1 > ... > t_N = 0``, give ``x <- x + (t_{k+1} - t_k) u``, ``log p = log N(x_N; 0, I) + sum_k
(t_{k+1} - t_k) D_k``; with the times reversed the same steps draw a sample together with its log-density.

Cost: ``steps`` forwards per sample, no vector-Jacobian products. Biased by the errors of the map and of the divergence
head; it has no standard error of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.grids import Grid
from flowlik_estimators.registry import register
from flowlik_models.interfaces import JointFlowMap, lacks


@register("f2d2")
@dataclass(frozen=True, kw_only=True)
class F2D2(Estimator):
    """The joint-map estimator with ``steps`` steps on ``grid``."""

    family = "joint-flow-map"
    differentiates = False

    steps: int = 4
    grid: Grid = "uniform"

    def _check(self) -> None:
        self._at_least_one("steps")

    def supports(self, model: object) -> str | None:
        """Needs the average divergence together with the average velocity."""
        return lacks(model, "joint flow map")

    def _log_prob(self, model: JointFlowMap, x: Tensor, run: Run) -> Estimate:
        x0, integral = self._walk(model, x, run, start=run.data_end, end=run.noise_end)
        return Estimate(log_prob=run.source_log_prob(x0) + integral)

    def _sample(self, model: JointFlowMap, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        x, integral = self._walk(model, x0, run, start=run.noise_end, end=run.data_end)
        return Samples(x=x, log_prob=run.source_log_prob(x0) - integral if log_prob else None)

    def _walk(
        self, model: JointFlowMap, x: Tensor, run: Run, *, start: float, end: float
    ) -> tuple[Tensor, Tensor]:
        """x at ``end``, and the integral of the divergence from ``start`` to ``end``, (batch,) float64."""
        integral = run.zeros()
        for t, s in pairwise(run.times(self.grid, self.steps, start, end)):
            u, div = model.joint(x, run.at(t), run.at(s), cond=run.cond)
            x = x + (s - t) * run.event(u, "average velocity")
            integral = integral + (s - t) * run.scalar(div, "average divergence")
            run.stepped()
        return x, integral
