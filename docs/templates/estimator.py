"""An estimator: midpoint steps from data to noise (docs/math.md section 1)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from torch import Tensor

from flowlik_estimators import Estimate, Estimator, Run, standard_normal_log_prob


@dataclass(frozen=True, kw_only=True)
class MidpointRule(Estimator):
    """Midpoint steps where the divergence comes with the velocity. Cost: two evaluations a step."""

    family = "ode"  # methods of one family stand together in tables and figures
    exact_to: ClassVar[float] = (
        0.05  # nats on a Gaussian with the defaults; leave out where it is not exact there
    )

    steps: int = 64  # a field is a parameter: midpoint-rule[steps=8|32]

    def _check(self) -> None:
        self._at_least_one("steps")  # whole numbers and choices are checked by their types

    def supports(self, model: object) -> str | None:
        """None, or why not: the record then says `refused`. Name every method that is called below."""
        return None if hasattr(model, "velocity_and_divergence") else "needs velocity_and_divergence"

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        log_det = run.zeros()  # float64, one a row: sums of many small steps
        for t, s in pairwise(run.times("uniform", self.steps, run.data_end, 0.0)):
            halfway = x + (s - t) / 2 * run.velocity(model, x, run.at(t))
            v, div = model.velocity_and_divergence(halfway, run.at((t + s) / 2), cond=run.cond)
            x = x + (s - t) * run.event(v, "velocity")  # `event` and `scalar` check the shapes of answers
            log_det = log_det + (s - t) * run.scalar(div, "divergence")
        return Estimate(log_prob=standard_normal_log_prob(x) + log_det)  # nats at t = 1 - eps
