"""Frechet distance between samples and real images, through torchmetrics with a feature network of our own.

Values are comparable only where extractor, number of samples and real images agree, so the record names the extractor;
the distance is called FID only where that is Inception.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.measures import resample_counts

Array = NDArray[np.float64]
PARTS = 4
BATCH = 512
RESAMPLES = 200


@dataclass(frozen=True, kw_only=True)
class Frechet:
    """The columns of a record: `frechet_se` comes from disjoint parts of the samples."""

    frechet: float
    frechet_se: float
    extractor: str
    n_samples: int


def frechet_distance(extractor: torch.nn.Module, real: Tensor, samples: Tensor) -> float:
    """Frechet distance of two sets of images, (n, *event) and (m, *event), in float64.

    Raises:
        ValueError: fewer than two images on a side, or samples that are not finite.
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


def frechet_with_error(
    extractor: torch.nn.Module, real: Tensor, samples: Tensor, parts: int = PARTS
) -> Frechet:
    """The distance of all samples, and a standard error from `parts` disjoint parts of them.

    The parts' own distances are biased upwards by their smaller size, all alike, so their spread over sqrt(parts) is
    taken as the standard error of the whole; NaN where a part would hold fewer than two images.
    """
    whole = frechet_distance(extractor, real, samples)
    size = len(samples) // parts
    error = math.nan
    if size >= 2:
        pieces = torch.split(samples[: size * parts], size)
        values = [frechet_distance(extractor, real, piece) for piece in pieces]
        error = float(np.std(values, ddof=1) / math.sqrt(parts))
    name = str(getattr(extractor, "name", type(extractor).__name__))
    return Frechet(frechet=whole, frechet_se=error, extractor=name, n_samples=len(samples))


def features_of(extractor: torch.nn.Module, x: Tensor) -> Tensor:
    """Features (n, f) of images (n, *event), float64."""
    with torch.no_grad():
        return torch.cat([extractor(part.float()).double() for part in torch.split(x, BATCH)])


def frechet_resampled(real: Array, samples: Array) -> Array:
    """Bootstrap values, (RESAMPLES,), of the distance of `samples` (m, f) from `real` (n, f), both features.

    Resampling with replacement adds to the distance what a finite sample adds, so these give its scatter, not its
    place. The real items are not resampled: all samplers of a task are held against the same ones. Sets of equal size
    share the resamples, so where they were drawn from the same noise, differences are paired.
    """
    mean, covariance = real.mean(0), np.cov(real, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0.0))) @ vectors.T
    found = []
    for counts in resample_counts(len(samples), RESAMPLES):
        centre = counts @ samples / len(samples)
        offset = samples - centre
        spread = (offset.T * counts) @ offset / (len(samples) - 1)
        shared = np.sqrt(np.linalg.eigvalsh(root @ spread @ root).clip(0.0)).sum()
        found.append(np.square(centre - mean).sum() + np.trace(spread) + np.trace(covariance) - 2 * shared)
    return np.array(found)


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
