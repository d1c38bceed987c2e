"""Gaussian data under the straight path: field, divergence, density and the joint flow map in closed form.

With data N(m, V diag(lam) V^T) the marginal at time t is N(t m, V diag(w) V^T), w = (1 - t)^2 + t^2 lam, and every
trajectory moves along the eigenvectors alone (docs/math.md section 5). Cost: one evaluation is two d x d products.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.policies import FieldPolicy
from flowlik_models.numerics.standard_normal import LOG_2PI


def log1p_ratio(z: Tensor) -> Tensor:
    """log(1 + z) / z for z > -1, with its series where |z| is small.

    >>> [round(value, 4) for value in log1p_ratio(torch.tensor([0.0, 1.0])).tolist()]
    [1.0, 0.6931]
    """
    small = z.abs() < 1e-3
    safe = torch.where(small, torch.ones_like(z), z)
    series = 1 - z / 2 + z.square() / 3 - z**3 / 4 + z**4 / 5
    return torch.where(small, series, torch.log1p(safe) / safe)


def gaussian_map_coefficients(eigenvalues: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Closed-form average velocity and divergence of the flow of N(m, V diag(eigenvalues) V^T), docs/math.md section 5.

    ``eigenvalues`` (d,), ``t`` and ``s`` (batch,). Returns ``c`` (batch, d), so that
    ``u = m + V diag(c) V^T (x - t m)``, and the average divergence (batch,). Both orders of t and s, and s = t.

    >>> c, divergence = gaussian_map_coefficients(torch.tensor([4.0]), torch.zeros(1), torch.ones(1))
    >>> float(c), round(float(divergence), 4)  # the map doubles x; log 2
    (1.0, 0.6931)
    """
    t, s = t[:, None], s[:, None]
    w_t = (1 - t).square() + t.square() * eigenvalues
    w_s = (1 - s).square() + s.square() * eigenvalues
    slope = -(2 - s - t) + (s + t) * eigenvalues  # (w_s - w_t)/(s - t)
    c = slope / (w_t * ((w_s / w_t).sqrt() + 1))
    relative = slope / w_t
    average_divergence = 0.5 * (relative * log1p_ratio((s - t) * relative)).sum(1)
    return c, average_divergence


class Gaussian(nn.Module):
    """N(mean, cov) with its exact joint flow map.

    ``mean`` (d,), ``cov`` (d, d), float64. Raises ValueError where the shapes differ or the covariance is not positive
    definite.

    >>> model = Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 4.0])))
    >>> [round(value, 4) for value in model.log_prob(torch.zeros(1, 2)).tolist()]
    [-2.531]
    >>> model.velocity(torch.tensor([[1.0, 1.0]]), torch.ones(1)).tolist()
    [[1.0, 1.0]]
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, mean: Tensor, cov: Tensor) -> None:
        super().__init__()
        if mean.ndim != 1 or cov.shape != (mean.numel(), mean.numel()):
            raise ValueError(f"mean must be (d,) and cov (d, d); got {tuple(mean.shape)}, {tuple(cov.shape)}")
        self._set(mean, *torch.linalg.eigh(cov.double()))

    @classmethod
    def from_eigen(cls, mean: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> Gaussian:
        """The Gaussian with these eigenvalues (d,) and orthonormal eigenvectors (d, d; columns) of its covariance.

        Raises:
            ValueError: the shapes differ, or an eigenvalue is not positive.
        """
        dim = mean.numel()
        if mean.ndim != 1 or eigenvalues.shape != (dim,) or eigenvectors.shape != (dim, dim):
            raise ValueError(f"expected ({dim},), ({dim},) and ({dim}, {dim})")
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set(mean, eigenvalues, eigenvectors)
        return made

    def _set(self, mean: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> None:
        if not bool((eigenvalues > 0).all()):
            raise ValueError("the covariance is not positive definite")
        self.event_shape: tuple[int, ...] = (mean.numel(),)
        self.eps = 0.0
        self._cast: tuple[object, tuple[Tensor, Tensor, Tensor]] | None = None
        self.register_buffer("mean", mean.double())
        self.register_buffer("eigenvalues", eigenvalues.double())
        self.register_buffer("eigenvectors", eigenvectors.double())

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, eigenvalues and eigenvectors in x's dtype, kept: at large d a cast costs as much as the product."""
        held = (self.mean, self.eigenvalues, self.eigenvectors)
        key = (x.dtype, x.device, *((part.data_ptr(), part._version) for part in held))
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, (held[0].to(x), held[1].to(x), held[2].to(x)))
        return self._cast[1]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Exact average velocity (batch, d) and average divergence (batch,)."""
        mean, eigenvalues, basis = self._like(x)
        c, divergence = gaussian_map_coefficients(eigenvalues, t, s)
        y = (x - t[:, None] * mean) @ basis
        return mean + (c * y) @ basis.T, divergence

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Exact average velocity, (batch, d)."""
        return self.joint(x, t, s, cond=cond)[0]

    def velocity_and_divergence(
        self, x: Tensor, t: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The marginal velocity (batch, d) and its divergence (batch,)."""
        return self.joint(x, t, t, cond=cond)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity, (batch, d)."""
        return self.joint(x, t, t, cond=cond)[0]

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Divergence of the marginal velocity, (batch,)."""
        return self.joint(x, t, t, cond=cond)[1]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> FieldPolicy:
        """The exact field as the policy of any segment."""
        return FieldPolicy(self)

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The symmetric affine map of N(0, I) to the data, (batch, d): the flow from t = 0 to t = 1 in one step."""
        mean, values, vectors = self._like(z)
        return mean + (values.sqrt() * (z @ vectors)) @ vectors.T

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,)."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])[:, None]
        w = (1 - time).square() + time.square() * self.eigenvalues.to(x)
        y = (x - time * self.mean.to(x)) @ self.eigenvectors.to(x)
        return -0.5 * (y.square() / w + w.log() + LOG_2PI).sum(1)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64."""
        return self.mean, (self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T

    def sample(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``n`` draws of p_t, (n, d)."""
        noise = torch.randn(
            (n, *self.event_shape), generator=generator, dtype=torch.float64, device=generator.device
        ).to(self.mean.device)
        scale = ((1 - t) ** 2 + t**2 * self.eigenvalues).sqrt()
        return (t * self.mean + (noise * scale) @ self.eigenvectors.T).to(dtype)
