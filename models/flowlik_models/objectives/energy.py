r"""Regression of a scalar network on a log-density and its gradient (docs/math.md section 12).

Per sample ``(E - log p)^2/d + SLOPE |C^{1/2} (grad E - grad log p)|^2/d``, C the covariance of the data: the gradient
is d numbers a point where the value is one, and is what makes few points enough.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SLOPE = 0.1
"""Weight of the gradient's error beside that of the value."""


def energy_errors(
    network: Any, x: Tensor, log_prob: Tensor, score: Tensor, *, relative: float | None = None
) -> Tensor:
    """Squared errors a dimension of every sample, (batch,), with graph to the network's parameters.

    Args:
        network: a scalar log-density with the moments of its data (`eigenvalues`, `eigenvectors`).
        x: points (batch, *event).
        log_prob: their log-densities (batch,), nats.
        score: gradients of these, (batch, *event).
        relative: log-densities a dimension, and gradients in standard deviations of the data, that are larger than this
            are fitted to relative accuracy: each square is divided by ``1 + (target/relative)^2``.

    Raises:
        ValueError: targets of other shapes than these.
    """
    if log_prob.shape != x.shape[:1] or score.shape != x.shape:
        raise ValueError(
            f"expected log-densities {tuple(x.shape[:1])} and gradients {tuple(x.shape)}, got "
            f"{tuple(log_prob.shape)} and {tuple(score.shape)}"
        )
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = network.log_density(x)
        (slope,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    dim = x[0].numel()
    off, size = (
        (each.flatten(1) @ network.eigenvectors * network.eigenvalues.sqrt()).square().sum(1) / dim
        for each in (slope - score, score)
    )
    errors: Tensor = (value - log_prob).square() / dim
    if relative is not None:
        errors = errors / (1 + (log_prob / (dim * relative)).square())
        off = off / (1 + size / relative**2)
    total: Tensor = errors + SLOPE * off
    return total


def exact_targets(truth: Any, x: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Log-density (batch,) and its gradient (batch, *event) of a closed form at time t."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        log_prob = truth.log_prob(x, t)
        (score,) = torch.autograd.grad(log_prob.sum(), x)
    return log_prob.detach(), score
