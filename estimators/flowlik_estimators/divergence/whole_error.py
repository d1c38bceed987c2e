r"""The whole own error of an estimate: probes, rule and solver together (docs/math.md section 2).

The embedded error of an adaptive solver does not say how wrong log p is: measured with dopri5 on mixtures it was 0.05
to 7 times the error. What does is a second solve that is many times more accurate, with the same probes: the two differ
by the solver's and the rule's error of the first. So a call here is two: its own, whose answer stays bit for bit, and a
finer one, with solver tolerances of a hundredth, or twice as many fixed steps and (nodes - 1); the cost of both is
counted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate

USUAL = 0.5
"""Of the mean difference of the call: two solves of an item may agree by accident, and its error is then no less."""


def with_error(
    estimator: Estimator, model: Any, x: Tensor, *, generator: torch.Generator | None = None, **call: Any
) -> Estimate:
    """`Estimator.log_prob`, with ``error`` filled where the estimator knows a finer one of its kind (`finer`).

    ``error`` (batch,) nats is the root of the sum of squares of the probes' standard error and of the difference of
    the two. With the ``dof`` of the standard error (none: the normal distribution) it is judged as that is. It is None
    where there is nothing finer or where a single probe leaves the noise unknown.

    >>> from flowlik_estimators import get
    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gaussian-2d")
    >>> x = model.sample(3, generator=torch.Generator().manual_seed(0))
    >>> out = with_error(get("ode", solver="heun", steps=8, trace="closed"), model, x)
    >>> bool(((out.log_prob - model.log_prob(x)).abs() < 1.96 * out.error).all())
    True
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    state = generator.get_state()
    found = estimator.log_prob(model, x, generator=generator, **call)
    finer = estimator.finer(x.dtype)
    noise_unknown = estimator.params().get("trace") == "hutchinson" and found.stderr is None
    if found.status != "ok" or finer is None or noise_unknown:
        return found
    better, factor = finer
    same = torch.Generator(generator.device)
    same.set_state(state)
    second = better.log_prob(model, x, generator=same, **call)
    cost = found.cost.plus(second.cost)
    if second.status != "ok":
        return replace(found, cost=cost)
    apart = (factor * (second.log_prob - found.log_prob)).detach().abs()
    usual = apart[torch.isfinite(apart)]
    square = apart.square() + (USUAL * (usual.mean() if len(usual) else 0.0)) ** 2
    if found.stderr is not None:
        square = square + found.stderr.detach().square()
    if (
        "quadrature_error" in found.extra
    ):  # where the finer call kept the nodes it does not show the rule's error
        kept = (second.extra["nodes"] == found.extra["nodes"]).double()
        square = square + kept * found.extra["quadrature_error"].square()
    return replace(found, error=square.sqrt(), cost=cost)
