"""How samples and real items overlap in a feature space: precision, recall and the kernel distance.

Precision and recall after Kynkaanniemi et al. 2019 (arXiv 1904.06991): a set's manifold is the union of balls around
its points that reach to their k-th nearest neighbour; precision is the share of samples inside the real manifold
(quality), recall the share of real items inside the samples' (variety). Both depend on the sizes of the two sets.

The kernel distance after Binkowski et al. 2018 (arXiv 1801.01401, KID where the features are Inception's) is the
squared maximum mean discrepancy with the kernel (x.y/d + 1)^3, estimated without bias from all pairs, so that it may
come out below zero and has no noise from drawn subsets.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
_ROWS = 1024


def precision_recall(real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision and recall of `samples` (m, d) against `real` (n, d), both features.

    Raises:
        ValueError: a set has no more than `neighbours` points, or the widths differ.
    """
    _check(real, samples, neighbours + 1)
    return _covered(real, samples, neighbours), _covered(samples, real, neighbours)


def _covered(centres: Tensor, points: Tensor, neighbours: int) -> float:
    """Share of `points` that lie in a ball around a centre, balls reaching to its k-th nearest other centre."""
    radius = torch.cat(
        [
            _distances(part, centres).kthvalue(neighbours + 1, dim=1).values
            for part in torch.split(centres, _ROWS)
        ]
    )
    inside = [(_distances(part, centres) <= radius).any(1) for part in torch.split(points, _ROWS)]
    return float(torch.cat(inside).double().mean())


def _distances(a: Tensor, b: Tensor) -> Tensor:
    # differences, not products: the distance of a point to itself must be exactly zero
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def kernel_distance(real: Tensor, samples: Tensor) -> float:
    """Squared maximum mean discrepancy of two sets of features (n, d) and (m, d), unbiased.

    Raises:
        ValueError: a set has fewer than two points, or the widths differ.
    """
    _check(real, samples, 2)
    within = [_mean_without_diagonal(features) for features in (real, samples)]
    return float(within[0] + within[1] - 2 * _kernel(real, samples).mean())


def _mean_without_diagonal(features: Tensor) -> Tensor:
    n = len(features)
    values = _kernel(features, features)
    return (values.sum() - values.diagonal().sum()) / (n * (n - 1))


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    return (a.double() @ b.double().T / a.shape[1] + 1.0) ** 3


def _check(real: Tensor, samples: Tensor, fewest: int) -> None:
    if real.ndim != 2 or samples.ndim != 2 or real.shape[1] != samples.shape[1]:
        raise ValueError(
            f"expected features (n, d) and (m, d), got {tuple(real.shape)} and {tuple(samples.shape)}"
        )
    if min(len(real), len(samples)) < fewest:
        raise ValueError(
            f"expected at least {fewest} points on each side, got {len(real)} and {len(samples)}"
        )
