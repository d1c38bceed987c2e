"""Where training batches come from: the exact field of a closed form, images, or a trained teacher on images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from .conditional import ConditionalPath
from .coupling import TurnedPairs
from .data import DIGITS_LEVELS, dequantise, digits, shifted
from .networks.embedding import stretched_time, unstretched_time
from .objectives.batch import Batch
from .objectives.imitation import segment_ends
from .objectives.realuid import Draw
from .recipes import DATA_TEACHER, SMALLEST_STEP, Recipe
from .trajectories import Paths

Field = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Source(Protocol):
    """Draws the batch of one step from a generator, and knows its teacher's field anywhere. ``paths``: solved ones."""

    paths: Paths | None

    teacher: Any | None

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """The batch, on the CPU or on the source's device."""
        ...

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Data points (n, *event)."""
        ...

    def field(self, recipe: Recipe, generator: torch.Generator) -> Field:
        """Velocity and, for a joint map, divergence of the teacher at points (x, t)."""
        ...


def _times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """(n,) times in [0, end], a share of them uniform in the stretched time; stratified."""
    unit = (torch.randperm(n, generator=generator) + torch.rand(n, generator=generator)) / n
    low, high = stretched_time(torch.tensor([0.0, end]), recipe.delta)
    near = unstretched_time(low + (high - low) * unit, recipe.delta).clamp(0, end)
    return torch.where(torch.rand(n, generator=generator) < recipe.stretched, near, end * unit)


def draw_times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target times (n,), independent, so that both orders are trained; shares on s = t and at the ends."""
    if recipe.imitation is not None:
        return segment_ends(n, end, recipe.imitation, generator)
    if recipe.dyadic:
        t, s = _dyadic_times(n, end, generator)
    else:
        t, s = _times(n, end, recipe, generator), _times(n, end, recipe, generator)
    kind = torch.rand(n, generator=generator)
    side = torch.where(torch.rand(n, generator=generator) < 0.5, 0.0, end)
    s = torch.where(kind < recipe.ends, side, s)
    if "one-direction" in recipe.faults:
        t, s = torch.minimum(t, s), torch.maximum(t, s)
    diagonal = 1.0 if recipe.objective == "direct" else recipe.diagonal
    return t, torch.where(kind > 1 - diagonal, t, s)


def _dyadic_times(n: int, end: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steps of length 2^-k that start at multiples of their length, either order, (n,) each."""
    halvings = round(-math.log2(SMALLEST_STEP))
    parts = 2 ** torch.randint(0, halvings + 1, (n,), generator=generator)
    first = (torch.rand(n, generator=generator) * parts).long()
    low, high = end * first / parts, end * (first + 1) / parts
    up = torch.rand(n, generator=generator) < 0.5
    return torch.where(up, low, high), torch.where(up, high, low)


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
    """Points on and around the path with the exact field and its exact divergence, or with conditional velocities.

    With solved trajectories, ``paths``, a share ``recipe.direct`` of the batch are averages read off them.
    """

    def __init__(self, truth: Any, paths: Paths | None = None, teacher: Any | None = None) -> None:
        self.truth, self.paths, self.teacher = truth, paths, teacher

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """One batch."""
        direct, n = _split(recipe)
        t, s = draw_times(n, 1 - self.truth.eps, recipe, generator)
        data = self.truth.sample(n, generator=generator)
        x, noise = _path(data, t, recipe, generator)
        if recipe.teacher == DATA_TEACHER or recipe.imitation is not None:
            return Batch(x, t, s, data - noise)
        velocity, divergence = self.truth.velocity_and_divergence(x, t)
        batch = Batch(x, t, s, velocity, divergence if recipe.divergence else None)
        return batch if self.paths is None else batch.joined(self.paths.pairs(direct, generator))

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Draws of the closed form."""
        drawn: Tensor = self.truth.sample(n, generator=generator)
        return drawn

    def field(self, recipe: Recipe, generator: torch.Generator) -> Field:
        """The exact field and, where the recipe wants it, its divergence."""
        parts = 2 if recipe.divergence else 1
        return lambda x, t: tuple(self.truth.velocity_and_divergence(x, t))[:parts]


def _split(recipe: Recipe) -> tuple[int, int]:
    """How many rows of a batch are read off trajectories, and how many are not."""
    direct = round(recipe.direct * recipe.batch)
    return direct, recipe.batch - direct


def draw_conditional(
    source: Source, recipe: Recipe, path: ConditionalPath, generator: torch.Generator, device: str
) -> Draw:
    """What a step of a conditional path needs; the pairs of a paired one are those of `TurnedPairs`."""
    n = recipe.batch
    data = source.data(n, recipe, generator)
    noise, latent = (torch.randn(data.shape, generator=generator).to(device) for _ in range(2))
    t = _times(n, 1.0, recipe, generator).to(device)
    if not path.paired:
        return Draw(data.to(device), noise, latent, t)
    assert isinstance(source, ClosedFormSource)
    start = TurnedPairs(source.truth).pairs(data, generator)
    return Draw(data.to(device), noise, latent, t, start.to(device))


def path_starts(truth: Any, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Where the trajectories of a closed form start: data at the data end, a share moved off it, (pool, d)."""
    end = torch.full((recipe.pool,), 1 - truth.eps)
    data = truth.sample(recipe.pool, generator=generator)
    return _path(data, end, recipe, generator)[0]


class DigitsSource:
    """Training images, freshly dequantised; targets from the images, or from a teacher where one is given.

    With solved trajectories of the teacher, ``paths``, a share ``pool_share`` of the data are its own samples, since
    the map is asked about those too, and a share ``direct`` of the batch are averages read off the trajectories. The
    teacher's divergence is estimated, unbiased, as ``recipe.divergence_target`` says.
    """

    def __init__(self, teacher: Any | None, paths: Paths | None = None) -> None:
        self.levels = digits("train")[0]
        self.teacher = teacher
        self.paths = paths
        self.pool = None if paths is None else paths.states[0, : paths.own]

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Dequantised training images, a share of them the teacher's samples."""
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
        direct, n = _split(recipe)
        data = self.data(n, recipe, generator)
        t, s = draw_times(n, 1.0, recipe, generator)
        x, noise = _path(data, t, recipe, generator)
        if self.teacher is None or recipe.imitation is not None:
            return Batch(x, t, s, data - noise)
        batch = Batch(x, t, s, *self.field(recipe, generator)(x, t))
        return batch if self.paths is None else batch.joined(self.paths.pairs(direct, generator))

    def field(self, recipe: Recipe, generator: torch.Generator) -> Field:
        """The teacher's velocity and, where the recipe wants one, an estimate of its divergence, on the CPU."""
        teacher = self.teacher
        assert teacher is not None
        device = next(teacher.parameters()).device

        def at(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            x, t = x.to(device), t.to(device)
            if recipe.divergence:
                return tuple(part.cpu() for part in recipe.divergence_target(teacher, x, t, generator))
            with torch.no_grad():
                return (teacher.velocity(x, t).cpu(),)

        return at
