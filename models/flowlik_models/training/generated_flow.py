"""The law of a one-step generator as a teacher: its samples, and its fake model as the field with exact divergence."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from flowlik_models.interfaces import can
from flowlik_models.objectives.divergence_target import DivergenceTarget

_EXACT = DivergenceTarget(trace="exact")


class GeneratedFlow:
    """What training asks of a closed form, answered by a one-step generator and the fake model fitted to it.

    Networks are evaluated in float64, on the CPU; d reverse products a divergence.

    Raises:
        ValueError: the model has no fake model whose ODE is the generator's.
    """

    def __init__(self, model: Any) -> None:
        if not can(model, "fake flow") or not model.fake_is_flow:
            raise ValueError(
                "the teacher has no fake model whose ODE is its generator's; train one with settle"
            )
        self.model = copy.deepcopy(model).double().eval().requires_grad_(False)
        self.event_shape: tuple[int, ...] = model.event_shape
        self.eps = 0.0

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
        """``n`` draws of the generator, (n, *event)."""
        z = torch.randn((n, *self.event_shape), generator=generator, dtype=torch.float64)
        drawn: Tensor = self.model.generate(z)
        return drawn.to(dtype)

    def velocity_and_divergence(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The fake model's velocity (batch, *event) and its divergence (batch,), in x's dtype."""
        unused = torch.Generator()  # an exact trace draws nothing
        velocity, divergence = _EXACT(self.model.fake, x.double(), t.double(), unused)
        return velocity.to(x), divergence.to(x)
