"""Solves by torchdiffeq."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Run

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
EQUAL_STEPS = ("explicit_adams", "implicit_adams")
_TORCHDIFFEQ = {"heun": "heun2"}
_SAME_TIME = 1e-9
_GAVE_UP = ("underflow in dt", "non-finite values", "max_num_steps")
Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(x, t) -> (v,) or (v, divergence columns)."""


def _through(grid: Tensor, times: list[float]) -> Tensor:
    """A grid with the given times added; its own points that all but fall on one of them are dropped."""
    if len(times) == 2:
        return grid
    wanted = torch.tensor(times, dtype=torch.float64)
    apart = (grid[:, None] - wanted).abs().amin(1) > _SAME_TIME
    return torch.cat([grid[apart], wanted]).sort(descending=times[0] > times[-1]).values


class _Side:
    """The right-hand side as torchdiffeq calls it; keeps time in its interval and evaluations to the limit."""

    callback_accept_step: Callable[..., None]
    callback_reject_step: Callable[..., None]
    callback_step: Callable[..., None]

    def __init__(self, evaluate: Evaluate, run: Run, low: float, high: float, max_nfe: int | None) -> None:
        self.evaluate, self.run, self.low, self.high, self.max_nfe = evaluate, run, low, high, max_nfe
        self.last = torch.tensor(high)
        self.limit = None if max_nfe is None else run.counts.forwards + max_nfe * run.batch

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = self.run
        t = t.clamp(self.low, self.high)
        self.last = t.detach()
        if self.limit is not None and run.counts.forwards >= self.limit:
            last = float(self.last)
            raise Diverged(f"stopped at t = {last:.6g} after max_nfe = {self.max_nfe} evaluations")
        values = self.evaluate(state[0].to(run.dtype), run.at(t))
        return tuple(value.to(state[0].dtype) for value in values)
