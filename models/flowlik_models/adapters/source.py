r"""The law at the noisy end t_0: near the Gaussian with mean ``t_0 m`` and covariance ``t_0^2 C + (1 - t_0)^2 I``.

m and C are the data's moments (docs/math.md section 10). Where none are given, m = 0 and C = I: for a
variance-preserving path this is its own prior, N(0, I) before the change of clock.

How far off a source G is: with the field's own score at t_0, ``grad log p/G`` is known, so that ``r = log p/G`` follows
by a line integral from the mean, up to the constant that makes ``E_G exp(r) = 1``. The mean error of log p over the
data is ``E_p |r|``, ``E_G exp(r) |r|``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik_models.interfaces import Moments
from flowlik_models.moments import FULL_LIMIT, check, estimate
from flowlik_models.numerics.device_arrays import device_array
from flowlik_models.numerics.standard_normal import LOG_2PI

RANK = 256
"""Eigenpairs kept beyond `FULL_LIMIT` dimensions."""

SMALLEST_VARIANCE = 1e-9

LINE_NODES = 6
"""Of the rule along the line from the mean to a point."""

TINY = 1e-3
"""Nats a dimension by which log p moves if the data's mean is 1 off; a source nearer than that needs no word."""


class SourceWarning(UserWarning):
    """The source at the noisy end is not known well enough."""


class GaussianSource:
    """The Gaussian source of data with these moments (None: mean 0 and covariance I) at the time ``noisy_end``.

    >>> source = GaussianSource((2,), 0.25, None)
    >>> [round(value, 4) for value in source.log_prob(torch.zeros(1, 2)).tolist()]  # variance 1/16 + 9/16
    [-1.3679]
    """

    def __init__(self, event_shape: tuple[int, ...], noisy_end: float, moments: Moments | None) -> None:
        dim, t = math.prod(event_shape), noisy_end
        self.event_shape = event_shape
        self.assumed = moments is None
        """Whether mean 0 and covariance I stand in for moments that nobody gave."""
        self._mean = np.zeros(dim) if moments is None else t * moments.mean
        self._vectors = np.zeros((dim, 0)) if moments is None else moments.eigenvectors
        values = np.zeros(0) if moments is None else moments.eigenvalues
        rest = 1.0 if moments is None else moments.rest
        self._values = t**2 * values + (1 - t) ** 2
        self._rest = 1.0 if rest is None else t**2 * rest + (1 - t) ** 2
        self._dim, self._kept = dim, len(values)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x (batch, *event), (batch,) float64."""
        z = self._scaled(x.flatten(1).double() - self._tensor(self._mean, x), -0.5)
        log_det = float(np.log(self._values).sum()) + (self._dim - self._kept) * math.log(self._rest)
        return -0.5 * (z.square().sum(1) + log_det + self._dim * LOG_2PI)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws (n, *event), float32."""
        normal = torch.randn(
            (n, self._dim), generator=generator, device=generator.device, dtype=torch.float64
        )
        return self.from_normal(normal.view(n, *self.event_shape)).float()

    def from_normal(self, z: Tensor) -> Tensor:
        """Draws from standard normal ones (n, *event), in their dtype."""
        x = self._tensor(self._mean, z) + self._scaled(z.flatten(1).double(), 0.5)
        return x.view_as(z).to(z.dtype)

    def log_ratio(self, x: Tensor, score: Callable[[Tensor], Tensor]) -> Tensor:
        """log p/G at draws x (n, *event) of this law, (n,) float64, from the score of p (n, *event) -> (n, *event)."""
        nodes, weights = np.polynomial.legendre.leggauss(LINE_NODES)
        mean = self._tensor(self._mean, x).view(1, *self.event_shape)
        offset = x.double() - mean
        ratio = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
            share = (node + 1.0) / 2.0
            at = mean + share * offset
            own = -self._scaled(share * offset.flatten(1), -1.0)
            slope = score(at).flatten(1).double() - own
            ratio += weight / 2.0 * (slope * offset.flatten(1)).sum(1)
        constant = torch.logsumexp(ratio, 0) - math.log(len(x))
        centred: Tensor = ratio - constant
        return centred

    def divergence_from(self, other: GaussianSource) -> float:
        """KL(self || other) in nats, where the other's covariance is a multiple of I."""
        if other._kept:
            raise ValueError("the other source must have one variance")
        values = np.append(self._values, np.full(self._dim - self._kept, self._rest)) / other._rest
        off = np.square(self._mean - other._mean).sum() / other._rest
        return float(0.5 * (off + (values - 1.0 - np.log(values)).sum()))

    def _scaled(self, z: Tensor, power: float) -> Tensor:
        """C_0^power z, (batch, d)."""
        vectors = self._tensor(self._vectors, z)
        along = z @ vectors
        rest = self._rest**power
        values = self._tensor(self._values, z) ** power
        scaled: Tensor = rest * z + (along * (values - rest)) @ vectors.T
        return scaled

    def _tensor(self, array: np.ndarray, like: Tensor) -> Tensor:
        return device_array(array, torch.float64, like.device)


def moments_of(data: Any, event_shape: tuple[int, ...]) -> Moments:
    """Moments, as they are or of training data (n, *event).

    Raises:
        ValueError: moments or data of another event shape, or what is neither.
    """
    if isinstance(data, Moments):
        check(data, event_shape)
        return data
    if not isinstance(data, (Tensor, np.ndarray)):
        raise ValueError(f"moments must be training data (n, *event) or Moments, got {type(data).__name__}")
    rows = _rows(data)
    if tuple(rows.shape[1:]) != event_shape:
        raise ValueError(
            f"moments: data of shape {tuple(rows.shape)}, expected (n, {', '.join(map(str, event_shape))})"
        )
    dim = math.prod(event_shape)
    rank = None if dim <= FULL_LIMIT else min(RANK, len(rows) - 1)
    digest = hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=8).hexdigest()
    return estimate(rows, digest, rank, floor=SMALLEST_VARIANCE)


def matters(t: float) -> bool:
    """Whether what the data are moves the source at t by more than `TINY` nats a dimension."""
    return worst(t, 1) > TINY


def worst(t: float, dim: int) -> float:
    """Nats by which log p moves if the data's mean is 1 in every dimension instead of 0."""
    return dim * t**2 / (2 * (t**2 + (1 - t) ** 2))


def _rows(data: Any) -> np.ndarray:
    array: np.ndarray = data.detach().cpu().numpy() if isinstance(data, Tensor) else np.asarray(data)
    return array
