"""How samples and real items overlap in a feature space: precision, recall and the kernel distance.

Precision and recall after Kynkaanniemi et al. 2019 (arXiv 1904.06991): a set's manifold is the union of balls around
its points that reach to their k-th nearest neighbour; precision is the share of samples inside the real manifold
(quality), recall the share of real items inside the samples' (variety). Both depend on the sizes of the two sets.

The kernel distance after Binkowski et al. 2018 (arXiv 1801.01401, KID where the features are Inception's) is the
squared maximum mean discrepancy with the kernel (x.y/d + 1)^3, estimated without bias from all pairs, so that it may
come out below zero and has no noise from drawn subsets.

Both take blocks of rows at a time: memory grows with one set, never with the product of the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

NEIGHBOURS = 3
_ROWS = 1024
_ROUNDING = 1e-12


def precision_recall(
    real: Tensor, samples: Tensor, neighbours: int = NEIGHBOURS, *, real_radii: Tensor | None = None
) -> tuple[float, float]:
    """Precision and recall of `samples` (m, d) against `real` (n, d), both features; `real_radii` where known.

    Raises:
        ValueError: a set has no more than `neighbours` points, or the widths differ.

    >>> real = torch.arange(8.0)[:, None]
    >>> precision_recall(real, real[:4] + 0.1)
    (1.0, 0.875)
    """
    _check(real, samples, neighbours + 1)
    around_real = radii(real, neighbours) if real_radii is None else real_radii
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part in torch.split(samples, _ROWS):
        apart = _distances(part, real)
        precise.append((apart <= around_real).any(1))
        recalled |= (apart <= _reach(part, samples, neighbours)[:, None]).any(0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def radii(features: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """How far it is from each point (n, d) to its k-th nearest other point, (n,)."""
    return torch.cat([_reach(part, features, neighbours) for part in torch.split(features, _ROWS)])


def _reach(points: Tensor, among: Tensor, neighbours: int) -> Tensor:
    return _distances(points, among).kthvalue(neighbours + 1, dim=1).values


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (n, m) by products, which at 2048 features take a twentieth of the time that differences do."""
    a, b = a.double(), b.double()
    sizes = a.square().sum(1)[:, None] + b.square().sum(1)
    squares = sizes - 2 * a @ b.T
    # of equal points exactly zero: what rounding leaves is set aside
    return torch.where(squares > _ROUNDING * sizes, squares, 0.0).sqrt()


def kernel_distance(real: Tensor, samples: Tensor, *, within_real: float | None = None) -> float:
    """Squared maximum mean discrepancy of two sets of features (n, d) and (m, d), unbiased.

    `within_real` is `mean_kernel(real)` where it is known.

    Raises:
        ValueError: a set has fewer than two points, or the widths differ.

    >>> a, b = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0], [6.0], [7.0]])
    >>> kernel_distance(a, b) > 0
    True
    """
    _check(real, samples, 2)
    within = mean_kernel(real) if within_real is None else within_real
    between = sum(_kernel(part, samples).sum() for part in torch.split(real, _ROWS))
    return within + mean_kernel(samples) - 2 * float(between) / (len(real) * len(samples))


def mean_kernel(features: Tensor) -> float:
    """Mean of the kernel over all pairs of different points of a set (n, d)."""
    n = len(features)
    total = sum(_kernel(part, features).sum() for part in torch.split(features, _ROWS))
    own = ((features.double().square().sum(1) / features.shape[1] + 1.0) ** 3).sum()
    return float(total - own) / (n * (n - 1))


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
