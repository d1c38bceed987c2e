"""Synthetic tasks: points drawn from a closed form, judged by its exact density."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.grid import Grid, square_grid
from flowlik.tasks.points import Points, chunks, whole
from flowlik.tasks.task import Evaluate, Items, Reference, Task, digest, seed_of
from flowlik_models.closed_forms.catalogue import CLOSED_FORM_TASKS, closed_form, constants_hash
from flowlik_models.interfaces import Moments

BLOCK = 4096  # points of a closed form are drawn in blocks, so the first n do not depend on n


@dataclass(frozen=True, kw_only=True)
class ClosedFormTask(Task):
    """A synthetic task: points of p at t = 1 - eps, drawn fresh, and the exact density of the closed form."""

    window: tuple[float, float, int] | None = None
    centre: tuple[float, float] = (0.0, 0.0)
    block: int = BLOCK

    @cached_property
    def truth(self) -> Any:
        """The closed form, float64."""
        return closed_form(self.id)

    @property
    def has_components(self) -> bool:
        """True for mixtures."""
        return hasattr(self.truth, "sample_with_component")

    @property
    def models(self) -> tuple[str, ...]:
        """The closed form, then the models that are trained on the task."""
        return tuple(dict.fromkeys(("closed-form", *super().models)))

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """As every task's; a task of another package brings its closed form, named by its version and its data."""
        if model != "closed-form" or self.id in CLOSED_FORM_TASKS:
            return super().load_model(model, device)
        own = copy.deepcopy(self.truth).to(device).eval()
        return own, digest(model, self.version, *map(self.data_hash, self.splits))

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n points of the split's stream, float64."""
        self.check_split(split)
        x, component = self._points(split, n)
        return Items(x=x, ids=torch.arange(n), n=n, component=component)

    def _points(self, split: str, n: int) -> tuple[Tensor, NDArray[np.int64] | None]:
        parts, components = [], []
        known = self.has_components
        for block in range(-(-n // self.block)):
            generator = torch.Generator().manual_seed(seed_of(self.id, self.version, split, block))
            options: dict[str, Any] = {"generator": generator, "t": 1.0 - self.eps, "dtype": torch.float64}
            if known:
                x, component = self.truth.sample_with_component(self.block, **options)
                components.append(component)
            else:
                x = self.truth.sample(self.block, **options)
            parts.append(x)
        component = torch.cat(components)[:n].numpy().astype(np.int64) if known else None
        return torch.cat(parts)[:n], component

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The exact log p_t of the points, in float64."""
        values = self.log_density(items.x, t)
        return Reference(
            log_prob=values.reshape(items.draws, items.n),
            ref_id="closed-form",
            error=0.0,
            digest="closed-form",
        )

    def log_density(self, x: Tensor | Points, t: float) -> Array:
        """Exact log p_t in float64, in pieces that fit in memory."""
        with torch.no_grad():
            values = [self.truth.log_prob(part.double().cpu(), t) for part in chunks(x, BLOCK)]
        return np.asarray(torch.cat(values).numpy(), dtype=np.float64)

    def data_moments(self) -> Moments:
        """The closed form's own eigenvectors where it holds them: at 3072 dimensions finding them takes a minute."""
        if not hasattr(self.truth, "eigenvectors"):
            return super().data_moments()
        truth = self.truth
        mean, values, vectors = (part.numpy() for part in (truth.mean, truth.eigenvalues, truth.eigenvectors))
        return Moments(mean, values, vectors, self.data_hash("train"))

    def data_hash(self, split: str) -> str:
        """Names the constants, the split and how its points are drawn."""
        return digest(constants_hash(self.id), self.version, split, self.eps)

    def moments(self) -> tuple[Array, Array]:
        """Exact moments where the closed form knows them, else those of 200,000 points of the training split."""
        return _closed_form_moments(self)

    def grid(self) -> Grid | None:
        """The task's window in equal cells."""
        return None if self.window is None else square_grid(*self.window, centre=self.centre)


@cache
def _closed_form_moments(task: ClosedFormTask) -> tuple[Array, Array]:
    truth = task.truth
    t = 1.0 - task.eps
    if hasattr(truth, "mean_and_covariance") or hasattr(truth, "eigenvectors"):
        mean, covariance = _exact_moments(truth)
        identity = torch.eye(task.dim, dtype=covariance.dtype)
        return (t * mean).numpy(), (t**2 * covariance + (1 - t) ** 2 * identity).numpy()
    x = whole(task.items("train", 200_000).x).numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False)


def _exact_moments(truth: Any) -> tuple[Tensor, Tensor]:
    if hasattr(truth, "mean_and_covariance"):
        moments: tuple[Tensor, Tensor] = truth.mean_and_covariance()
        return moments
    return truth.mean, truth.eigenvectors * truth.eigenvalues @ truth.eigenvectors.T


@dataclass(frozen=True, kw_only=True)
class CheckerboardTask(ClosedFormTask):
    """Uniform on eight squares; judged inside, and by whether the outside is seen as empty."""

    edge_margin: float = 0.1
    outside_margin: float = 0.3
    outside_points: int = 500
    outside_drop: float = 3.0

    def own_measures(self, x: Tensor | Points, errors: Array, evaluate: Evaluate) -> dict[str, float]:
        """`interior_bias` and `interior_mae` (points at least 0.1 from an edge) in bits/dim; `outside_share`: of 500
        points uniform in [-4, 4]^2 at least 0.3 from every filled square, the share at least 3 nats below the inside.
        """
        inside = errors[self._depth(whole(x)) >= self.edge_margin]
        inside = inside[np.isfinite(inside)]
        outside = evaluate(self._outside())
        side = self.truth.side * (1.0 - self.eps)
        level = -math.log(len(self._corners()) * side**2)
        return {
            "interior_bias": float(inside.mean()) if len(inside) else math.nan,
            "interior_mae": float(np.abs(inside).mean()) if len(inside) else math.nan,
            "outside_share": float(np.mean(outside <= level - self.outside_drop)),
        }

    def _corners(self) -> Array:
        return np.asarray(self.truth.lower_left.numpy() * (1.0 - self.eps))

    def _distances(self, x: Array) -> Array:
        """Signed distance to every square, (n, squares): negative inside, to the nearest edge."""
        half = 0.5 * self.truth.side * (1.0 - self.eps)
        offset = np.abs(x[:, None, :] - (self._corners() + half)) - half
        beyond = np.linalg.norm(np.maximum(offset, 0.0), axis=2)
        return np.asarray(np.where(beyond > 0, beyond, offset.max(axis=2)))

    def _depth(self, x: Tensor) -> Array:
        """How far inside a filled square each point lies; negative outside."""
        return np.asarray(-self._distances(x.double().cpu().numpy()).min(axis=1))

    def _outside(self) -> Tensor:
        generator = np.random.default_rng(seed_of(self.id, self.version, "outside"))
        points = generator.uniform(-4.0, 4.0, size=(self.outside_points * 20, 2))
        far = points[self._distances(points).min(axis=1) >= self.outside_margin]
        return torch.from_numpy(far[: self.outside_points])
