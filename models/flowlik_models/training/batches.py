"""Where training batches come from: what every source draws, and the exact field of a closed form.

Images have a module of their own, `flowlik_models.training.image_batches`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from flowlik_models.closed_forms.coupling import TurnedPairs
from flowlik_models.conditional_paths import ConditionalPath
from flowlik_models.numerics.reparametrised_time import ReparametrisedTime
from flowlik_models.objectives.batch import Batch, TeacherField
from flowlik_models.objectives.imitation import segment_ends
from flowlik_models.objectives.realuid import Draw
from flowlik_models.recipes.recipe import DATA_TEACHER, SMALLEST_STEP, Recipe
from flowlik_models.training.process_group import WHOLE, Part
from flowlik_models.training.trajectories import TrajectoryPool


class Source(Protocol):
    """Draws the batch of a step from a generator of its device, and evaluates its teacher's field anywhere.

    ``pool``: solved trajectories; ``teacher``: its network, where there is one.
    """

    pool: TrajectoryPool | None
    device: torch.device
    teacher: Any | None

    def batch(self, recipe: Recipe, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        """The part's rows of the batch, on the CPU or on the source's device."""
        ...

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Data points (n, *event)."""
        ...

    def field(self, recipe: Recipe, generator: torch.Generator) -> TeacherField:
        """Velocity and, for a joint map, divergence of the teacher at points (x, t)."""
        ...


def _uniform(n: int, generator: torch.Generator) -> Tensor:
    """(n,) on the generator's device."""
    return torch.rand(n, generator=generator, device=generator.device)


def _times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """(n,) times in [0, end], a share of them uniform in the reparametrised time; stratified."""
    order = torch.randperm(n, generator=generator, device=generator.device)
    unit = (order + _uniform(n, generator)) / n
    reparametrised = ReparametrisedTime(recipe.times.delta)
    low, high = reparametrised.at(torch.tensor([0.0, end]))
    near = reparametrised.time(low + (high - low) * unit).clamp(0, end)
    return torch.where(_uniform(n, generator) < recipe.times.stretched, near, end * unit)


def draw_times(n: int, end: float, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source and target times (n,), independent, so that both orders are trained; shares on s = t and at the ends."""
    if recipe.imitation is not None:
        return segment_ends(n, end, recipe.imitation, generator)
    if recipe.times.dyadic:
        t, s = _dyadic_times(n, end, generator)
    else:
        t, s = _times(n, end, recipe, generator), _times(n, end, recipe, generator)
    kind = _uniform(n, generator)
    side = torch.where(_uniform(n, generator) < 0.5, 0.0, end)
    s = torch.where(kind < recipe.times.ends, side, s)
    if "one-direction" in recipe.faults:
        t, s = torch.minimum(t, s), torch.maximum(t, s)
    diagonal = 1.0 if recipe.objective == "direct" else recipe.times.diagonal
    return t, torch.where(kind >= 1 - diagonal, t, s)  # rand may be 0: a diagonal of 1 is all rows


def _dyadic_times(n: int, end: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steps of length 2^-k that start at multiples of their length, either order, (n,) each."""
    halvings = round(-math.log2(SMALLEST_STEP))
    parts = 2 ** torch.randint(0, halvings + 1, (n,), generator=generator, device=generator.device)
    first = (_uniform(n, generator) * parts).long()
    low, high = end * first / parts, end * (first + 1) / parts
    up = _uniform(n, generator) < 0.5
    return torch.where(up, low, high), torch.where(up, high, low)


def points_on_path(
    data: Tensor, t: Tensor, recipe: Recipe, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Points on the straight path, a share of them moved off it by further noise, and the noise itself."""
    noise = torch.randn(data.shape, generator=generator, device=generator.device)
    time = t.reshape(-1, *([1] * (data.ndim - 1)))
    points = recipe.points
    moved = _uniform(len(t), generator) < points.altered
    unit = _uniform(len(t), generator)
    if points.altered_law == "along":
        factor = torch.where(moved, points.altered_scale**unit, torch.ones_like(unit)).reshape(time.shape)
        return time * data + (1 - time) * factor * noise, noise
    extra = moved * unit * points.altered_scale
    spread = ((1 - time).square() + extra.reshape(time.shape).square()).sqrt()
    return time * data + spread * noise, noise


class ClosedFormSource:
    """Points on and around the path with the exact field and its exact divergence, or with conditional velocities.

    With a ``pool`` of trajectories a share ``direct`` of the batch are averages read off them.
    """

    def __init__(self, truth: Any, pool: TrajectoryPool | None = None, teacher: Any | None = None) -> None:
        self.truth, self.pool, self.teacher = truth, pool, teacher
        self.device = torch.device("cpu")

    def batch(self, recipe: Recipe, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        """The part's rows of one batch."""
        whole = self._batch(recipe, generator)
        return whole if part.count == 1 else whole.cut(part.rows(len(whole.x)))

    def _batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        direct, n = split_rows(recipe)
        t, s = draw_times(n, 1 - self.truth.eps, recipe, generator)
        data = self.truth.sample(n, generator=generator)
        x, noise = points_on_path(data, t, recipe, generator)
        if recipe.teacher == DATA_TEACHER or recipe.imitation is not None:
            return Batch(x, t, s, data - noise)
        velocity, divergence = self.truth.velocity_and_divergence(x, t)
        batch = Batch(x, t, s, velocity, divergence if recipe.divergence else None)
        return (
            batch
            if self.pool is None
            else batch.joined(self.pool.pairs(direct, generator, recipe.trajectories))
        )

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Draws of the closed form."""
        drawn: Tensor = self.truth.sample(n, generator=generator)
        return drawn

    def field(self, recipe: Recipe, generator: torch.Generator) -> TeacherField:
        """The exact field and, for a joint map, its divergence."""
        outputs = 2 if recipe.divergence else 1
        return lambda x, t: tuple(self.truth.velocity_and_divergence(x.cpu(), t.cpu()))[:outputs]


def split_rows(recipe: Recipe) -> tuple[int, int]:
    """How many rows of a batch are read off trajectories, and how many are not."""
    direct = round(recipe.trajectories.direct * recipe.optimiser.batch)
    return direct, recipe.optimiser.batch - direct


def draw_conditional(
    source: Source,
    recipe: Recipe,
    path: ConditionalPath,
    generator: torch.Generator,
    device: str,
    part: Part = WHOLE,
) -> Draw:
    """What the part's rows of a step of a conditional path need; pairs of a paired one are those of `TurnedPairs`."""
    n = recipe.optimiser.batch
    data = source.data(n, recipe, generator)
    noise, latent = (torch.randn(data.shape, generator=generator, device=generator.device) for _ in range(2))
    drawn = {"data": data, "noise": noise, "latent": latent, "t": _times(n, 1.0, recipe, generator)}
    if path.paired:
        assert isinstance(source, ClosedFormSource)
        drawn["start"] = TurnedPairs(source.truth).pairs(data, generator)
    if source.pool is not None:
        drawn["solved"], drawn["end"] = source.pool.ends(n, generator)
    if part.count > 1:
        mine = part.rows(n, device=data.device)
        drawn = {name: rows[mine] for name, rows in drawn.items()}
    return Draw(**{name: rows.to(device) for name, rows in drawn.items()})


def trajectory_starts(truth: Any, recipe: Recipe, generator: torch.Generator, n: int) -> Tensor:
    """Where ``n`` trajectories of a closed form start: data at the data end, a share moved off it, (n, d)."""
    end = torch.full((n,), 1 - truth.eps)
    data = truth.sample(n, generator=generator)
    return points_on_path(data, end, recipe, generator)[0]
