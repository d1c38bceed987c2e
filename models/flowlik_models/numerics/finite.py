"""Whether numbers are finite, asked at every call: the quick answer first."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def all_finite(x: Tensor) -> bool:
    """Whether all numbers of x are finite.

    One that is not makes the sum so, which takes a fifth of the time to find; a sum that overflows is looked at
    number by number.

    >>> all_finite(torch.full((2,), 3e38)), all_finite(torch.tensor([torch.inf, -torch.inf, 0.0]))
    (True, False)
    """
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())
