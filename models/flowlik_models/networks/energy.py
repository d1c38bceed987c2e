"""Scalar networks of a log-density: a gated quadratic residual on the Gaussian one (docs/math.md section 12).

``E(x) = log N(x; m, C) + g(x)`` with ``g = a(h) + b(h) . y + sum_r c_r(h) (B y)_r^2``: y is the input whitened by the
data's moments, h the last hidden layer, which sees y and the squares ``(B y)^2`` as well. a, b and c start at zero, so
training starts from the Gaussian with the data's moments. Around a component the log-density of a mixture is quadratic,
with another matrix at each; the gates c choose among the directions B. Cost: one evaluation of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowlik_models.networks.vector import _CLIP, _zero_linear
from flowlik_models.numerics.standard_normal import LOG_2PI

_SQUARES = 0.125  # squares join the network's inputs in this unit


class VectorEnergy(nn.Module):
    """The log-density of d-dimensional vectors as one scalar network.

    ``mean`` (d,), ``eigenvalues`` (d,), ``eigenvectors`` (d, d) are the moments of the training data. ``rank``:
    directions B whose squares the gates weigh. ``waves`` random Fourier features of y, of ``wave_scale`` radians per
    standard deviation, let a small network follow steep places of low-dimensional data. ``eps``: the density is that at
    t = 1 - eps.
    """

    def __init__(
        self,
        mean: Tensor,
        eigenvalues: Tensor,
        eigenvectors: Tensor,
        *,
        hidden: int = 256,
        depth: int = 2,
        rank: int = 512,
        waves: int = 0,
        wave_scale: float = 1.0,
        eps: float = 0.0,
    ) -> None:
        super().__init__()
        d = mean.numel()
        self.event_shape: tuple[int, ...] = (d,)
        self.eps = eps
        self.register_buffer("mean", mean.float())
        self.register_buffer("eigenvalues", eigenvalues.float())
        self.register_buffer("eigenvectors", eigenvectors.float())
        self.register_buffer("wave_vectors", wave_scale * torch.randn(d, waves))
        self.directions = nn.Linear(d, rank, bias=False)
        self.first = nn.Linear(d + 2 * waves + rank, hidden)
        self.blocks = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.head = _zero_linear(hidden, 1 + d + rank)

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor
    wave_vectors: Tensor

    def log_density(self, x: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """log p of x (batch, d) at t = 1 - eps in nats, (batch,)."""
        y, d = ((x - self.mean) @ self.eigenvectors) / self.eigenvalues.sqrt(), x.shape[1]
        gaussian = -0.5 * (y.square().sum(1) + self.eigenvalues.log().sum() + d * LOG_2PI)
        near = _CLIP * torch.tanh(y / _CLIP)
        phase = near @ self.wave_vectors
        squares = self.directions(near).square()
        h = F.silu(self.first(torch.cat((near, phase.sin(), phase.cos(), _SQUARES * squares), 1)))
        for block in self.blocks:
            h = h + F.silu(block(h))
        level, slope, gate = self.head(h).split((1, d, squares.shape[1]), 1)
        value: Tensor = gaussian + d * level[:, 0] + (slope * near).sum(1) + (gate * squares).sum(1)
        return value
