"""Right-hand sides of x and the integral of its divergence together: exact, closed form, or by probes."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_estimators.call import Run
from flowlik_estimators.divergence.law import Law, ProbeOptions
from flowlik_estimators.divergence.pilot import Pilot
from flowlik_estimators.divergence.products import exact, hutchinson
from flowlik_estimators.integration.torchdiffeq_solve import Evaluate, Solve
from flowlik_models.interfaces import velocity_and_divergence
from flowlik_models.numerics.streams import PROBE_STREAM

PILOT_NODES = 17
"""Nodes at which a pilot looks where one law serves the whole path."""


def without_probes(trace: str, model: Any, run: Run) -> Evaluate:
    """Velocity and divergence (batch, 1), by d vector-Jacobian products (``trace`` exact) or by the model's own
    (closed)."""
    if trace == "closed":
        return _closed(model, run)
    return lambda x, t: exact(lambda y: run.velocity(model, y, t), x, differentiable=run.differentiable)


def with_probes(options: ProbeOptions, solve: Solve, model: Any, run: Run) -> Evaluate:
    """Velocity and one estimate of the divergence a probe (batch, probes), the probes being fixed along the path."""
    basis, coefficient = options.basis, 1.0
    if options.automatic:
        basis, coefficient = Pilot(options, solve, model, run, nodes=PILOT_NODES).of_the_whole_path()
    assert basis != "auto"
    law = Law(options, model, run, basis)
    probes = law.draw(run, options.probes, PROBE_STREAM)
    squares = None if options.control == "none" or coefficient == 0.0 else law.squares(probes)

    def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        value, columns = hutchinson(
            lambda y: run.velocity(model, y, t), x, probes, differentiable=run.differentiable
        )
        return value, law.controlled(columns, squares, coefficient, t[:1])

    return evaluate


def _closed(model: Any, run: Run) -> Evaluate:
    """Velocity and the model's own divergence, by one evaluation where the model offers both at once."""

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        v, div = velocity_and_divergence(model, x, t, cond=run.cond)
        return run.event(v, "velocity"), run.scalar(div, "divergence")[:, None]

    return both
