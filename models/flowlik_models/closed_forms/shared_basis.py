r"""Gaussian mixtures whose components share their axes: exact flows at the size of images.

Component k at time t is ``N(t m_k, V diag(w_k) V^T)`` with one orthogonal V for all and ``w_k = (1 - t)^2 + t^2 lam_k``
(docs/math.md section 1). With ``y = V^T (x - t m)``, m the mixture's mean, ``c_k = t V^T (m_k - m)`` and
``a_k = w_k'/(2 w_k)`` a component's velocity along the axes is ``b_k + a_k y``, ``b_k = V^T (m_k - m) (1 - t)/w_k``, so
everything the mixture needs of x is y, y squared and their products with (K, d) tables. Cost of an evaluation: two
products with V, and K d for the components: d^2 + K d a sample where separate axes would take K d^2.

Responsibilities and divergence are sums over d of terms that nearly cancel between components; they are taken in
float64 whatever x is, which costs next to nothing beside the products with V.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowlik_models.numerics.standard_normal import LOG_2PI

_PIECE = 2**22  # numbers a (rows, K, d) table may have where every row has a time of its own


@dataclass(frozen=True)
class _Tables:
    """Tables over (times, K, d) at the given times (times, 1, 1), float64; times is 1 or the batch."""

    precision: Tensor
    log_volume: Tensor
    centre: Tensor
    rate: Tensor
    drift: Tensor


class SharedBasisMixture(nn.Module):
    """A mixture of K Gaussians of d = prod(event_shape) dimensions with common axes.

    Args:
        weights: (K,), positive, of sum one.
        means: (K, d) in the coordinates of the data.
        spectra: (K, d), variances along the axes.
        basis: (d, d), orthonormal columns, the axes.
        event_shape: shape of one sample.

    Raises:
        ValueError: shapes that differ, weights or variances that are not positive, or weights that do not sum to one.
    """

    weights: Tensor
    mean: Tensor
    offsets: Tensor
    spectra: Tensor
    basis: Tensor

    def __init__(
        self,
        weights: Tensor,
        means: Tensor,
        spectra: Tensor,
        basis: Tensor,
        event_shape: tuple[int, ...],
    ) -> None:
        super().__init__()
        k, d = means.shape
        if weights.shape != (k,) or spectra.shape != (k, d) or basis.shape != (d, d):
            raise ValueError("weights, means, spectra and basis must be (K,), (K, d), (K, d) and (d, d)")
        if math.prod(event_shape) != d:
            raise ValueError(
                f"means have {d} dimensions, events of shape {event_shape} {math.prod(event_shape)}"
            )
        if not bool((weights > 0).all()) or not bool((spectra > 0).all()):
            raise ValueError("weights and variances must be positive")
        if abs(float(weights.sum()) - 1.0) > 1e-9:
            raise ValueError(f"the weights sum to {float(weights.sum())}, not to 1")
        self.event_shape = tuple(event_shape)
        self.eps = 0.0
        self._cast: tuple[object, tuple[Tensor, Tensor]] | None = None
        mean = weights.double() @ means.double()
        self.register_buffer("weights", weights.double())
        self.register_buffer("mean", mean)
        self.register_buffer("offsets", (means.double() - mean) @ basis.double())
        self.register_buffer("spectra", spectra.double())
        self.register_buffer("basis", basis.double())

    # --- the field ---

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The marginal velocity, shaped like x."""
        return self._evaluate(x, t, divergence=False)[0]

    def velocity_and_divergence(
        self, x: Tensor, t: Tensor, *, cond: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The marginal velocity, shaped like x, and its divergence, (batch,) float64."""
        velocity, divergence = self._evaluate(x, t, divergence=True)
        assert divergence is not None
        return velocity, divergence

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """Divergence of the marginal velocity, (batch,) float64."""
        return self.velocity_and_divergence(x, t)[1]

    def log_prob(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Exact log p_t(x) in nats, (batch,) float64."""
        return self._log_joint(x, t).logsumexp(1)

    def responsibilities(self, x: Tensor, t: float | Tensor = 1.0) -> Tensor:
        """Posterior probability of each component given x_t = x, (batch, K) float64."""
        return self._log_joint(x, t).softmax(1)

    # --- draws and moments ---

    def draw_components(self, n: int, generator: torch.Generator) -> Tensor:
        """The components of ``n`` draws, (n,): what `sample_with_component` takes first from its generator."""
        weights = self.weights.to(generator.device)
        return torch.multinomial(weights, n, replacement=True, generator=generator)

    def sample_with_component(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """``n`` draws of p_t (n, *event) and the component each came from (n,)."""
        component = self.draw_components(n, generator)
        shape, device = (n, self.basis.shape[0]), self.basis.device
        noise = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device)
        component, noise = component.to(device), noise.to(device)
        scale = ((1 - t) ** 2 + t**2 * self.spectra).sqrt()
        along = t * self.offsets[component] + noise * scale[component]
        x = t * self.mean + along @ self.basis.T
        return x.reshape(n, *self.event_shape).to(dtype), component

    def sample(
        self, n: int, *, generator: torch.Generator, t: float = 1.0, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """``n`` draws of p_t, (n, *event)."""
        return self.sample_with_component(n, generator=generator, t=t, dtype=dtype)[0]

    def mean_and_covariance(self) -> tuple[Tensor, Tensor]:
        """Exact moments of the data, (d,) and (d, d), float64."""
        along = (self.weights[:, None] * self.offsets).T @ self.offsets
        along += torch.diag(self.weights @ self.spectra)
        return self.mean, self.basis @ along @ self.basis.T

    # --- inside ---

    def _like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and axes in x's dtype, kept: a cast costs a third of a product."""
        held = (self.mean, self.basis)
        key = (x.dtype, x.device, *((part.data_ptr(), part._version) for part in held))
        if self._cast is None or self._cast[0] != key:
            self._cast = (key, (held[0].to(x), held[1].to(x)))
        return self._cast[1]

    def _evaluate(self, x: Tensor, t: Tensor, *, divergence: bool) -> tuple[Tensor, Tensor | None]:
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be (batch,) = {tuple(x.shape[:1])}, got {tuple(t.shape)}")
        mean, basis = self._like(x)
        y = (x.flatten(1) - t[:, None] * mean) @ basis
        parts = [self._along(rows, time, divergence) for rows, time in self._pieces(y.double(), t)]
        velocity = torch.cat([part[0] for part in parts]).to(x)
        moved = mean + velocity @ basis.T
        total = torch.cat([part[1] for part in parts]) if divergence else None
        return moved.view_as(x), total

    def _log_joint(self, x: Tensor, t: float | Tensor) -> Tensor:
        """log of weight times density of each component, (batch, K)."""
        time = torch.as_tensor(t, dtype=x.dtype, device=x.device).expand(x.shape[0])
        mean, basis = self._like(x)
        y = ((x.flatten(1) - time[:, None] * mean) @ basis).double()
        return torch.cat([self._log_parts(rows, self._tables(at)) for rows, at in self._pieces(y, time)])

    def _pieces(self, y: Tensor, t: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Rows with their times (1 or rows, 1, 1): all at once where they share one time, as a solver's do."""
        times = t.double()[:, None, None]
        # one look at t, on its device, decides between (K, d) and (batch, K, d) tables
        if not t.requires_grad and bool((t == t[0]).all()):
            return [(y, times[:1])]
        size = max(1, _PIECE // self.spectra.numel())
        return list(zip(torch.split(y, size), torch.split(times, size), strict=True))

    def _tables(self, time: Tensor) -> _Tables:
        left = 1 - time
        w = left.square() + time.square() * self.spectra
        precision = 1 / w
        return _Tables(
            precision=precision,
            log_volume=0.5 * w.log().sum(2),
            centre=time * self.offsets,
            rate=(time * self.spectra - left) * precision,
            drift=self.offsets * left * precision,
        )

    def _log_parts(self, y: Tensor, tables: _Tables) -> Tensor:
        pulled = tables.centre * tables.precision
        square = _against(y.square(), tables.precision) - 2 * _against(y, pulled)
        square = square + (tables.centre * pulled).sum(2)
        constant = self.weights.log() - 0.5 * y.shape[1] * LOG_2PI - tables.log_volume
        return constant - 0.5 * square

    def _along(self, y: Tensor, time: Tensor, divergence: bool) -> tuple[Tensor, Tensor]:
        """Velocity along the axes less that of the mean, (batch, d), and the divergence, (batch,)."""
        tables = self._tables(time)
        r = self._log_parts(y, tables).softmax(1)
        velocity = _mixed(r, tables.drift) + y * _mixed(r, tables.rate)
        if not divergence:
            return velocity, velocity.new_zeros(len(y))
        # of component k: score g_k = -(y - c_k)/w_k, velocity v_k = b_k + a_k y, and b_k y-free part of both
        bend = tables.rate * tables.precision
        slope = (tables.drift - tables.rate * tables.centre) * tables.precision
        still = (tables.centre * tables.drift * tables.precision).sum(2)
        along_score = still - _against(y.square(), bend) - _against(y, slope)
        score = _mixed(r, tables.centre * tables.precision) - y * _mixed(r, tables.precision)
        own = (r * (tables.rate.sum(2) + along_score)).sum(1)
        return velocity, own - (score * velocity).sum(1)


def _against(y: Tensor, table: Tensor) -> Tensor:
    """(batch, d) times (1 or batch, K, d), (batch, K)."""
    return y @ table[0].T if len(table) == 1 else torch.einsum("bd,bkd->bk", y, table)


def _mixed(r: Tensor, table: Tensor) -> Tensor:
    """(batch, K) times (1 or batch, K, d), (batch, d)."""
    return r @ table[0] if len(table) == 1 else torch.einsum("bk,bkd->bd", r, table)
