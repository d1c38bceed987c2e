"""Uniform density on axis-aligned squares under the straight path, in closed form.

Given x_t = x, each coordinate of the data point is a normal truncated to the square's side, so mass, mean and variance
are error-function formulas and the mixture over squares follows as for Gaussians (docs/math.md section 1). Everything
is computed in float64, since the truncated moments cancel far from a square, and returned in x's dtype.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.policies import FieldPolicy
from flowlik_models.numerics.standard_normal import LOG_2PI

_SHORT = 1.0  # intervals shorter than this many standard deviations go by quadrature, longer ones by erf
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(12)  # error below 1e-16 on an interval of length 1
_CLOSEST = 1e-9  # 1 - t is never taken smaller: the field has a limit inside, none on an edge


def _mills(z: Tensor) -> Tensor:
    """(1 - Phi(z)) / phi(z)."""
    scaled: Tensor = torch.special.erfcx(z / math.sqrt(2))
    return math.sqrt(math.pi / 2) * scaled


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)


def _long_interval(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log mass, mean and variance of a standard normal truncated to [low, high], (low + high)/2 >= 0, by erf.

    Right of zero everything is divided by phi(low), which underflows; left of it the mass is at least about a third.
    """
    tail = low > 0
    low_tail, low_core = torch.where(tail, low, torch.ones_like(low)), low.clamp_max(0)
    high_tail = torch.where(tail, high, torch.full_like(high, 2.0))
    ratio = torch.exp(-0.5 * (high_tail - low_tail) * (high_tail + low_tail))  # phi(high)/phi(low)
    relative = _mills(low_tail) - ratio * _mills(high_tail)
    mass = torch.special.ndtr(-low_core) - torch.special.ndtr(-high)
    mass = torch.where(tail, torch.ones_like(mass), mass)

    log_tail = relative.log() - 0.5 * low_tail.square() - 0.5 * LOG_2PI
    log_mass = torch.where(tail, log_tail, mass.log())
    mean = torch.where(tail, (1 - ratio) / relative, (_phi(low_core) - _phi(high)) / mass)
    tilt = torch.where(
        tail,
        (low_tail - high_tail * ratio) / relative,
        (low_core * _phi(low_core) - high * _phi(high)) / mass,
    )
    return log_mass, mean, (1 + tilt - mean.square()).clamp_min(0)


