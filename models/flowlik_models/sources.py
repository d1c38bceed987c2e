"""Where training batches come from: the exact field of a closed form, images, or a trained teacher on images."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from .data import DIGITS_LEVELS, dequantise, digits
from .networks.embedding import stretched_time, unstretched_time
from .objectives.batch import Batch
from .recipes import Recipe
from .trajectories import Paths, velocity_and_divergence


class Source(Protocol):
    """Draws the batch of one step from a generator."""

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """The batch, on the CPU or on the source's device."""
        ...


def _times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """(n,) times in [0, end], a share of them uniform in the stretched time; stratified."""
    unit = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    low, high = stretched_time(torch.tensor([0.0, end]), recipe.delta)
    near = unstretched_time(low + (high - low) * unit, recipe.delta).clamp(0, end)
    return torch.where(torch.rand(n, generator=generator) < recipe.stretched, near, end * unit)


def draw_times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target times (n,), independent, so that both orders are trained; shares on s = t and at the ends."""
    t, s = _times(n, end, recipe, generator), _times(n, end, recipe, generator)
    kind = torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 0.0, end)
    s = torch.where(kind < recipe.ends, side, s)
    return t, torch.where(kind > 1 - recipe.diagonal, t, s)


def _path(data: Tensor, t: Tensor, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Points on the straight path, a share of them moved off it by further noise, and the noise itself."""
    noise = torch.randn(data.shape, generator=generator)
    time = t.reshape(-1, *([1] * (data.ndim - 1)))
    moved = torch.rand(len(t), generator=generator) < recipe.altered
    unit = torch.rand(len(t), generator=generator)
    if recipe.altered_law == "along":
        factor = torch.where(moved, recipe.altered_scale**unit, torch.ones_like(unit)).reshape(time.shape)
        return time * data + (1 - time) * factor * noise, noise
    extra = moved * unit * recipe.altered_scale
    spread = ((1 - time).square() + extra.reshape(time.shape).square()).sqrt()
    return time * data + spread * noise, noise


class ClosedFormSource:
    """The exact field and its exact divergence at points on and around the path."""

    def __init__(self, truth: Any) -> None:
        self.truth = truth

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """One batch with exact targets."""
        data = self.truth.sample(recipe.batch, generator=generator)
        t, s = draw_times(recipe.batch, 1 - self.truth.eps, recipe, generator)
        x, _ = _path(data, t, recipe, generator)
        velocity, divergence = self.truth.velocity_and_divergence(x, t)
        return Batch(x, t, s, velocity, divergence if recipe.divergence else None)


def shifted(levels: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of the images moved by at most one pixel each way, background filled in."""
    n, _, height, width = levels.shape
    moved = torch.rand(n, generator=generator) < share
    dy, dx = (
        torch.where(moved, torch.randint(0, 3, (n,), generator=generator), 1)[:, None] for _ in range(2)
    )
    rows, columns = dy + torch.arange(height), dx + torch.arange(width)
    padded = F.pad(levels, (1, 1, 1, 1))
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


class DigitsSource:
    """Training images, freshly dequantised; targets from the images, or from a teacher where one is given.

    With solved trajectories of the teacher, ``paths``, a share ``pool_share`` of the data are its own samples, since
    the map is asked about those too, and a share ``direct`` of the batch are averages read off the trajectories. The
    teacher's divergence is estimated by ``recipe.probes`` Rademacher probes, unbiased.
    """

    def __init__(self, teacher: Any | None, paths: Paths | None = None) -> None:
        self.levels = digits("train")[0]
        self.teacher = teacher
        self.paths = paths
        self.pool = None if paths is None else paths.states[0, : paths.own]

    def _data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(self.levels), (n,), generator=generator)
        levels = shifted(self.levels[pick], recipe.shift, generator)
        data = dequantise(levels, DIGITS_LEVELS, torch.rand(levels.shape, generator=generator))
        if self.pool is None:
            return data
        drawn = self.pool[torch.randint(len(self.pool), (n,), generator=generator)]
        own = torch.rand(n, generator=generator) < recipe.pool_share
        return torch.where(own[:, None, None, None], drawn, data)

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """One batch; without a teacher the target is the conditional velocity."""
        direct = round(recipe.direct * recipe.batch) if self.paths is not None else 0
        n = recipe.batch - direct
        data = self._data(n, recipe, generator)
        t, s = draw_times(n, 1.0, recipe, generator)
        x, noise = _path(data, t, recipe, generator)
        if self.teacher is None:
            return Batch(x, t, s, data - noise)
        batch = Batch(x, t, s, *self._targets(x, t, recipe, generator))
        if self.paths is None or not direct:
            return batch
        return batch.joined(self.paths.pairs(direct, generator))

    def _targets(
        self, x: Tensor, t: Tensor, recipe: Recipe, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's velocity, and its estimated divergence where the recipe wants one."""
        assert self.teacher is not None
        if not recipe.divergence:
            with torch.no_grad():
                return self.teacher.velocity(x, t), None
        probes = torch.randint(0, 2, (recipe.probes, *x.shape), generator=generator).float() * 2 - 1
        device = next(self.teacher.parameters()).device
        velocity, divergence = velocity_and_divergence(
            self.teacher, x.to(device), t.to(device), probes.to(device)
        )
        return velocity.cpu(), divergence.cpu()
