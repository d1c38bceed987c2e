r"""Time grids of fixed-step estimators, t_0 = start, ..., t_N = end, in float64 and in either direction.

- ``uniform``: ``t_k = start + (end - start) k/N``.
- ``cosine``: ``t_k = start + (end - start) (1 - cos(pi k/N))/2``, dense at both ends.
- ``logsnr``: uniform in the log signal-to-noise ratio ``2 log(t/(1 - t))`` of the straight path, between the
  two ends clipped to ``[delta, 1 - delta]``, delta = 1e-3; the ends themselves are kept.
- ``ramped``: equal steps but for a few next to the data, the end of larger t: the last of them is a quarter of an equal
  one, each before it 1.6 times as long until they are equal; up to three steps are all of them ramp. A multistep solver
  that begins at the data has no values behind it yet; both numbers were chosen by trial (docs/estimators.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from flowlik_models.names import unknown

Grid = Literal["uniform", "cosine", "logsnr", "ramped"]


LOGSNR_CLIP = 1e-3


RAMP_FIRST, RAMP_GROWTH = 0.25, 1.6


def uniform(steps: int, start: float, end: float) -> Tensor:
    """Equal steps from start to end, (steps + 1,) float64."""
    return _between(start, end, _fractions(steps))


def cosine(steps: int, start: float, end: float) -> Tensor:
    """Equal steps of the angle, (steps + 1,) float64: steps shrink towards both ends."""
    return _between(start, end, (1.0 - torch.cos(math.pi * _fractions(steps))) / 2.0)


def logsnr(steps: int, start: float, end: float) -> Tensor:
    """Equal steps of 2 log(t/(1 - t)), (steps + 1,) float64, clipped to [delta, 1 - delta] inside, the ends kept."""
    ends = torch.tensor([start, end], dtype=torch.float64).clamp(LOGSNR_CLIP, 1.0 - LOGSNR_CLIP)
    first, last = torch.logit(ends).tolist()
    times = torch.sigmoid(_between(first, last, _fractions(steps)))
    times[0], times[-1] = start, end
    return times


def ramped(steps: int, start: float, end: float) -> Tensor:
    """Equal steps but for a few that shrink towards the larger time, (steps + 1,) float64."""
    lengths = (RAMP_FIRST * RAMP_GROWTH ** torch.arange(steps, dtype=torch.float64)).clamp(max=1.0)
    gone = torch.cat([torch.zeros(1, dtype=torch.float64), lengths.cumsum(0)])
    gone = gone / gone[-1]
    return _between(start, end, gone if start > end else 1.0 - gone.flip(0))


GRIDS: dict[str, Callable[[int, float, float], Tensor]] = {
    "uniform": uniform,
    "cosine": cosine,
    "logsnr": logsnr,
    "ramped": ramped,
}


def time_grid(grid: str, steps: int, start: float, end: float) -> Tensor:
    """The named grid, (steps + 1,) float64 and strictly monotone from start to end.

    Raises:
        ValueError: unknown grid, fewer than one step, or ends between which the grid has no room.

    >>> time_grid("uniform", 4, 1.0, 0.0).tolist()
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> [round(t, 3) for t in time_grid("cosine", 4, 0.0, 1.0).tolist()]
    [0.0, 0.146, 0.5, 0.854, 1.0]
    """
    if grid not in GRIDS:
        raise ValueError(unknown("grid", grid, GRIDS))
    if steps < 1:
        raise ValueError(f"a time grid needs at least 1 step, got {steps}")
    times = GRIDS[grid](steps, start, end)
    if not bool(((times.diff() * (end - start)) > 0).all()):
        raise ValueError(f"grid {grid!r} has no room for {steps} steps between {start} and {end}")
    return times


def _fractions(steps: int) -> Tensor:
    return torch.arange(steps + 1, dtype=torch.float64) / steps


def _between(start: float, end: float, fraction: Tensor) -> Tensor:
    times = start + (end - start) * fraction
    times[-1] = end
    return times
