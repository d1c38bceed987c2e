"""The energy distance between two samples."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of two sets of points (n, d) and (m, d), unbiased; 0 where the laws agree.

    Raises:
        ValueError: fewer than two points on a side.

    >>> a = torch.tensor([[0.0], [1.0]])
    >>> energy_distance(a, a + 10.0)
    18.0
    """
    return energy_distance_and_error(a, b)[0]


def energy_distance_and_error(real: Tensor, samples: Tensor) -> tuple[float, float]:
    """The energy distance, and its standard error over draws of the samples, the real points held fixed.

    The distance is, but for a constant, the mean of g_ij = |x_i - R| + |x_j - R| - |x_i - x_j| over pairs of samples,
    |x - R| the mean over the real points: a U-statistic, whose variance is ``(4 (n - 2) v_1 + 2 v_2)/(n (n - 1))``, v_2
    the variance of g and v_1 that of its mean over j, less the noise of that mean; at least half of what it is where
    the laws are equal (v_1 = 0). NaN below four samples.

    Raises:
        ValueError: fewer than two points on a side.
    """
    if min(len(real), len(samples)) < 2:
        raise ValueError(
            f"an energy distance needs at least two points on each side, got {len(real)}, {len(samples)}"
        )
    n, m = len(samples), len(real)
    to_real = _distances(samples, real).mean(1)
    within_real = float(_distances(real, real).sum()) / (m * (m - 1))
    pairs = to_real[:, None] + to_real - _distances(samples, samples)
    pairs.fill_diagonal_(0.0)
    total = float(pairs.sum()) / (n * (n - 1))
    if n < 4:
        return total - within_real, math.nan
    of_pairs = max(float(pairs.square().sum()) / (n * (n - 1)) - total**2, 0.0)
    of_items = float((pairs.sum(1) / (n - 1)).var())
    of_items = (of_items - of_pairs / (n - 1)) * (n - 1) / (n - 2)
    variance = max(4 * (n - 2) * of_items + 2 * of_pairs, of_pairs) / (n * (n - 1))
    return total - within_real, math.sqrt(variance)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances (n, m) by differences: products lose the small ones of points far from zero."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
