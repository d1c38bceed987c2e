"""Some of the items through an estimator, and the subject of a score: a model with the points it is scored on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.evaluation.batching.batches import stream
from flowlik.measures.arrays import Array
from flowlik.tasks.points import whole
from flowlik.tasks.task import Items
from flowlik_estimators import Estimator

NUMBERS = 196_608
"""Rows times dimensions of a batch: 16 images of 64 x 64 colours, whose network's activations then fit in 4 GB."""

MOST_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model, the points that it is scored on, and how they are named; ``levels`` of discrete data or None."""

    name: str
    model: Any
    items: Items
    dim: int
    levels: int | None
    device: torch.device
    dtype: torch.dtype
    seed: int

    @property
    def batch(self) -> int:
        """Rows of a batch to begin with; it is halved where memory runs out."""
        return max(1, min(MOST_ROWS, NUMBERS // self.dim))

    def rows(self, which: NDArray[np.int64]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Points, conditions and ids of some rows, on the model's device; ids stay where draws are made."""
        index, items = torch.from_numpy(which), self.items
        if isinstance(items.x, Tensor):
            x = items.x[index]
        else:
            x = torch.cat([whole(items.x[int(i) : int(i) + 1]) for i in which])
        cond = None if items.cond is None else items.cond[index].to(self.device)
        if cond is not None and cond.is_floating_point():
            cond = cond.to(self.dtype)
        return x.to(device=self.device, dtype=self.dtype), cond, items.ids[index]


@dataclass(frozen=True, kw_only=True)
class Values:
    """Of some rows: log-densities in nats, standard errors (NaN where unknown), evaluations and products."""

    log_prob: Array
    stderr: Array
    forwards: Array
    products: Array


def batches(which: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
    """The rows in order, at most ``size`` at once."""
    for start in range(0, len(which), size):
        yield which[start : start + size]


def evaluate(subject: Subject, estimator: Estimator, which: NDArray[np.int64], number: int = 0) -> Values:
    """The estimator on some rows with the draws of round ``number``; ValueError where it does not fit the model."""

    def part(where: slice) -> Values:
        x, cond, ids = subject.rows(which[where])
        generator = torch.Generator().manual_seed(subject.seed + number * 1_000_003)
        out = estimator.log_prob(subject.model, x, cond=cond, generator=generator, items=ids)
        if out.status == "refused":
            raise ValueError(f"{subject.name}: {estimator.label}: {out.reason}")
        n, cost = len(x), out.cost
        log_prob = torch.where(out.valid, out.log_prob, torch.nan)
        return Values(
            log_prob=_array(log_prob, n),
            stderr=_array(torch.nan if out.stderr is None else out.stderr, n),
            forwards=_array(cost.forwards, n),
            products=_array(cost.vjps + cost.jvps, n),
        )

    return joined(stream(part, len(which), min(subject.batch, len(which)))[0])


def joined(parts: list[Values]) -> Values:
    """The values of consecutive rows."""
    return Values(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in Values.__annotations__}
    )


def _array(value: Tensor | float, n: int) -> Array:
    found = torch.as_tensor(value, dtype=torch.float64).detach().cpu().numpy()
    return np.array(np.broadcast_to(found, (n,)))
