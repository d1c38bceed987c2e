"""Frechet distance between samples and real images: that of the normal laws fitted to their features.

Values are comparable only where extractor, number of samples and real images agree, so the record names the extractor;
the distance is called FID only where that is Inception. With S the covariance of the real features, C that of the
samples' and m, mu their means it is |mu - m|^2 + tr S + tr C - 2 tr (S^1/2 C S^1/2)^1/2, in float64.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import resample_counts

PARTS = 4
BATCH = 512
RESAMPLES = 200
WIDE = 512
"""Features above which a distance's scatter comes from its first-order expansion: at 2048 features and 50,000 samples
one resample takes ten seconds of a core, half an hour all of them; the expansion takes half a minute in all."""

ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """The columns of a record, and the bootstrap values (RESAMPLES,) of the distance.

    `frechet_se` comes from disjoint parts of the samples, for more than `WIDE` features from the expansion.
    """

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


def features_of(extractor: Any, x: Tensor) -> Tensor:
    """Features (n, f) float32 of images (n, *event), a few images at a time."""
    parts = torch.split(x, getattr(extractor, "at_once", BATCH))
    with torch.no_grad():
        return torch.cat([extractor(part if part.dtype == torch.uint8 else part.float()) for part in parts])


def frechet(real: Normal, samples: Tensor, parts: int = PARTS) -> Frechet:
    """The distance of features (n, f) of samples from the real ones, with its scatter over draws of the samples.

    Up to `WIDE` features the standard error is the spread over `parts` disjoint parts of the samples, whose distances
    are biased upwards by their smaller size, all alike; NaN where a part would hold fewer than two. Beyond it is that
    of the distance's first-order expansion in the empirical law (`expanded`), of which the bootstrap values are taken
    too.

    Raises:
        ValueError: fewer than two samples, or features that are not finite.
    """
    if not bool(torch.isfinite(samples).all()):
        raise ValueError("features of samples hold NaN or infinity")
    value, influence = expanded(real, samples)
    n = len(samples)
    if samples.shape[1] > WIDE:
        error = float(influence.std(ddof=1)) / math.sqrt(n)
        return Frechet(
            frechet=value,
            frechet_se=error,
            resampled=value + resample_counts(n, RESAMPLES) @ influence / n,
        )
    error = math.nan
    if (size := n // parts) >= 2:
        values = [expanded(real, part)[0] for part in torch.split(samples[: size * parts], size)]
        error = float(np.std(values, ddof=1) / math.sqrt(parts))
    return Frechet(frechet=value, frechet_se=error, resampled=frechet_resampled(real, samples))


def expanded(real: Normal, samples: Tensor) -> tuple[float, Array]:
    """The distance of features (n, f) from the real law, and by how much each sample moves it, (n,).

    To first order the distance of a reweighted sample is the value plus the weighted mean of
    ``2 (mu - m).y + y.(1 - T) y - tr (1 - T) C``, y = x - mu, where T is the symmetric map that carries the samples'
    normal law to the real one, ``T C T = S`` (docs/math.md section 9). Its spread over sqrt(n) is the standard error.

    Raises:
        ValueError: fewer than two samples.
    """
    n, width = samples.shape
    device = samples.device
    fitted = normal_of(samples)
    shared, carried = (_few if n <= width else _many)(real, fitted, samples)
    gap = fitted.mean - real.mean.to(device)
    trace = fitted.covariance.trace()
    value = gap.square().sum() + real.covariance.trace().to(device) + trace - 2 * shared
    moves = [
        2 * y @ gap + y.square().sum(1)
        for y in (p.double() - fitted.mean for p in torch.split(samples, ROWS))
    ]
    influence = torch.cat(moves) - carried - (trace - shared)
    return float(value), influence.cpu().numpy()


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


def frechet_resampled(real: Normal, samples: Tensor) -> Array:
    """Bootstrap values, (RESAMPLES,), of the distance of features (m, f) of samples from the real ones.

    Resampling with replacement adds to the distance what a finite sample adds, so these give its scatter, not its
    place. The real items are not resampled: all samplers of a task are held against the same ones. Sets of equal size
    share the resamples, so where they were drawn from the same noise, differences are paired.
    """
    factor, mean = real.factor.cpu().numpy(), real.mean.cpu().numpy()
    trace = float(real.covariance.trace())
    x = samples.double().cpu().numpy()
    found = []
    for counts in resample_counts(len(x), RESAMPLES):
        centre = counts @ x / len(x)
        offset = x - centre
        spread = (offset.T * counts) @ offset / (len(x) - 1)
        shared = np.sqrt(np.linalg.eigvalsh(factor.T @ spread @ factor).clip(0.0)).sum()
        found.append(np.square(centre - mean).sum() + np.trace(spread) + trace - 2 * shared)
    return np.array(found)


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