class Checkerboard(nn.Module):
    """Uniform on squares of one side length.

    ``lower_left`` (K, d) holds the squares' lower corners. The field is singular on edges as t -> 1, so likelihoods are
    those of p at t = 1 - ``eps``. Raises ValueError for a non-positive side or a wrong shape.

    >>> model = Checkerboard(torch.tensor([[0.0, 0.0]]), side=2.0)
    >>> [round(value, 4) for value in model.log_prob(torch.tensor([[1.0, 1.0], [3.0, 1.0]])).tolist()]
    [-1.3863, -inf]
    """

    lower_left: Tensor
    edges: Tensor
    index: Tensor

    def __init__(self, lower_left: Tensor, side: float = 2.0, eps: float = 1e-3) -> None:
        super().__init__()
        if lower_left.ndim != 2 or side <= 0:
            raise ValueError("lower_left must be (K, d) and side positive")
        self.event_shape: tuple[int, ...] = (lower_left.shape[1],)
        self.side, self.eps = float(side), float(eps)
        edges, index = torch.unique(lower_left.double(), return_inverse=True)
        self.register_buffer("lower_left", lower_left.double())
        self.register_buffer("edges", edges)
        self.register_buffer("index", index)

    def _intervals(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of one data coordinate in every interval: log density of x_i, mean, variance, (batch, d, E)."""
        sigma = (1 - t).clamp_min(_CLOSEST)[:, None, None]
        time, x = t[:, None, None], x[:, :, None]
        low = (time * self.edges - x) / sigma
        length = (time * self.side / sigma).expand_as(low)
        flip = low + length / 2 < 0
        short = length < _SHORT

        nodes = torch.as_tensor(_NODES, dtype=x.dtype, device=x.device)
        weights = torch.as_tensor(_WEIGHTS / 2, dtype=x.dtype, device=x.device)
        points = 0.5 * (nodes + 1)  # in [0, 1] along the side
        step = torch.where(short, length, torch.zeros_like(length))
        z = low[..., None] + step[..., None] * points
        log_weight = weights.log() - 0.5 * z.square() - 0.5 * LOG_2PI
        log_mean_phi = log_weight.logsumexp(-1)
        probability = (log_weight - log_mean_phi[..., None]).exp()
        mean_point = (probability * points).sum(-1)
        var_point = (probability * (points - mean_point[..., None]).square()).sum(-1)
        short_mean = self.edges + self.side * mean_point
        short_var = self.side**2 * var_point

        safe = torch.where(short, torch.full_like(length, 2.0), length)
        near = torch.where(flip, -(low + safe), low)
        near = torch.where(short, torch.zeros_like(near), near)
        log_mass, mean_z, var_z = _long_interval(near, near + safe)
        scale = sigma / time.clamp_min(_CLOSEST)
        # counted from the nearer edge: the mean itself would cancel for points far from the square
        offset = scale * (mean_z - near)
        long_mean = torch.where(flip, self.edges + self.side - offset, self.edges + offset)
        long_var = scale.square() * var_z

        log_density = torch.where(short, log_mean_phi, log_mass - safe.log()) - sigma.log()
        return (
            log_density,
            torch.where(short, short_mean, long_mean),
            torch.where(short, short_var, long_var),
        )

    def _posterior(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log density of x with each square (batch, K), posterior means and variances (batch, K, d), float64."""
        log_density, mean, variance = self._intervals(x.double(), t.double())
        rows = torch.arange(x.shape[1], device=x.device)
        pick = (slice(None), rows[None, :], self.index)  # (batch, K, d)
        return log_density[pick].sum(2) - math.log(len(self.index)), mean[pick], variance[pick]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity, (batch, d)."""
        log_joint, mean, _ = self._posterior(x, t)
        expected = (log_joint.softmax(1)[:, :, None] * mean).sum(1)
        return ((expected - x.double()) / (1 - t.double()).clamp_min(_CLOSEST)[:, None]).to(x.dtype)

    def velocity_and_divergence(
        self, x: Tensor, t: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The marginal velocity (batch, d) and its divergence (batch,)."""
        log_joint, mean, variance = self._posterior(x, t)
        r = log_joint.softmax(1)[:, :, None]
        expected = (r * mean).sum(1)
        total = (r * (variance + (mean - expected[:, None]).square())).sum((1, 2))
        time, sigma = t.double(), (1 - t.double()).clamp_min(_CLOSEST)
        velocity = (expected - x.double()) / sigma[:, None]
        divergence = (time / sigma.square() * total - x.shape[1]) / sigma
        return velocity.to(x.dtype), divergence.to(x.dtype)

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Divergence of the marginal velocity, (batch,)."""
        return self.velocity_and_divergence(x, t, cond=cond)[1]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> FieldPolicy:
        """The exact field as the policy of any segment."""
        return FieldPolicy(self)

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,); at t = 1 the uniform density, -inf outside."""
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])
        smooth = self._posterior(x, time.clamp_max(1 - _CLOSEST))[0].logsumexp(1)
        exact = torch.where(
            self.distance_outside(x) == 0, -math.log(len(self.index) * self.side ** x.shape[1]), -math.inf
        )
        return torch.where(time >= 1, exact, smooth).to(x.dtype)

    def distance_outside(self, x: Tensor) -> Tensor:
        """Euclidean distance to the nearest filled square, 0 inside, (batch,)."""
        return self._gaps(x).clamp_min(0).square().sum(2).sqrt().amin(1)

    def _gaps(self, x: Tensor) -> Tensor:
        """Signed distance beyond the side in each direction, (batch, K, d)."""
        centre = self.lower_left.to(x) + self.side / 2
        return (x[:, None, :] - centre).abs() - self.side / 2

    def sample(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``n`` draws of p_t, (n, d)."""
        device = self.lower_left.device
        square = torch.randint(len(self.index), (n,), generator=generator, device=generator.device)
        shape = (n, *self.event_shape)
        inside = torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        data = self.lower_left[square.to(device)] + self.side * inside.to(device)
        return (t * data + (1 - t) * noise.to(device)).to(dtype)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64."""
        centre = self.lower_left + self.side / 2
        mean = centre.mean(0)
        offset = centre - mean
        within = torch.eye(len(mean), dtype=torch.float64, device=mean.device) * self.side**2 / 12
        return mean, within + offset.T @ offset / len(centre)
