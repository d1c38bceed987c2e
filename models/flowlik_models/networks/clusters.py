"""The flow of a mixture of Gaussians fitted to the data, as the closed-form part of a joint map (docs/math.md section
5).

With responsibilities r_k at (x, t) and the closed-form map (u_k, D_k) of every Gaussian, the base is ``sum_k r_k
u_k`` and ``sum_k r_k D_k``: exact for the velocity on the diagonal and where one Gaussian has all of the
responsibility along the trajectory, an approximation between. Cost: K products of a (d, d) matrix a sample.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.gaussian import gaussian_map_coefficients

_FLOOR = 1e-6  # of the fitted variances
_SEED = 0


class ClusterMap(nn.Module):
    """``clusters`` Gaussians in ``dim`` dimensions; standard normal ones until ``fit`` or a checkpoint fills them."""

    weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, clusters: int, dim: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.full((clusters,), 1 / clusters))
        self.register_buffer("means", torch.zeros(clusters, dim))
        self.register_buffer("eigenvalues", torch.ones(clusters, dim))
        self.register_buffer("eigenvectors", torch.eye(dim).repeat(clusters, 1, 1))

    def fit(self, samples: Tensor) -> None:
        """Fit to samples (n, d) by expectation maximisation from k-means, fixed seed."""
        from sklearn.mixture import GaussianMixture  # a second to load, which only a fit needs

        found = GaussianMixture(len(self.weights), random_state=_SEED, reg_covar=_FLOOR)
        found.fit(samples.double().numpy())
        values, vectors = torch.linalg.eigh(torch.from_numpy(found.covariances_))
        for name, value in (
            ("weights", torch.from_numpy(found.weights_)),
            ("means", torch.from_numpy(found.means_)),
            ("eigenvalues", values.clamp(min=_FLOOR)),
            ("eigenvectors", vectors),
        ):
            getattr(self, name).copy_(value)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Average velocity (batch, d), average divergence (batch,), responsibilities (batch, K)."""
        clusters, dim = self.means.shape
        time = t[:, None, None]
        # (batch, K, d): coordinates along the axes of every Gaussian
        axes = self.eigenvectors.permute(1, 0, 2).reshape(dim, clusters * dim)
        centre = torch.einsum("kde,kd->ke", self.eigenvectors, self.means)
        y = (x @ axes).view(-1, clusters, dim) - time * centre
        w = (1 - time).square() + time.square() * self.eigenvalues
        r = (self.weights.log() - 0.5 * (y.square() / w + w.log()).sum(2)).softmax(1)
        rows = self.eigenvalues.repeat(len(x), 1)
        c, divergence = gaussian_map_coefficients(rows, *(v.repeat_interleave(clusters) for v in (t, s)))
        moved = (r[:, :, None] * c.view(-1, clusters, dim) * y).reshape(-1, clusters * dim)
        u = r @ self.means + moved @ self.eigenvectors.permute(0, 2, 1).reshape(clusters * dim, dim)
        return u, (r * divergence.view(-1, clusters)).sum(1), r
