"""MeanFlow and MeanFlow-F2D2: the Eulerian condition with a stopped gradient (docs/math.md section 3).

``u`` regresses ``sg[v + (s - t) du/dt]`` and ``D`` regresses ``sg[div v + (s - t) dD/dt]``, d/dt the total
derivative in the source time along v. Sources: Geng et al. 2025 (MeanFlow) and arXiv 2512.02636 (F2D2).
"""

from __future__ import annotations

from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.conditions.condition import (
    Context,
    Evaluate,
    Outputs,
    column,
    total_derivative,
)


def meanflow(evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context) -> tuple[Outputs, Outputs]:
    """The network's outputs against the stopped Eulerian targets."""
    rates = total_derivative(evaluate, batch, method=context.derivative, end=context.end, delta=context.delta)
    gap = batch.s - batch.t
    targets = tuple(
        value + column(gap, rate) * rate for value, rate in zip(batch.targets(), rates, strict=True)
    )
    return outputs, targets
