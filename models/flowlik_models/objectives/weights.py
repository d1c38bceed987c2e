"""Weights of squared errors."""

from __future__ import annotations

from torch import Tensor


def adaptive(error: Tensor, c: float | None) -> Tensor:
    """``e / (sg e + c)``, (batch,): near plain squares for e << c, bounded influence for e >> c (MeanFlow, p = 1).

    A small c makes the fit follow the typical sample and ignore the steep places between modes, and where the target
    is noisy it no longer fits its mean; see docs/training-ablations.md. None: the error as it is.
    """
    if error.ndim != 1:
        raise ValueError(f"one error a sample expected, got shape {tuple(error.shape)}")
    return error if c is None else error / (error.detach() + c)
