"""Right-hand sides of x and the integral of its divergence together: exact, closed form, or by probes."""

from __future__ import annotations

from itertools import count
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.call import Run
from flowlik_estimators.divergence import skewness
from flowlik_estimators.divergence.law import Law, ProbeOptions
from flowlik_estimators.divergence.pilot import Pilot
from flowlik_estimators.divergence.products import exact, hutch_plus_plus, hutchinson_with_products
from flowlik_estimators.integration.torchdiffeq_solve import Evaluate, Solve
from flowlik_models.interfaces import velocity_and_divergence
from flowlik_models.numerics.streams import PROBE_STREAM, STAGE_STREAM

PILOT_NODES = 17
"""Nodes at which a pilot looks where one law serves the whole path."""


def without_probes(trace: str, model: Any, run: Run) -> Evaluate:
    """Velocity and divergence (batch, 1), by d vector-Jacobian products (``trace`` exact) or by the model's own
    (closed)."""
    if trace == "closed":
        return _closed(model, run)
    return lambda x, t: exact(lambda y: run.velocity(model, y, t), x, differentiable=run.differentiable)


def with_probes(
    options: ProbeOptions, solve: Solve, model: Any, run: Run, *, redraw: bool = False
) -> tuple[Evaluate, Tensor | None]:
    """Velocity and one estimate of the divergence a probe (batch, probes), the probes being fixed along the path.

    ``redraw``: drawn anew for every evaluation, in the order of evaluations; their errors average out along the path.

    Where there are probes enough to judge how skew they are (`flowlik_estimators.divergence.skewness`), a third part
    are those forms (batch, forms); the tensor beside are the overlaps of the pairs.
    """
    basis, coefficient = options.basis, 1.0
    if options.automatic:
        basis, coefficient = Pilot(options, solve, model, run, nodes=PILOT_NODES).of_the_whole_path()
    assert basis != "auto"
    coefficient = 0.0 if options.control == "none" else coefficient
    law = Law(options, model, run, basis)
    if options.noise == "hutch++":
        return _deflated(law, options.probes // 3, model, run), None
    if redraw:
        return _redrawn(law, options, coefficient, model, run), None
    probes = law.draw(run, options.probes, PROBE_STREAM)
    crossed = basis == "pixel" and skewness.form_count(options.probes) > 0
    squares = None if coefficient == 0.0 else law.squares(probes)
    flat, free = probes.flatten(2), options.noise == "gaussian"

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        value, columns, products = hutchinson_with_products(
            lambda y: run.velocity(model, y, t), x, probes, differentiable=run.differentiable, keep=crossed
        )
        columns = law.controlled(columns, squares, coefficient, t[:1])
        if not crossed:
            return value, columns
        left = law.controlled_products(torch.stack(products, 1), flat, coefficient, t[:1])
        return value, columns, skewness.forms(left, flat, free=free)

    return evaluate, skewness.overlaps(flat, free=free) if crossed else None


def _deflated(law: Law, count: int, model: Any, run: Run) -> Evaluate:
    """Velocity and ``count`` divergence columns by three times as many products."""
    probes = law.draw(run, 2 * count, PROBE_STREAM)
    return lambda x, t: hutch_plus_plus(
        lambda y: run.velocity(model, y, t), x, probes, differentiable=run.differentiable
    )


def _redrawn(law: Law, options: ProbeOptions, coefficient: float, model: Any, run: Run) -> Evaluate:
    """Velocity and a divergence column a probe, with other probes at every evaluation."""
    stages = count(STAGE_STREAM)

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        probes = law.draw(run, options.probes, next(stages))
        value, columns, _ = hutchinson_with_products(
            lambda y: run.velocity(model, y, t), x, probes, differentiable=run.differentiable, keep=False
        )
        squares = None if coefficient == 0.0 else law.squares(probes)
        return value, law.controlled(columns, squares, coefficient, t[:1])

    return evaluate


def _closed(model: Any, run: Run) -> Evaluate:
    """Velocity and the model's own divergence, by one evaluation where the model offers both at once."""

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v, div = velocity_and_divergence(model, x, t, cond=run.cond)
        return run.event(v, "velocity"), run.scalar(div, "divergence")[:, None]

    return both
