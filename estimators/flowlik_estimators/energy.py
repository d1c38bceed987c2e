"""The log-density that a scalar network says, as it says it (docs/math.md section 12).

Source: BoltzNCE, arXiv 2507.00846, trains such networks by noise contrast; those of the suite regress a closed form.

Cost: one forward. Nothing ties the network to a density: whether its mass is 1 is to be looked at.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run
from flowlik_estimators.registry import register
from flowlik_models.interfaces import HasLogDensity, lacks


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
        return another_end(model, self.eps)

    def _log_prob(self, model: HasLogDensity, x: Tensor, run: Run) -> Estimate:
        return Estimate(log_prob=run.scalar(model.log_density(x, cond=run.cond), "log-density"))


def another_end(model: object, eps: float | None) -> str | None:
    """None, or that the model knows its density at one end of the data only, and that is not ``eps``."""
    own = float(getattr(model, "eps", 0.0))
    if eps is None or eps == own:
        return None
    return f"eps={eps:g}: the model's density is that at eps={own:g} alone; leave eps out"
