"""The log-density that a network says of itself, in one forward (docs/math.md sections 12 and 15).

Sources: of scalar networks BoltzNCE, arXiv 2507.00846, which trains them by noise contrast (those of the suite regress
a closed form); of exact flows Rezende and Mohamed 2015, arXiv 1505.05770; TarFlow, arXiv 2412.06329.

Cost: one forward. Nothing ties a scalar network to a density: whether its mass is 1 is to be looked at. That of an
exact flow is, by construction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.registry import register
from flowlik_models.interfaces import HasLogDensity, can, lacks


@register("energy")
@dataclass(frozen=True, kw_only=True)
class Energy(Estimator):
    """The network's own log-density, in one forward; it knows that of its data end and no other.

    >>> import torch
    >>> from flowlik_estimators import get
    >>> from flowlik_models.zoo import load_model
    >>> x = load_model("gmm-2d", "closed-form").sample(3, generator=torch.Generator().manual_seed(0))
    >>> get("energy").log_prob(load_model("gmm-2d", "energy"), x).cost.forwards
    1.0
    """

    family = "scalar"
    differentiates = False

    def supports(self, model: object) -> str | None:
        """Needs a scalar network, at the time for which it was trained."""
        if why := lacks(model, "scalar log-density"):
            return why
        return _another_end(model, self.eps)

    def _log_prob(self, model: HasLogDensity, x: Tensor, run: Run) -> Estimate:
        return Estimate(log_prob=run.scalar(model.log_density(x, cond=run.cond), "log-density"))


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
        return lacks(model, "exact inverse") or _another_end(model, self.eps)

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


def _another_end(model: object, eps: float | None) -> str | None:
    """None, or that the model knows its density at one end of the data only, and that is not ``eps``."""
    own = float(getattr(model, "eps", 0.0))
    if eps is None or eps == own:
        return None
    return f"eps={eps:g}: the model's density is that at eps={own:g} alone; leave eps out"
