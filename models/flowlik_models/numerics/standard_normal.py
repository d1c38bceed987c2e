"""N(0, I): its log-density and its draws."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_2PI = math.log(2.0 * math.pi)


def standard_normal_log_prob(x: Tensor) -> Tensor:
    """log N(x; 0, I) in float64 nats, (batch,).

    >>> [round(value, 4) for value in standard_normal_log_prob(torch.zeros(1, 2)).tolist()]
    [-1.8379]
    """
    z = x.flatten(1).double()
    return -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * LOG_2PI


class StandardNormal:
    """N(0, I) on events of one shape, as the source of a model."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        self.event_shape = event_shape

    def log_prob(self, x: Tensor) -> Tensor:
        """log N(x; 0, I), (batch,) float64."""
        return standard_normal_log_prob(x)

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """n draws (n, *event), float32."""
        return torch.randn((n, *self.event_shape), generator=generator, device=generator.device)

    def from_normal(self, z: Tensor) -> Tensor:
        """The draws themselves."""
        return z
