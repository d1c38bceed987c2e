"""Midpoint steps, and a Gaussian ten times as long as it is wide: an estimator and a task for flowlik."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowlik.tasks.closed_forms import ClosedFormTask
from flowlik.tasks.task import digest
from flowlik_estimators import Estimate, Estimator, Run, Samples, register, standard_normal_log_prob
from flowlik_models.closed_forms.gaussian import Gaussian


@register("midpoint")
@dataclass(frozen=True, kw_only=True)
class Midpoint(Estimator):
    """Midpoint steps where the divergence comes with the velocity. Cost: two evaluations a step."""

    family = "ode"
    exact_to: ClassVar[float] = 0.05  # nats on a Gaussian, with 64 steps

    steps: int = 64

    def _check(self) -> None:
        self._at_least_one("steps")

    def supports(self, model: object) -> str | None:
        """Needs the closed-form divergence."""
        return None if hasattr(model, "velocity_and_divergence") else "needs velocity_and_divergence"

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        x0, integral = self._walk(model, x, run, start=run.data_end, end=0.0)
        return Estimate(log_prob=standard_normal_log_prob(x0) + integral)

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        x, integral = self._walk(model, x0, run, start=0.0, end=run.data_end)
        return Samples(x=x, log_prob=standard_normal_log_prob(x0) - integral if log_prob else None)

    def _walk(self, model: Any, x: Tensor, run: Run, *, start: float, end: float) -> tuple[Tensor, Tensor]:
        integral = run.zeros()
        for t, s in pairwise(run.times("uniform", self.steps, start, end)):
            halfway = x + (s - t) / 2 * run.velocity(model, x, run.at(t))
            v, div = model.velocity_and_divergence(halfway, run.at((t + s) / 2), cond=run.cond)
            x = x + (s - t) * run.event(v, "velocity")
            integral = integral + (s - t) * run.scalar(div, "divergence")
            run.stepped()
        return x, integral


@dataclass(frozen=True, kw_only=True)
class Cigar(ClosedFormTask):
    """N(0, diag(1, 0.01)); its only model is the closed form."""

    id: str = "cigar-2d"
    event_shape: tuple[int, ...] = (2,)
    description: str = "a Gaussian ten times as long as it is wide"

    @cached_property
    def truth(self) -> Gaussian:
        """The closed form."""
        return Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 0.01])))

    @property
    def models(self) -> tuple[str, ...]:
        """The closed form."""
        return ("closed-form",)

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """The closed form on a device, named by its constants."""
        return self.truth.to(device), self.data_hash("test")

    def data_hash(self, split: str) -> str:
        """Names constants and split."""
        return digest(self.id, self.version, split)
