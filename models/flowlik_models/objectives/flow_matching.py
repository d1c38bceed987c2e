"""Flow matching: the field regresses the conditional velocity ``x_1 - x_0`` (docs/math.md section 3)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowlik_models.objectives.batch import Batch


def flow_matching_loss(network: Any, batch: Batch) -> dict[str, Tensor]:
    """Squared error of the field, mean over dimensions, (batch,)."""
    field = network.velocity(batch.x, batch.t, cond=batch.cond)
    assert field.shape == batch.velocity.shape
    return {"velocity": (field - batch.velocity).flatten(1).square().mean(1)}
