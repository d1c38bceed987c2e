"""Targets that samplers of unnormalised densities are judged by, with their exact path.

Each has one hidden number per factor, given which all is Gaussian, so that p_t, its field and divergence are integrals
over one variable (docs/math.md section 14): ``v = (E[x | y] - y) / (1 - t)`` and
``div v = (t tr Cov[x | y] / (1 - t)^2 - d) / (1 - t)``. Computed in float64, returned in the dtype of the input.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.closed_forms.moving_nodes import posterior
from flowlik_models.closed_forms.policies import FieldPolicy
from flowlik_models.numerics.standard_normal import LOG_2PI

_CLOSEST = 1e-6  # 1 - t is never taken smaller: nodes find a posterior that narrow, and the blur is nothing


class Target(nn.Module, ABC):
    """A density whose posterior given a noisy point is an integral over one hidden number."""

    anchor: Tensor

    def __init__(self, dim: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.event_shape: tuple[int, ...] = (dim,)
        self.eps = eps
        self.register_buffer("anchor", torch.zeros((), dtype=torch.float64), persistent=False)

    @abstractmethod
    def _given(self, y: Tensor, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log p_t(y) (batch,), E[x | y] (batch, d) and tr Cov[x | y] (batch,), float64."""

    @abstractmethod
    def _log_data(self, x: Tensor) -> Tensor:
        """log p(x) at t = 1, (batch,) float64."""

    @abstractmethod
    def _data(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` draws of the data, (n, d) float64, on the generator's device."""

    @abstractmethod
    def constants(self) -> dict[str, Tensor]:
        """The numbers that name the target, for its hash."""

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity, (batch, d)."""
        return self.velocity_and_divergence(x, t)[0]

    def velocity_and_divergence(
        self, x: Tensor, t: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The marginal velocity (batch, d) and its divergence (batch,)."""
        time = t.double()
        sigma = (1 - time).clamp_min(_CLOSEST)
        _, mean, spread = self._given(x.double(), time, sigma)
        velocity = (mean - x.double()) / sigma[:, None]
        divergence = (time * spread / sigma.square() - x.shape[1]) / sigma
        return velocity.to(x.dtype), divergence.to(x.dtype)

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Divergence of the marginal velocity, (batch,)."""
        return self.velocity_and_divergence(x, t)[1]

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> FieldPolicy:
        """The exact field as the policy of any segment."""
        return FieldPolicy(self)

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,)."""
        time = torch.as_tensor(t, dtype=torch.float64, device=x.device).expand(x.shape[0])
        sigma = (1 - time).clamp_min(_CLOSEST)
        smooth = self._given(x.double(), 1 - sigma, sigma)[0]
        return torch.where(time >= 1, self._log_data(x.double()), smooth).to(x.dtype)

    def sample(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``n`` draws of p_t, (n, d)."""
        data = self._data(n, generator)
        noise = torch.randn(data.shape, generator=generator, dtype=torch.float64, device=generator.device)
        return (t * data + (1 - t) * noise).to(device=self.anchor.device, dtype=dtype)


def _log_well(x: Tensor) -> Tensor:
    return -x.pow(4) + 6 * x.square() + x / 2


@cache
def _well() -> tuple[Tensor, Tensor, float]:
    """A fine grid over the well, its cumulative probabilities, and the logarithm of its constant."""
    grid = torch.linspace(-4, 4, 400_001, dtype=torch.float64)
    density = _log_well(grid).exp()
    total = float(density.sum() * (grid[1] - grid[0]))
    cumulative = torch.cat([grid.new_zeros(1), (density[1:] + density[:-1]).cumsum(0)])
    return grid, cumulative / cumulative[-1], math.log(total)


class ManyWell(Target):
    """Independent pairs (x1, x2) with density ``exp(-x1^4 + 6 x1^2 + x1 / 2 - x2^2 / 2) / Z``: 2^pairs modes.

    The double well of Noe et al. (Science 365, 2019) as Midgley et al. (arXiv 2208.01893) stack it; 16 pairs are their
    ManyWell-32. Coordinates are x1, x2 of the first pair, then of the second.

    >>> model = ManyWell(1)
    >>> x = model.sample(3, generator=torch.Generator().manual_seed(0))
    >>> x.shape, bool(model.log_prob(x).isfinite().all())
    (torch.Size([3, 2]), True)
    """

    def __init__(self, pairs: int = 16, eps: float = 1e-3) -> None:
        super().__init__(2 * pairs, eps)

    def constants(self) -> dict[str, Tensor]:
        """Powers 4, 2 and 1 of the well's exponent, and the number of pairs."""
        return {"well": torch.tensor([-1.0, 6.0, 0.5, self.event_shape[0] / 2], dtype=torch.float64)}

    @property
    def log_constant(self) -> float:
        """Logarithm of Z of one pair, the Gaussian's part included."""
        return _well()[2] + 0.5 * LOG_2PI

    def _log_data(self, x: Tensor) -> Tensor:
        wells, rest = x[:, 0::2], x[:, 1::2]
        return (_log_well(wells) - rest.square() / 2 - self.log_constant).sum(1)

    def _given(self, y: Tensor, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wells, rest = y[:, 0::2], y[:, 1::2]
        time, noise = t[:, None], sigma[:, None]
        tilt = time * wells.detach().abs() / noise.square()
        far = torch.minimum((tilt / 4).pow(1 / 3) + 2, wells.detach().abs() / time.clamp_min(1e-12) + 2)
        far = far.clamp_min(4.0) + 1.0

        def log_density(u: Tensor) -> Tensor:
            error = (wells[..., None] - time[..., None] * u) / noise[..., None]
            return _log_well(u) - error.square() / 2

        log_mass, u, weight = posterior(log_density, -far, far)
        mean = (weight * u).sum(-1)
        spread = (weight * (u - mean[..., None]).square()).sum(-1)
        log_wells = log_mass - _well()[2] - noise.log() - 0.5 * LOG_2PI
        variance = time.square() + noise.square()
        log_rest = -0.5 * (rest.square() / variance + variance.log() + LOG_2PI)
        expected = torch.stack([mean, time * rest / variance], 2).flatten(1)
        return (log_wells + log_rest).sum(1), expected, (spread + noise.square() / variance).sum(1)

    def _data(self, n: int, generator: torch.Generator) -> Tensor:
        grid, cumulative, _ = _well()
        shape, device = (n, self.event_shape[0] // 2), generator.device
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64, device=device).cpu()
        above = torch.searchsorted(cumulative, uniform).clamp(1, len(grid) - 1)
        low, high = cumulative[above - 1], cumulative[above]
        share = (uniform - low) / (high - low).clamp_min(1e-300)
        wells = grid[above - 1] + share * (grid[1] - grid[0])
        rest = torch.randn(shape, generator=generator, dtype=torch.float64, device=device)
        return torch.stack([wells.to(device), rest], 2).flatten(1)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64."""
        grid, _, log_total = _well()
        density = (_log_well(grid) - log_total).exp() * (grid[1] - grid[0])
        mean = (density * grid).sum()
        variance = (density * (grid - mean).square()).sum()
        pairs = self.event_shape[0] // 2
        ones = torch.ones(pairs, dtype=torch.float64)
        covariance = torch.stack([variance * ones, ones], 1).flatten().diag()
        return torch.stack([mean * ones, 0 * ones], 1).flatten(), covariance


class Funnel(Target):
    """Neal's funnel (Annals of Statistics 31, 2003): ``x_0 ~ N(0, 9)``, the others ``N(0, exp(x_0))`` given x_0.

    >>> model = Funnel(10)
    >>> x = model.sample(2, generator=torch.Generator().manual_seed(0))
    >>> model.velocity(x, torch.full((2,), 0.5)).shape
    torch.Size([2, 10])
    """

    STD = 3.0

    def __init__(self, dim: int = 10, eps: float = 1e-3) -> None:
        super().__init__(dim, eps)

    def constants(self) -> dict[str, Tensor]:
        """Standard deviation of the first coordinate, and the number of coordinates."""
        return {"funnel": torch.tensor([self.STD, self.event_shape[0]], dtype=torch.float64)}

    def _log_data(self, x: Tensor) -> Tensor:
        first, others = x[:, 0], x[:, 1:]
        count = others.shape[1]
        log_first = -0.5 * ((first / self.STD).square() + LOG_2PI) - math.log(self.STD)
        log_others = -0.5 * (others.square().sum(1) * (-first).exp() + count * (first + LOG_2PI))
        return log_first + log_others

    def _given(self, y: Tensor, t: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, others = y[:, 0], y[:, 1:]
        count, square = others.shape[1], others.square().sum(1)
        time, noise = t[:, None], sigma[:, None]
        centre = (t * first / sigma.square() / (self.STD**-2 + (t / sigma).square())).detach()
        low, high = centre.clamp_max(0) - 45.0, centre.clamp_min(0) + 45.0

        def log_density(u: Tensor) -> Tensor:
            variance = time.square() * u.exp() + noise.square()
            log_first = -0.5 * ((u / self.STD).square() + ((first[:, None] - time * u) / noise).square())
            return log_first - 0.5 * (square[:, None] / variance + count * variance.log())

        log_mass, u, weight = posterior(log_density, low, high)
        constants = 0.5 * LOG_2PI * (2 + count) + math.log(self.STD)
        mean = (weight * u).sum(1)
        spread = (weight * (u - mean[:, None]).square()).sum(1)
        variance = time.square() * u.exp() + noise.square()
        gain = time * u.exp() / variance
        expected = (weight * gain).sum(1)
        rest = count * (weight * u.exp() * noise.square() / variance).sum(1)
        rest = rest + square * (weight * (gain - expected[:, None]).square()).sum(1)
        moments = torch.cat([mean[:, None], expected[:, None] * others], 1)
        return log_mass - sigma.log() - constants, moments, spread + rest

    def _data(self, n: int, generator: torch.Generator) -> Tensor:
        draws = torch.randn(
            (n, self.event_shape[0]), generator=generator, dtype=torch.float64, device=generator.device
        )
        first = self.STD * draws[:, :1]
        return torch.cat([first, draws[:, 1:] * (first / 2).exp()], 1)

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64: the others' variance is exp(9/2)."""
        variances = torch.full((self.event_shape[0],), math.exp(self.STD**2 / 2), dtype=torch.float64)
        variances[0] = self.STD**2
        return torch.zeros_like(variances), variances.diag()


def forty_modes() -> GaussianMixture:
    """GMM-40 of Midgley et al. (arXiv 2208.01893): forty equal isotropic Gaussians of standard deviation
    softplus(1) in the plane, their means uniform in [-40, 40]^2, drawn by torch's generator from seed 0.

    >>> model = forty_modes()
    >>> tuple(model.means.shape), round(float(model.stds[0, 0]), 4)
    ((40, 2), 1.3133)
    """
    draws = torch.rand((40, 2), generator=torch.Generator().manual_seed(0))
    means = ((draws - 0.5) * 80).double()
    std = math.log1p(math.e)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    eye = torch.eye(2, dtype=torch.float64).expand(40, 2, 2).contiguous()
    return GaussianMixture(weights, means, torch.full((40, 2), std, dtype=torch.float64), eye)


TARGETS: dict[str, Callable[[], ManyWell | Funnel | GaussianMixture]] = {
    "many-well-32": lambda: ManyWell(16),
    "funnel-10": lambda: Funnel(10),
    "gmm-40": forty_modes,
}
"""Task -> what makes its closed form."""
