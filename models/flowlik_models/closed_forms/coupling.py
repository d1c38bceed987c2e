"""A paired coupling with everything in closed form: each data point of a mixture with a turned, noisy copy of it.

``x_0 = R x_1 + noise n`` in the plane, R a rotation. Given x_0 several modes are possible, so that a model of x_1
given x_0 has something to learn, and its density is known exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from flowlik_models.closed_forms.mixture import GaussianMixture


@dataclass(frozen=True)
class TurnedPairs:
    """Pairs (x_0, x_1) with x_1 from a planar ``truth``, turned by ``angle`` radians, ``noise`` its standard deviation.

    Raises:
        ValueError: the mixture is not in the plane.
    """

    truth: GaussianMixture
    angle: float = math.pi / 8
    noise: float = 0.7

    def __post_init__(self) -> None:
        """Check the dimension."""
        if self.truth.event_shape != (2,):
            raise ValueError("pairs are made in the plane, of a mixture in two dimensions")

    @cached_property
    def rotation(self) -> Tensor:
        """R, (2, 2) float64."""
        c, s = math.cos(self.angle), math.sin(self.angle)
        return torch.tensor([[c, -s], [s, c]], dtype=torch.float64)

    @cached_property
    def starts(self) -> GaussianMixture:
        """The density of x_0."""
        truth = self.truth
        stds = (truth.stds.square() + self.noise**2).sqrt()
        return GaussianMixture(
            truth.weights, truth.means @ self.rotation.T, stds, self.rotation @ truth.rotations
        )

    def pairs(self, data: Tensor, generator: torch.Generator) -> Tensor:
        """x_0 of the data points (n, 2)."""
        noise = torch.randn(data.shape, generator=generator).to(data)
        return data @ self.rotation.T.to(data) + self.noise * noise

    def log_prob(self, x: Tensor, cond: Tensor) -> Tensor:
        """log p(x_1 = x | x_0 = cond) in nats, (n,)."""
        apart = (cond - x @ self.rotation.T.to(x)).square().sum(1) / self.noise**2
        given = -0.5 * apart - math.log(2 * math.pi * self.noise**2)
        return self.truth.log_prob(x) + given - self.starts.log_prob(cond)
