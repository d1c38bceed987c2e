"""Change of variables by a network's own inverse, exact in one forward (docs/math.md section 15).

Sources: Rezende and Mohamed 2015, arXiv 1505.05770; TarFlow, Zhai et al. 2024, arXiv 2412.06329.

Cost: one forward. Its mass is 1 by construction; what it may be wrong about is the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.energy import another_end
from flowlik_estimators.registry import register
from flowlik_models.interfaces import can, lacks


@register("exact-flow")
@dataclass(frozen=True, kw_only=True)
class ExactFlow(Estimator):
    """Change of variables by the network's own inverse, ``log N(z; 0, I) + log |det dz/dx|``: exact, in one forward.

    What error there is, is rounding, and that of the network as a model of the data.

    >>> import torch
    >>> from flowlik_estimators import get
    >>> class Doubled:
    ...     event_shape = (2,)
    ...
    ...     def inverse(self, x, *, cond=None):
    ...         return 2 * x, torch.full((len(x),), 2 * 0.6931)
    >>> round(float(get("exact-flow").log_prob(Doubled(), torch.zeros(1, 2)).log_prob), 3)
    -0.452
    """

    family = "exact-flow"
    differentiates = False

    def supports(self, model: object) -> str | None:
        """Needs a network with an exact inverse, at the time of its data."""
        return lacks(model, "exact inverse") or another_end(model, self.eps)

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        z, log_det = model.inverse(x, cond=run.cond)
        normal = run.source_log_prob(run.event(z, "noise"))
        return Estimate(log_prob=normal + run.scalar(log_det, "log-determinant"))

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if not can(model, "exact sampler"):
            return Samples(x=x0, status="refused", reason=lacks(model, "exact sampler"))
        x = run.event(model.from_noise(x0, cond=run.cond), "from_noise")
        run.counts.forwards += (getattr(model, "passes_to_sample", 1) - 1) * run.batch
        if not log_prob:
            return Samples(x=x)
        return Samples(x=x, log_prob=self._log_prob(model, x, run).log_prob)
