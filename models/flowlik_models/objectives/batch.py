"""The batch of a training step, and the type of the field that teaches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

TeacherField = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Velocity (batch, *event) and, for a joint map, divergence (batch,) at points x (batch, *event), t (batch,)."""


@dataclass(frozen=True)
class Batch:
    """Points ``x`` (batch, *event) at times ``t`` (batch,), target times ``s`` (batch,), the field's velocity there
    (batch, *event) and, for a divergence head, its divergence or an unbiased estimate of it (batch,) in nats.

    Rows marked in ``direct`` (batch,) hold averages from t to s instead, read off solved trajectories. ``cond``: what
    each row is conditioned on, (batch, ...).
    """

    x: Tensor
    t: Tensor
    s: Tensor
    velocity: Tensor
    divergence: Tensor | None = None
    direct: Tensor | None = None
    cond: Tensor | None = None

    def targets(self) -> tuple[Tensor, ...]:
        """Velocity and, where the batch has it, divergence: the targets on the diagonal and of direct rows."""
        return (self.velocity,) if self.divergence is None else (self.velocity, self.divergence)

    def moving(self) -> Tensor:
        """Indices of the rows whose target lacks the derivative term: s differs from t and no average is known."""
        moving = self.s != self.t
        return (moving if self.direct is None else moving & ~self.direct).nonzero()[:, 0]

    def joined(self, other: Batch) -> Batch:
        """This batch followed by another, whose rows are direct."""
        divergence = None
        if self.divergence is not None and other.divergence is not None:
            divergence = torch.cat((self.divergence, other.divergence))
        direct = torch.cat((torch.zeros_like(self.t), torch.ones_like(other.t))).bool()
        return Batch(
            torch.cat((self.x, other.x)),
            torch.cat((self.t, other.t)),
            torch.cat((self.s, other.s)),
            torch.cat((self.velocity, other.velocity)),
            divergence,
            direct,
        )

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``change`` applied to all its tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(self, **{name: change(value) for name, value in values.items() if value is not None})

    def cut(self, index: Tensor) -> Batch:
        """The rows ``index`` (k,) of all its tensors."""
        return self.each(lambda value: value[index])

    def rows(self, index: Tensor) -> Batch:
        """The rows ``index`` (k,) alone: they no longer say which of them were direct."""
        return replace(self.cut(index), direct=None)
