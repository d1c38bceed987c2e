"""Shortcut and Shortcut-F2D2: the semigroup condition, a step regresses two shorter ones (docs/math.md section 3).

``(s - t) u(x, t, s)`` regresses ``sg[(r - t) u(x, t, r) + (s - r) u(Phi(x, t, r), r, s)]`` and D the same, by the
averaged network in evaluation mode. Sources: Frans et al. 2024 (Shortcut, r the midpoint) and arXiv 2512.02636
(F2D2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowlik_models.objectives.batch import Batch
from flowlik_models.objectives.conditions.condition import Context, Evaluate, Outputs, column, moved


def semigroup(
    evaluate: Evaluate, outputs: Outputs, batch: Batch, context: Context
) -> tuple[Outputs, Outputs]:
    """The network's outputs against those of two shorter steps."""
    x, t, s = batch.x, batch.t, batch.s
    with torch.no_grad():
        share = _cut(t, context)
        r = t + share * (s - t)
        # the shortest steps are halved no further: both halves are the field itself
        short = (s - t).abs() <= context.smallest
        first = context.target(x, t, torch.where(short, t, r))
        middle = moved(x, t, r, first[0])
        second = context.target(middle, r, torch.where(short, r, s))
        targets = tuple(
            column(share, a) * a + column(1 - share, b) * b for a, b in zip(first, second, strict=True)
        )
    return outputs, targets


def _cut(t: Tensor, context: Context) -> Tensor:
    """Where each step is cut, as a share of it, (batch,)."""
    return torch.full_like(t, 0.5) if context.middle == "half" else 0.1 + 0.8 * torch.rand_like(t)
