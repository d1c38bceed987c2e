r"""Plain average-velocity map with the trace of its own Jacobian: the published invalid baseline.

MeanFlow (arXiv 2505.13447) steps by ``x <- x + (s - t) u(x, t, s)``. Taking ``(s - t) tr du/dx`` for the
step's log-determinant is what few-step likelihoods without a divergence head report (the baselines of arXiv
2512.02636). It is not a likelihood: the trace of a finite step's Jacobian is the first term of ``log|det(I +
(s - t) du/dx)|`` and no more, off without bound where the data are thin. The suite keeps it as the thing to
beat.

Cost: ``steps`` forwards per sample, and d vjps (exact) or one a probe (hutchinson) for each. Sampling takes
no vector-Jacobian products and gives no log-density, since the value would be invalid.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import pairwise

from torch import Tensor

from flowlik_estimators.call import Estimate, Run, Samples, mean_over_probes
from flowlik_estimators.divergence.products import Traced
from flowlik_estimators.grids import Grid
from flowlik_estimators.registry import register
from flowlik_models.interfaces import FlowMap, lacks


@register("meanflow")
@dataclass(frozen=True, kw_only=True)
class MeanFlow(Traced):
    """The plain-map estimator with ``steps`` steps on ``grid``; trace exact, or hutchinson with probes of noise."""

    family = "flow-map"

    steps: int = 4
    grid: Grid = "uniform"

    def _check(self) -> None:
        super()._check()
        self._at_least_one("steps")

    def supports(self, model: object) -> str | None:
        """Needs the map."""
        return lacks(model, "flow map")

    def _log_prob(self, model: FlowMap, x: Tensor, run: Run) -> Estimate:
        divergence = self.divergence_rule(run)
        log_det = run.zeros()[:, None]
        for t, s in pairwise(run.times(self.grid, self.steps, run.data_end, run.noise_end)):
            u, trace = divergence(partial(_average_velocity, model, run, t, s), x)
            x, log_det = x + (s - t) * u, log_det + (s - t) * trace.double()
            run.stepped()
        mean, stderr = mean_over_probes(run.source_log_prob(x)[:, None] + log_det)
        return Estimate(log_prob=mean, stderr=stderr)

    def _sample(self, model: FlowMap, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        x = x0
        for t, s in pairwise(run.times(self.grid, self.steps, run.noise_end, run.data_end)):
            x = x + (s - t) * _average_velocity(model, run, t, s, x)
            run.stepped()
        return Samples(x=x)


def _average_velocity(model: FlowMap, run: Run, t: float, s: float, x: Tensor) -> Tensor:
    return run.event(model.average_velocity(x, run.at(t), run.at(s), cond=run.cond), "average velocity")
