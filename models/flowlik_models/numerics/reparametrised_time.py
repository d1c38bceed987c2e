"""A time in which a field that is stiff at the data is not: r = log((t + a)/(1 - t + b)).

Equal steps in r resolve 1 - t down to about b, and t down to about a.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

NEAR_NOISE = 0.1
"""The a of the rule behind converged likelihoods, of the networks' time features and of training times."""

Number = TypeVar("Number", float, Tensor)


@dataclass(frozen=True)
class ReparametrisedTime:
    """r = log((t + near_noise)/(1 - t + near_data)), its inverse and dt/dr.

    r of a number is a number; t and dt/dr are arrays for arrays and tensors for tensors.
    """

    near_data: float
    near_noise: float = NEAR_NOISE

    def at(self, t: Number) -> Number:
        """r at the time t."""
        if isinstance(t, Tensor):
            return torch.log((t + self.near_noise) / (1 - t + self.near_data))
        return math.log((t + self.near_noise) / (1 - t + self.near_data))

    def time(self, r: Any) -> Any:
        """t at r."""
        e = _exp(r)
        return ((1 + self.near_data) * e - self.near_noise) / (1 + e)

    def slope(self, r: Any) -> Any:
        """dt/dr at r."""
        e = _exp(r)
        return self._span * e / (1 + e) ** 2

    def time_and_slope(self, r: Tensor, rate: float = 1.0) -> tuple[Tensor, Tensor]:
        """t and ``rate`` dt/dr; to rounding the same as above, without overflow at any r."""
        share = torch.sigmoid(r)
        return self._span * share - self.near_noise, self._span * rate * share * (1.0 - share)

    @property
    def _span(self) -> float:
        return 1.0 + self.near_data + self.near_noise


def _exp(r: Any) -> Any:
    return r.exp() if isinstance(r, Tensor) else np.exp(r)
