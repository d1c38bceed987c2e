"""The log-density of N(0, I)."""

from __future__ import annotations

import math

from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """log N(x; 0, I) in float64 nats, (batch,).

    >>> import torch
    >>> [round(value, 4) for value in standard_normal_log_prob(torch.zeros(1, 2)).tolist()]
    [-1.8379]
    """
    z = x.flatten(1).double()
    return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * LOG_2PI
