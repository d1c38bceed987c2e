"""Training batches of images, held as bytes and drawn on the device that trains."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowlik_models.images.pixels import mirrored, shifted
from flowlik_models.moments.training_images import TrainingImages
from flowlik_models.objectives.batch import Batch, TeacherField
from flowlik_models.recipes.recipe import Recipe
from flowlik_models.training.batches import draw_times, points_on_path, split_rows
from flowlik_models.training.process_group import WHOLE, Part
from flowlik_models.training.trajectories import TrajectoryPool

_UNLABELLED = 0.1
"""Share of rows that teach the field of all classes (Ho and Salimans 2022, arXiv 2207.12598)."""


class ImageSource:
    """Training images, freshly dequantised; targets from the images, or from a teacher where one is given.

    With a ``pool`` of the teacher's trajectories a share ``pool_share`` of the data are its own samples, since the map
    is evaluated on those too, and a share ``direct`` of the batch are averages read off the trajectories. The
    teacher's divergence is estimated, unbiased, as ``recipe.divergence_target`` says. Where mirror images are as likely
    as the images, half of them are mirrored. A network with classes is given their labels, but a tenth of them.

    Batches lie on ``device``, and are drawn by generators of that device.
    """

    def __init__(
        self,
        images: TrainingImages,
        teacher: Any | None = None,
        pool: TrajectoryPool | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.images, self.teacher, self.device = images, teacher, torch.device(device)
        self.levels = images.levels.to(device)
        self.pool = None if pool is None else pool.to(device)
        self.labels = None if images.labels is None else images.labels.to(device)

    def data(self, n: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
        """Dequantised training images (n, *event), a share of them the teacher's samples."""
        return self._drawn(n, recipe, generator)[0]

    def _drawn(self, n: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The data, and which images they were made of, (n,)."""
        device = generator.device
        pick = torch.randint(len(self.levels), (n,), generator=generator, device=device)
        levels = self.levels[pick]
        if recipe.points.shift:
            levels = shifted(levels, recipe.points.shift, generator)
        if self.images.flips:
            levels = mirrored(levels, generator)
        data = self.images.points(levels, generator)
        if self.pool is None:
            return data, pick
        samples = self.pool.states[0, : self.pool.own]
        drawn = samples[torch.randint(len(samples), (n,), generator=generator, device=device)]
        own = torch.rand(n, generator=generator, device=device) < recipe.trajectories.pool_share
        return torch.where(own[:, None, None, None], drawn, data), pick

    def _labels(self, pick: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor | None:
        """Labels of the images ``pick`` (n,) for a network with classes, the number of classes where it gets none."""
        if "classes" not in recipe.network:
            return None
        assert self.labels is not None
        without = torch.rand(len(pick), generator=generator, device=pick.device) < _UNLABELLED
        return self.labels[pick].masked_fill(without, recipe.network["classes"])

    def batch(self, recipe: Recipe, generator: torch.Generator, part: Part = WHOLE) -> Batch:
        """The part's rows of one batch; without a teacher the target is the conditional velocity."""
        direct, n = split_rows(recipe)
        data, pick = self._drawn(n, recipe, generator)
        t, s = draw_times(n, 1.0, recipe, generator)
        x, noise = points_on_path(data, t, recipe, generator)
        taught = self.teacher is not None and recipe.imitation is None
        joint = taught and recipe.divergence
        probes = recipe.divergence_target.draw(x, generator) if joint else None
        labels = self._labels(pick, recipe, generator)
        pairs = (
            self.pool.pairs(direct, generator, recipe.trajectories)
            if taught and self.pool is not None
            else None
        )
        if part.count > 1:
            mine = part.rows(n, device=x.device)
            x, t, s, data, noise = (rows[mine] for rows in (x, t, s, data, noise))
            probes = None if probes is None else probes[:, mine]
            pairs = None if pairs is None else pairs.cut(part.rows(direct, n, x.device))
            labels = None if labels is None else labels[mine]
        if not taught:
            return Batch(x, t, s, data - noise, cond=labels)
        batch = Batch(x, t, s, *self._field(recipe, x, t, probes))
        return batch if pairs is None else batch.joined(pairs)

    def _field(self, recipe: Recipe, x: Tensor, t: Tensor, probes: Tensor | None) -> tuple[Tensor, ...]:
        """The teacher's velocity and, with probes, its divergence."""
        assert self.teacher is not None
        if probes is not None:
            return recipe.divergence_target.with_probes(self.teacher, x, t, probes)
        with torch.no_grad():
            return (self.teacher.velocity(x, t),)

    def field(self, recipe: Recipe, generator: torch.Generator) -> TeacherField:
        """The teacher's velocity and, for a joint map, an estimate of its divergence."""

        def at(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
            x, t = x.to(self.device), t.to(self.device)
            probes = recipe.divergence_target.draw(x, generator) if recipe.divergence else None
            return self._field(recipe, x, t, probes)

        return at
