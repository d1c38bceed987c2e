"""One-dimensional integrals of ``exp(f(u))`` whose nodes move to where the integrand is, a batch at a time.

A fixed grid misses a posterior that grows narrow near the data. Here the interval is narrowed five times to where f is
within 60 nats of its largest value, and the trapezoidal rule is taken there: for smooth integrands that vanish at both
ends its error falls exponentially with the number of nodes (Trefethen and Weideman, SIAM Review 56, 2014).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 5
COARSE: Final = 32
NODES: Final = 128
DEPTH: Final = 60.0


def posterior(
    log_density: Callable[[Tensor], Tensor], low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log integral (...,), nodes (..., NODES) and their weights (..., NODES), which sum to one.

    Args:
        log_density: f, from nodes (..., n) to values (..., n); smooth, within each other's reach where it has several
            maxima.
        low, high: ends of an interval that holds all of the mass, (...,) float64.

    >>> zero = torch.zeros(1, dtype=torch.float64)
    >>> log_mass, u, weight = posterior(lambda u: -0.5e6 * (u - 2).square(), zero - 30, zero + 30)
    >>> round(float(log_mass.exp() * 1e3), 6), round(float((weight * u).sum()), 6)
    (2.506628, 2.0)
    """
    with torch.no_grad():
        for _ in range(ROUNDS):
            low, high = _narrowed(log_density, low, high)
    u = _nodes(low, high, NODES)
    f = log_density(u)
    top = f.amax(-1, keepdim=True)
    mass = (f - top).exp()
    step = (high - low) / (NODES - 1)
    total = mass.sum(-1)
    return top[..., 0] + (total * step).log(), u, mass / total[..., None]


def _nodes(low: Tensor, high: Tensor, count: int) -> Tensor:
    points = torch.linspace(0, 1, count, dtype=low.dtype, device=low.device)
    return low[..., None] + (high - low)[..., None] * points


def _narrowed(log_density: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """The interval between the outermost nodes that are not negligible, with one node more on each side."""
    u = _nodes(low, high, COARSE)
    f = log_density(u)
    kept = f >= f.amax(-1, keepdim=True) - DEPTH
    index = torch.arange(COARSE, device=u.device)
    first = torch.where(kept, index, COARSE).amin(-1).sub(1).clamp_min(0)
    last = torch.where(kept, index, -1).amax(-1).add(1).clamp_max(COARSE - 1)
    return u.gather(-1, first[..., None])[..., 0], u.gather(-1, last[..., None])[..., 0]
