"""Frechet distance between samples and real images: that of the normal laws fitted to their features.

Values are comparable only where extractor, number of samples and real images agree, so the record names the extractor;
the distance is called FID only where that is Inception. With S the covariance of the real features, C that of the
samples' and m, mu their means it is |mu - m|^2 + tr S + tr C - 2 tr (S^1/2 C S^1/2)^1/2, in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import resample_counts

BATCH = 512
RESAMPLES = 200
ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """The columns of a record, and the bootstrap values (RESAMPLES,) of the distance; the scatter of both is that of
    the distance's first-order expansion (`expanded`)."""

    frechet: float
    frechet_se: float
    resampled: Array


@dataclass(frozen=True, eq=False)
class Normal:
    """Mean (f,) and covariance (f, f) of features, float64."""

    mean: Tensor
    covariance: Tensor

    @cached_property
    def factor(self) -> Tensor:
        """L with covariance L L^T, (f, f)."""
        values, vectors = torch.linalg.eigh(self.covariance)
        scaled: Tensor = vectors * values.clamp(min=0.0).sqrt()
        return scaled


class Sums:
    """Sums over features that come in pieces, for their mean and covariance; taken about the first piece's mean."""

    def __init__(self) -> None:
        self.count = 0
        self.about, self.total, self.square = (torch.zeros((), dtype=torch.float64) for _ in range(3))

    def add(self, features: Tensor) -> None:
        """Take in features (k, f)."""
        for part in torch.split(features, ROWS):
            x = part.double()
            self.about = self.about if self.count else x.mean(0)
            x = x - self.about
            self.count += len(x)
            self.total = self.total + x.sum(0)
            self.square = self.square + x.T @ x

    def normal(self) -> Normal:
        """The law fitted so far.

        Raises:
            ValueError: fewer than two items came.
        """
        if self.count < 2:
            raise ValueError("a Frechet distance needs at least two images on each side")
        mean = self.total / self.count
        square = self.square - self.count * torch.outer(mean, mean)
        return Normal(self.about + mean, square / (self.count - 1))


def normal_of(features: Tensor) -> Normal:
    """The normal law fitted to features (n, f); ValueError where there are fewer than two.

    >>> normal_of(torch.tensor([[0.0, 0.0], [2.0, 0.0]])).mean.tolist()
    [1.0, 0.0]
    """
    sums = Sums()
    sums.add(features)
    return sums.normal()


Way = Callable[[Normal, Normal, Tensor], tuple[Tensor, Tensor]]


def features_of(extractor: Any, x: Tensor) -> Tensor:
    """Features (n, f) float32 of images (n, *event), a few images at a time."""
    parts = torch.split(x, getattr(extractor, "at_once", BATCH))
    with torch.no_grad():
        return torch.cat([extractor(part if part.dtype == torch.uint8 else part.float()) for part in parts])


def frechet(real: Normal, samples: Tensor) -> Frechet:
    """The distance of features (n, f) of samples from the real ones, with its scatter over draws of the samples.

    Standard error and bootstrap values are those of the distance's first-order expansion in the empirical law. The real
    items are not resampled: all samplers of a task are held against the same ones. Sets of equal size share the
    resamples, so where they were drawn from the same noise, differences are paired.

    Raises:
        ValueError: fewer than two samples, or features that are not finite.
    """
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("features of samples hold NaN or infinity")
    value, influence = expanded(real, samples)
    error = _standard_error(real, samples, influence)
    return Frechet(frechet=value, frechet_se=error, resampled=_resampled(value, influence, error))


def frechet_resampled(real: Normal, samples: Tensor) -> Array:
    """The bootstrap values of `frechet`, (RESAMPLES,), of features (n, f) of samples."""
    return frechet(real, samples).resampled


def _resampled(value: float, influence: Array, error: float) -> Array:
    """Bootstrap values of the expansion, with the scatter of the standard error."""
    n = len(influence)
    plain = float(influence.std(ddof=1)) / math.sqrt(n)
    return np.asarray(
        value + (error / plain if plain > 0 else 1.0) * (resample_counts(n, RESAMPLES) @ influence) / n
    )


