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

_POOL_STRETCH = 1e-3  # smallest 1 - t that the steps of a pool resolve


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
    if recipe.at_data or recipe.at_noise:
        start = torch.rand(n, generator=generator)
        t = torch.where(start < recipe.at_data, end, torch.where(start > 1 - recipe.at_noise, 0.0, t))
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
    share = unit if recipe.altered_law == "uniform" else 10.0 ** (3 * unit - 3)
    extra = moved * share * recipe.altered_scale
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


def teacher_samples(teacher: Any, n: int, *, steps: int = 20, seed: int = 77, chunk: int = 256) -> Tensor:
    """``n`` draws of a teacher, (n, *event), by ``steps`` Runge-Kutta steps of order 4 in the stretched time."""
    device = next(teacher.parameters()).device
    noise = torch.randn((n, *teacher.event_shape), generator=torch.Generator().manual_seed(seed))
    low, high = stretched_time(torch.tensor([0.0, 1.0], dtype=torch.float64), _POOL_STRETCH).tolist()
    nodes = torch.linspace(low, high, 2 * steps + 1, dtype=torch.float64)
    times = unstretched_time(nodes, _POOL_STRETCH).clamp(0, 1).tolist()
    # dt/dtau of the stretched time, by its closed form 1/(1/(t + 0.1) + 1/(1 - t + delta))
    rates = [1 / (1 / (t + 0.1) + 1 / (1 - t + _POOL_STRETCH)) for t in times]
    h = (high - low) / steps

    def slope(x: Tensor, node: int) -> Tensor:
        field: Tensor = teacher.velocity(x, torch.full((len(x),), times[node], device=device))
        scaled: Tensor = field * rates[node]
        return scaled

    done = []
    with torch.no_grad():
        for part in torch.split(noise, chunk):
            x = part.to(device)
            for i in range(0, 2 * steps, 2):
                k1 = slope(x, i)
                k2 = slope(x + h / 2 * k1, i + 1)
                k3 = slope(x + h / 2 * k2, i + 1)
                k4 = slope(x + h * k3, i + 2)
                x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            done.append(x.cpu())
    return torch.cat(done)


class DigitsSource:
    """Training images, freshly dequantised; targets from the images, or from a teacher where one is given.

    With a ``pool``, a share of the batch is drawn from the teacher's own samples: the map is asked about those too. A
    teacher's divergence is estimated by ``recipe.probes`` Rademacher probes, unbiased.
    """

    def __init__(self, teacher: Any | None, pool: Tensor | None = None) -> None:
        self.levels = digits("train")[0]
        self.teacher = teacher
        self.pool = pool

    def _data(self, recipe: Recipe, generator: torch.Generator) -> Tensor:
        pick = torch.randint(len(self.levels), (recipe.batch,), generator=generator)
        levels = shifted(self.levels[pick], recipe.shift, generator)
        data = dequantise(levels, DIGITS_LEVELS, torch.rand(levels.shape, generator=generator))
        if self.pool is None:
            return data
        drawn = self.pool[torch.randint(len(self.pool), (recipe.batch,), generator=generator)]
        own = torch.rand(recipe.batch, generator=generator) < recipe.pool_share
        return torch.where(own[:, None, None, None], drawn, data)

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Batch:
        """One batch; without a teacher the target is the conditional velocity."""
        data = self._data(recipe, generator)
        t, s = draw_times(recipe.batch, 1.0, recipe, generator)
        x, noise = _path(data, t, recipe, generator)
        if self.teacher is None:
            return Batch(x, t, s, data - noise)
        if not recipe.divergence:
            with torch.no_grad():
                return Batch(x, t, s, self.teacher.velocity(x, t))
        probes = torch.randint(0, 2, (recipe.probes, *x.shape), generator=generator).float() * 2 - 1
        device = next(self.teacher.parameters()).device
        at = x.to(device).requires_grad_()
        velocity = self.teacher.velocity(at, t.to(device))
        divergence = torch.zeros(len(x), device=device)
        for index, probe in enumerate(probes.to(device)):
            last = index == recipe.probes - 1
            product = torch.autograd.grad(velocity, at, probe, retain_graph=not last)[0]
            divergence += (product * probe).flatten(1).sum(1) / recipe.probes
        return Batch(x, t, s, velocity.detach().cpu(), divergence.cpu())
