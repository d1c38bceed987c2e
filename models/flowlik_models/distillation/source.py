"""Batches that teach a student of a field of one's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowlik_models.distillation.pool import Pool
from flowlik_models.distillation.teacher import Teacher
from flowlik_models.images.pixels import continuous
from flowlik_models.objectives.batch import Batch, TeacherField
from flowlik_models.recipes.options import Points
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.training.batches import draw_times, split_rows
from flowlik_models.training.process_group import WHOLE, Part
from flowlik_models.training.trajectories import TrajectoryPool


@dataclass(frozen=True)
class Rows:
    """Training rows ``x`` (n, *event): floats, or with ``levels`` L whole numbers 0..L-1, dequantised at each draw."""

    x: Tensor
    levels: int | None = None

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` random rows (n, *event), float32."""
        pick = torch.randint(len(self.x), (n,), generator=generator, device=generator.device)
        rows = self.x[pick.to(self.x.device)]
        if self.levels is None:
            return rows.float()
        return continuous(rows, self.levels, torch.rand(rows.shape, generator=generator))

    def starts(self, points: Points, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows, a share of them moved by noise of up to ``altered_scale`` standard deviations of the data."""
        rows = self.draw(n, generator)
        unit = torch.rand(n, generator=generator)
        moved = torch.rand(n, generator=generator) < points.altered
        size = (moved * unit * points.altered_scale).view(-1, *[1] * (rows.ndim - 1))
        spread = self.x[:4096].double().std().to(rows) * (1.0 if self.levels is None else 2.0 / self.levels)
        return rows + size * spread * torch.randn(rows.shape, generator=generator)


class TeacherSource:
    """Pairs read off a pool of a teacher's trajectories, and points of the pool with the teacher's field there."""

    def __init__(self, rows: Rows, teacher: Teacher, pool: Pool, device: torch.device | str = "cpu") -> None:
        self.rows, self.ends, self.device = rows, teacher, torch.device(device)
        self.teacher: Any | None = teacher.model
        self.pool: TrajectoryPool | None = pool.to(device)

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Training rows (n, *event)."""
        return self.rows.draw(n, torch.Generator().manual_seed(generator.initial_seed())).to(self.device)

    def batch(self, recipe: Recipe, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        """The part's rows of one batch."""
        direct, n = split_rows(recipe)
        assert self.pool is not None
        pairs = self.pool.pairs(direct, generator, recipe.trajectories) if direct else None
        if pairs is not None and n == 0:
            whole = replace(pairs, direct=torch.ones_like(pairs.t, dtype=torch.bool))
            return whole if part.count == 1 else whole.cut(part.rows(direct, device=whole.x.device))
        x, t, s = self._points(n, recipe, generator)
        if part.count > 1:
            mine = part.rows(n, device=x.device)
            x, t, s = x[mine], t[mine], s[mine]
            pairs = None if pairs is None else pairs.cut(part.rows(direct, n, x.device))
        batch = Batch(x, t, s, *self.field(recipe, part.generator(generator))(x, t))
        return batch if pairs is None else batch.joined(pairs)

    def field(self, recipe: Recipe, generator: torch.Generator) -> TeacherField:
        """The teacher's velocity and, for a joint map, its divergence or an estimate of it."""

        def at(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            x, t = x.to(self.device), t.to(self.device)
            if recipe.divergence:
                return recipe.divergence_target(self.teacher, x, t, generator)
            assert self.teacher is not None
            with torch.no_grad():
                return (self.teacher.velocity(x, t),)

        return at

    def _points(self, n: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Points (n, *event) of the pool short of the data, their times, and times to go to, (n,).

        They are of the teacher's own law whatever its coupling is, which points on straight lines are not.
        """
        assert self.pool is not None
        start, end = self.ends.start, self.ends.end
        t, s = (start + (end - start) * unit for unit in draw_times(n, 1.0, recipe, generator))
        node = torch.randint(1, len(self.pool.times), (n,), generator=generator, device=generator.device)
        row = torch.randint(self.pool.states.shape[1], (n,), generator=generator, device=generator.device)
        at = self.pool.times[node, row]
        return self.pool.states[node, row], at, torch.where(s == t, at, s)
