"""Test points that are made when they are asked for, so that a run holds a batch of them and not the data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = Callable[[int, int], Tensor]
"""(start, stop) -> these rows, (stop - start, *event); the same for the same rows, whatever is asked for at once."""


@dataclass(frozen=True)
class Points:
    """The rows ``start .. start + n - 1`` of a stream, cast to ``dtype``. A slice of points is points."""

    rows: Rows
    n: int
    event_shape: tuple[int, ...]
    dtype: torch.dtype
    start: int = 0

    def __len__(self) -> int:
        return self.n

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, *event)."""
        return (self.n, *self.event_shape)

    def __getitem__(self, where: slice) -> Points:
        first, stop, step = where.indices(self.n)
        if step != 1:
            raise ValueError("points are sliced in steps of one")
        return replace(self, start=self.start + first, n=max(0, stop - first))

    def to(self, dtype: torch.dtype) -> Points:
        """The same points in another dtype."""
        return replace(self, dtype=dtype)

    def tensor(self) -> Tensor:
        """All of them, (n, *event)."""
        rows = self.rows(self.start, self.start + self.n)
        if rows.shape != self.shape:
            raise ValueError(f"expected rows of shape {self.shape}, got {tuple(rows.shape)}")
        return rows.to(self.dtype)


def whole(x: Tensor | Points) -> Tensor:
    """The points as one tensor."""
    return x.tensor() if isinstance(x, Points) else x


def chunks(x: Tensor | Points, size: int) -> Iterator[Tensor]:
    """The points in order, in tensors of at most ``size`` rows.

    >>> [part.tolist() for part in chunks(torch.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(x), size):
        yield whole(x[start : start + size])
