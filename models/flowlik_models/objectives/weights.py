"""Weights of squared errors."""

from __future__ import annotations

from torch import Tensor


def adaptive(error: Tensor, c: float) -> Tensor:
    """``e / (sg e + c)``, (batch,): near plain squares for e << c, bounded influence for e >> c (MeanFlow, p = 1).

    A small c makes the fit follow the typical sample and ignore the steep places between modes; see docs/training.md.
    """
    if error.ndim != 1:
        raise ValueError(f"one error a sample expected, got shape {tuple(error.shape)}")
    return error / (error.detach() + c)
