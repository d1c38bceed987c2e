"""The energy distance between two samples."""

from __future__ import annotations

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
    if min(len(a), len(b)) < 2:
        raise ValueError(f"an energy distance needs at least two points on each side, got {len(a)}, {len(b)}")
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])
