"""ESD: the Eulerian condition with the gradient through its derivative (docs/math.md section 3).

``u - (s - t) du/dt`` regresses ``v`` and ``D - (s - t) dD/dt`` regresses ``div v``, d/dt the total derivative in the
source time along ``sg v``. MeanFlow is its stop-gradient form. Source: Boffi et al. 2025 (flow map self-distillation).
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


def eulerian(evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context) -> tuple[Outputs, Outputs]:
    """Outputs less their transported change, against velocity and divergence."""
    rates = total_derivative(
        evaluate, batch, method=context.derivative, end=context.end, delta=context.delta, graph=True
    )
    gap = batch.s - batch.t
    predictions = tuple(
        output - column(gap, rate) * rate for output, rate in zip(outputs, rates, strict=True)
    )
    return predictions, batch.targets()
