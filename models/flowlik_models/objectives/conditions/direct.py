"""Direct regression on averages read off a teacher's solved trajectories (docs/training.md).

Rows whose averages are known never reach a condition, so this one only says what to do where they are not: nothing is
known of such a row, and a recipe of this objective must not draw any.
"""

from __future__ import annotations

from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.conditions.condition import Context, Evaluate, Outputs


def direct(evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context) -> tuple[Outputs, Outputs]:
    """Raises ValueError: a row off the diagonal came without its averages."""
    raise ValueError(f"direct regression got {len(batch.t)} rows off the diagonal without their averages")
