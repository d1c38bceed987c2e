"""LSD and LSD-F2D2: the Lagrangian condition, differentiated in the target time (docs/math.md section 3).

``u + (s - t) du/ds`` regresses ``sg v(Phi(x, t, s), s)`` and ``D + (s - t) dD/ds`` regresses ``sg div v`` there, v the
teacher's field or the averaged network's own diagonal. Source: Boffi et al. 2025 (flow map self-distillation).
"""

from __future__ import annotations

from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.conditions.condition import (
    Context,
    Evaluate,
    Outputs,
    moved,
    target_derivative,
)


def lagrangian(
    evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context
) -> tuple[Outputs, Outputs]:
    """The map's change with its target time against the field where the map arrives."""
    predictions = target_derivative(evaluate, batch, context)
    arrived = moved(batch.x, batch.t, batch.s, outputs[0].detach())
    return predictions, context.field(arrived, batch.s)
