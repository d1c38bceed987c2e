"""What one training step sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Points ``x`` (batch, *event) at times ``t`` (batch,), target times ``s`` (batch,), the field's velocity there
    (batch, *event) and, for a divergence head, its divergence or an unbiased estimate of it (batch,) in nats.
    """

    x: Tensor
    t: Tensor
    s: Tensor
    velocity: Tensor
    divergence: Tensor | None = None

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (k,) alone."""
        divergence = None if self.divergence is None else self.divergence[index]
        return Batch(self.x[index], self.t[index], self.s[index], self.velocity[index], divergence)
