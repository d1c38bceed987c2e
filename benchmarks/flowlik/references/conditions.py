"""Fields with their conditions bound, for the rules of references, which know x and t alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowlik.tasks.points import whole
from flowlik.tasks.task import Task, digest, tensor_hash


class Conditioned:
    """A field whose rows are conditioned on `cond`, (batch, ...): every call is of exactly these rows."""

    def __init__(self, model: Any, cond: Tensor) -> None:
        self._model, self._cond = model, cond

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The velocity at x (batch, *event) and t (batch,)."""
        v: Tensor = self._model.velocity(x, t, cond=self._cond)
        return v

    def rows(self, index: Tensor) -> Conditioned:
        """The same for some of the rows."""
        return Conditioned(self._model, self._cond[index.to(self._cond.device)])


def conditioned(model: Any, cond: Tensor | None) -> Any:
    """The model with these conditions, or as it is where there are none."""
    return model if cond is None else Conditioned(model, cond)


def of_rows(model: Any, index: Tensor) -> Any:
    """The model for some rows of the batch."""
    return model.rows(index) if isinstance(model, Conditioned) else model


def points_of(task: Task, split: str, n: int, samples: Tensor) -> tuple[Tensor, Tensor | None]:
    """The first n points of a split, (n, *event), and what each is conditioned on; `samples` are the teacher's."""
    if split == "teacher-samples":
        x = samples[:n]
        return x, task.sample_conditions(split, torch.arange(len(x)))
    items = task.items(split, n)
    return whole(items.x), items.cond


def first(cond: Tensor | None, n: int, device: torch.device | str, start: int = 0) -> Tensor | None:
    """The conditions of n rows on a device; None where there are none."""
    return None if cond is None else cond[start : start + n].to(device)


def named(x: Tensor, cond: Tensor | None) -> dict[str, str]:
    """What a card says of the points of a split and of their conditions, by which they are known again."""
    return {"x_hash": tensor_hash(x)} | ({} if cond is None else {"cond_hash": tensor_hash(cond)})


def part_hash(x: Tensor, cond: Tensor | None) -> str:
    """Names a part of the points in the file that holds its values."""
    return tensor_hash(x) if cond is None else digest(tensor_hash(x), tensor_hash(cond))


def check_standard_source(task: str, model: Any) -> None:
    """Raise ValueError where the field does not run from N(0, I) at t = 0 to the data at t = 1, as the rules do."""
    ends = getattr(model, "noisy_end", 0.0), getattr(model, "clean_end", 1.0)
    if ends != (0.0, 1.0) or getattr(model, "source", None) is not None:
        raise ValueError(
            f"{task}: the reference model has a source or ends of its own ({ends[0]} to {ends[1]}); references are "
            "made of fields that run from N(0, I) at t = 0 to the data at t = 1"
        )