def _standard_error(real: Normal, samples: Tensor, influence: Array) -> float:
    """That of the distance, from how each sample moves it.

    The noise of the influence itself adds to its variance twice what it adds to the distance's, the whole of it where
    the two laws are equal. The covariance of two influences, each of one half of the samples, has nothing of it, so
    their mean is right; where a half has fewer samples than features the plain variance stays, which is too large.
    """
    n = len(samples)
    variance = float(influence.var(ddof=1))
    if n // 2 > samples.shape[1]:
        parts = (_influence(real, normal_of(half), samples, _many)[1] for half in samples.chunk(2))
        one, other = (part - part.mean() for part in parts)
        variance = (variance + max(float((one * other).sum()) / (n - 1), 0.0)) / 2
    return math.sqrt(variance / n)


def expanded(real: Normal, samples: Tensor) -> tuple[float, Array]:
    """The distance of features (n, f) from the real law, and by how much each sample moves it, (n,).

    To first order the distance of a reweighted sample is the value plus the weighted mean of
    ``2 (mu - m).y + y.(1 - T) y - tr (1 - T) C``, y = x - mu, where T is the symmetric map that carries the samples'
    normal law to the real one, ``T C T = S`` (docs/math.md section 9). Its spread over sqrt(n) is the standard error,
    somewhat too large where the laws are nearly equal (`_standard_error`).

    Raises:
        ValueError: fewer than two samples.
    """
    n, width = samples.shape
    value, influence = _influence(real, normal_of(samples), samples, _few if n <= width else _many)
    return float(value), influence.cpu().numpy()


def _influence(real: Normal, fitted: Normal, points: Tensor, way: Way) -> tuple[Tensor, Tensor]:
    """The distance of a fitted law from the real one, and by how much points (n, f) would move it, (n,)."""
    device = points.device
    shared, carried = way(real, fitted, points)
    gap = fitted.mean - real.mean.to(device)
    trace = fitted.covariance.trace()
    value = gap.square().sum() + real.covariance.trace().to(device) + trace - 2 * shared
    moves = [
        2 * y @ gap + y.square().sum(1) for y in (p.double() - fitted.mean for p in torch.split(points, ROWS))
    ]
    return value, torch.cat(moves) - carried - (trace - shared)


def _many(real: Normal, fitted: Normal, samples: Tensor) -> tuple[Tensor, Tensor]:
    """tr (S^1/2 C S^1/2)^1/2, and y.T y of each sample, through f x f matrices."""
    factor = real.factor.to(samples.device)
    values, vectors = torch.linalg.eigh(factor.T @ fitted.covariance @ factor)
    root = values.clamp(min=0.0).sqrt()
    known = values > len(values) * torch.finfo(torch.float64).eps * values[-1]
    inverse = torch.where(known, root, 1.0).rsqrt() * known
    half = (factor @ vectors) * inverse
    carried = [((part.double() - fitted.mean) @ half).square().sum(1) for part in torch.split(samples, ROWS)]
    return root.sum(), torch.cat(carried)


def _few(real: Normal, fitted: Normal, samples: Tensor) -> tuple[Tensor, Tensor]:
    """The same through n x n matrices, where there are fewer samples than features."""
    y = samples.double() - fitted.mean
    values, vectors = torch.linalg.eigh(y @ real.covariance.to(y.device) @ y.T / (len(y) - 1))
    root = values.clamp(min=0.0).sqrt()
    return root.sum(), (len(samples) - 1) * vectors.square() @ root


def frechet_distance(extractor: torch.nn.Module, real: Tensor, samples: Tensor) -> float:
    """Frechet distance of two sets of images, (n, *event) and (m, *event), by torchmetrics, in float64.

    Raises:
        ValueError: fewer than two images on a side, or samples that are not finite.

    >>> x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    >>> same = torch.nn.Identity()
    >>> same.num_features = 2
    >>> round(frechet_distance(same, x, x + 3.0), 2)  # the squared distance of the means
    18.0
    """
    if len(real) < 2 or len(samples) < 2:
        raise ValueError("a Frechet distance needs at least two images on each side")
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("samples hold NaN or infinity")
    with _quiet():
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric: Any = FrechetInceptionDistance(feature=_Double(extractor)).to(samples.device)
    with torch.no_grad():
        for images, is_real in ((real, True), (samples, False)):
            for part in torch.split(images, BATCH):
                metric.update(part, real=is_real)
        return float(metric.compute())


class _Double(torch.nn.Module):
    """Hands the metric float64 features, so that it computes and returns in float64."""

    def __init__(self, extractor: torch.nn.Module) -> None:
        super().__init__()
        self.extractor = extractor
        self.num_features = int(extractor.num_features)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.extractor(x.float())
        return features.double()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
