r"""Self-guidance: a few-step sampler that first moves its noise towards higher predicted likelihood.

F2D2, arXiv 2512.02636; docs/math.md section 3. From x_0 ~ N(0, I) the sample's log-density is predicted in one
evaluation, ``log N(x_0; 0, I) - D(x_0, 0, 1)``; Adam takes ``updates`` steps on x_0 against it; the map then samples
from where they end.

Cost of a sample: `steps` forwards, and one forward and one vjp an update along ``likelihood`` or ``random``; none
along ``prior``, whose gradient is x_0 itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Run, Samples
from flowlik_estimators.f2d2 import F2D2
from flowlik_estimators.registry import register
from flowlik_models.interfaces import source_of
from flowlik_models.numerics import random
from flowlik_models.numerics.streams import DIRECTION_STREAM

Direction = Literal["likelihood", "prior", "random"]


@register("self-guidance")
@dataclass(frozen=True, kw_only=True)
class SelfGuidance(F2D2):
    """F2D2 that samples from guided noise: ``updates`` Adam steps of ``step_size`` on x_0 (betas 0.9 and 0.999).

    ``direction``: likelihood, the published one; and two controls: prior, the same steps on ``log N(x_0; 0, I)``
    alone, which only shrinks the noise; random, as far from x_0 as the likelihood would have gone, another way.

    The density of guided samples is not known, since moving the noise changes its law, so samples come without one.
    `log_prob` is that of the map, as F2D2 gives it: guidance moves samples, not the density.
    """

    differentiates = True
    steps: int = 2
    updates: int = 1
    step_size: float = 0.05
    direction: Direction = "likelihood"

    def supports(self, model: object) -> str | None:
        """Needs a joint map that starts from N(0, I), whose gradient the updates take."""
        own = source_of(model) is not None
        return super().supports(model) or ("needs a model that starts from N(0, I) at t = 0" if own else None)

    def _check(self) -> None:
        super()._check()
        self._at_least_one("updates")
        if not self.step_size > 0.0:
            raise ValueError(f"{self.name}: step_size must be positive, got {self.step_size}")

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        moved = self._moved(model, x0, run)
        if self.direction == "random":
            moved = x0 + _turned(moved - x0, run)
        return super()._sample(model, moved, run, log_prob=False)

    def _moved(self, model: Any, x0: Tensor, run: Run) -> Tensor:
        """x_0 after the updates, (batch, *event)."""
        x = x0.detach().clone()
        adam = torch.optim.Adam([x], lr=self.step_size)
        for _ in range(self.updates):
            # the gradient of -log N(x; 0, I) is x, that of the integral needs the network
            x.grad = x.clone() if self.direction == "prior" else x + _slope(model, x, run)
            adam.step()
        return x


def _slope(model: Any, x: Tensor, run: Run) -> Tensor:
    """Gradient in x of the predicted integral of the divergence from 0 to the data end, (batch, *event)."""
    with torch.enable_grad():
        point = x.detach().requires_grad_()
        _, divergence = model.joint(point, run.at(0.0), run.at(run.data_end), cond=run.cond)
        total = run.data_end * run.scalar(divergence, "average divergence").sum()
        if not total.requires_grad:  # the same everywhere, as for one Gaussian
            return torch.zeros_like(x)
        (slope,) = torch.autograd.grad(total, point)
    return slope


def _turned(offset: Tensor, run: Run) -> Tensor:
    """Vectors as long as ``offset``, (batch, *event), in directions that are uniform on the sphere."""
    other = random.gaussian(
        run.key, run.items, run.event_shape, stream=DIRECTION_STREAM, dtype=run.dtype, device=run.device
    ).flatten(1)
    length = offset.flatten(1).norm(dim=1, keepdim=True)
    turned: Tensor = other * (length / other.norm(dim=1, keepdim=True))
    return turned.reshape(offset.shape)
