"""Grids of equal cells, on which 2-D densities are drawn and integrated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Centres of a 2-D grid of equal cells whose lines fall on the density's edges."""

    x: Array
    y: Array

    @property
    def cell_area(self) -> float:
        """Area of one cell."""
        return float((self.x[1] - self.x[0]) * (self.y[1] - self.y[0]))

    @property
    def points(self) -> Tensor:
        """All centres, (H * W, 2) float64; row i of the (H, W) picture is y[i]."""
        y, x = np.meshgrid(self.y, self.x, indexing="ij")
        return torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1))


def square_grid(low: float, high: float, cells: int, centre: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """`cells` x `cells` cells that fill [low, high]^2 shifted to `centre`.

    >>> grid = square_grid(-1.0, 1.0, 4)
    >>> grid.x.tolist(), grid.cell_area
    ([-0.75, -0.25, 0.25, 0.75], 0.25)
    """
    middles = low + (np.arange(cells) + 0.5) * (high - low) / cells
    return Grid(x=middles + centre[0], y=middles + centre[1])
