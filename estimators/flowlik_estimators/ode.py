r"""Likelihood by the probability-flow ODE (Chen et al. 2018, arXiv 1806.07366; FFJORD, arXiv 1810.01367).

``dx/dt = v(x, t)``, ``d log p/dt = -div v(x, t)``, hence ``log p(x_1) = log N(x_0; 0, I) - int_0^1 div v(x_t,
t) dt``. x and the integral are solved together by torchdiffeq: a data point from t = 1 - eps down to 0, a
sample from 0 up.

Cost: an evaluation is 1 forward, plus d vjps (exact), one vjp a probe (hutchinson) or none (closed). A
fixed-step solve of N steps takes N (euler), 2 N (midpoint, heun), 3 N (heun3) or 4 N (rk4, the 3/8 rule)
evaluations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from flowlik_estimators.base import (
    Diverged,
    Estimate,
    Run,
    Samples,
    mean_over_probes,
    standard_normal_log_prob,
)
from flowlik_estimators.grids import Grid, time_grid
from flowlik_estimators.registry import register
from flowlik_estimators.trace import Divergence, Traced

Solver = Literal[
    "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun",
    "euler", "midpoint", "heun", "heun3", "rk4", "explicit_adams", "implicit_adams",
]  # fmt: skip

ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun")
MULTISTEP = ("explicit_adams", "implicit_adams")
_ALIASES = {"heun2": "heun", "fixed_adams": "implicit_adams"}
_TORCHDIFFEQ = {"heun": "heun2"}
_GAVE_UP = ("underflow in dt", "non-finite values", "max_num_steps")

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(x, t) -> (v,) or (v, divergence columns)."""


@register("ode")
@dataclass(frozen=True, kw_only=True)
class ODE(Traced):
    """The ODE estimator.

    ``solver`` adaptive with ``rtol``, ``atol`` (1e-5 each) and ``max_nfe`` (10,000 evaluations, then the call
    is given up as diverged), or fixed-step with ``steps`` on ``grid`` (uniform). ``trace``: exact, hutchinson
    with ``probes`` (1) of ``noise`` (rademacher), or closed, the model's own divergence. Several probes run
    in one solve and give a standard error. An adaptive solve controls the largest of the two root-mean-square
    errors over the batch, of x and of the log-determinants, in x's dtype, and never leaves the time interval;
    a fixed-step solve keeps both in float64 and calls the network in x's dtype.
    """

    family = "ode"

    solver: Solver = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    grid: Grid | None = None
    trace: Literal["exact", "hutchinson", "closed"] = "exact"  # type: ignore[assignment]
    max_nfe: int | None = None

    def __post_init__(self) -> None:
        """Fold torchdiffeq's aliases, then check."""
        object.__setattr__(self, "solver", _ALIASES.get(self.solver, self.solver))
        super().__post_init__()

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.solver in ADAPTIVE

    def implied(self) -> dict[str, object]:
        """Tolerances and limit of an adaptive solver; the grid of a fixed-step one."""
        own: dict[str, object] = (
            {"rtol": 1e-5, "atol": 1e-5, "max_nfe": 10_000} if self.adaptive else {"grid": "uniform"}
        )
        return {**super().implied(), **own}

    def _check(self) -> None:
        super()._check()
        self._at_least_one("steps", "max_nfe")
        if self.adaptive:
            self._no_effect(f"with the adaptive solver {self.solver}", "steps", "grid")
            for option in ("rtol", "atol"):
                value = getattr(self, option)
                if value is not None and value <= 0.0:
                    raise ValueError(f"{self.name}: {option} must be positive, got {value}")
            return
        self._no_effect(f"with the fixed-step solver {self.solver}", "rtol", "atol", "max_nfe")
        if self.steps is None:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs steps")
        if self.solver in MULTISTEP and self.grid not in (None, "uniform"):
            raise ValueError(f"{self.name}: the multistep solver {self.solver} needs grid=uniform")

    def supports(self, model: object) -> str | None:
        """Needs a velocity, and for trace=closed a divergence."""
        if not hasattr(model, "velocity"):
            return "needs a velocity field (a `velocity` method)"
        if self.trace == "closed" and not (
            hasattr(model, "velocity_and_divergence") or hasattr(model, "divergence")
        ):
            return "trace=closed needs a closed-form divergence (`velocity_and_divergence` or `divergence`)"
        return None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        x0, log_det = self._solve(model, x, run, start=run.data_end, end=0.0, log_prob=True)
        mean, stderr = mean_over_probes(standard_normal_log_prob(x0)[:, None] + log_det.double())
        return Estimate(log_prob=mean, stderr=stderr)

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        x, log_det = self._solve(model, x0, run, start=0.0, end=run.data_end, log_prob=log_prob)
        x = x.to(run.dtype)
        if not log_prob:
            return Samples(x=x)
        mean, _ = mean_over_probes(standard_normal_log_prob(x0)[:, None] - log_det.double())
        return Samples(x=x, log_prob=mean)

    def _solve(
        self, model: Any, x: Tensor, run: Run, *, start: float, end: float, log_prob: bool
    ) -> tuple[Tensor, Tensor]:
        """x at ``end``, and the integral of div v from ``start`` to ``end``, (batch, columns)."""
        evaluate = self._augmented(model, run) if log_prob else _plain(model, run)
        dtype = run.dtype if self.adaptive else torch.float64
        columns = torch.zeros(run.batch, self.columns, dtype=dtype, device=run.device)
        state = (x.to(dtype), columns) if log_prob else (x.to(dtype),)
        side = _Side(evaluate, run, min(start, end), max(start, end), self.max_nfe)
        # the end is a step's end: otherwise an adaptive solver steps beyond it and interpolates
        options: dict[str, Any] = {"step_t": torch.tensor([end], dtype=torch.float64, device=run.device)}
        if self.adaptive:
            side.callback_accept_step = lambda *_: run.stepped()
            side.callback_reject_step = lambda *_: run.stepped(accepted=False)
        else:
            assert self.steps is not None
            assert self.grid is not None
            grid = time_grid(self.grid, self.steps, start, end).to(run.device)
            side.callback_step = lambda *_: run.stepped()
            options = {"grid_constructor": lambda func, y0, t: grid}
        times = torch.tensor([start, end], dtype=torch.float64, device=run.device)
        method = _TORCHDIFFEQ.get(self.solver, self.solver)
        tolerances = {} if self.rtol is None else {"rtol": self.rtol, "atol": self.atol}
        try:
            path = odeint(side, state, times, method=method, options=options, **tolerances)
        except AssertionError as error:
            if not str(error).startswith(_GAVE_UP):
                raise
            why = str(error).partition(":")[0]
            raise Diverged(f"{self.solver} gave up near t = {side.last:.6g}: {why}") from error
        return path[0][-1], path[-1][-1]

    def _augmented(self, model: Any, run: Run) -> Evaluate:
        if self.trace == "closed":
            return _closed(model, run)
        divergence: Divergence = self.divergence(run)
        return lambda x, t: divergence(lambda y: _velocity(model, run, y, t), x)


class _Side:
    """The right-hand side as torchdiffeq calls it; keeps time in its interval and evaluations to the limit."""

    callback_accept_step: Callable[..., None]
    callback_reject_step: Callable[..., None]
    callback_step: Callable[..., None]

    def __init__(self, evaluate: Evaluate, run: Run, low: float, high: float, max_nfe: int | None) -> None:
        self.evaluate, self.run, self.low, self.high, self.max_nfe = evaluate, run, low, high, max_nfe
        self.last = high

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = self.run
        t = t.clamp(self.low, self.high)
        if self.max_nfe is not None:
            self.last = float(t.detach())
            if run.counts.forwards >= self.max_nfe * run.batch:
                raise Diverged(f"stopped at t = {self.last:.6g} after max_nfe = {self.max_nfe} evaluations")
        values = self.evaluate(state[0].to(run.dtype), run.at(t))
        return tuple(value.to(state[0].dtype) for value in values)


def _velocity(model: Any, run: Run, x: Tensor, t: Tensor) -> Tensor:
    return run.event(model.velocity(x, t, cond=run.cond), "velocity")


def _plain(model: Any, run: Run) -> Evaluate:
    return lambda x, t: (_velocity(model, run, x, t),)


def _closed(model: Any, run: Run) -> Evaluate:
    """Velocity and the model's own divergence, by one evaluation where the model offers both at once."""

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(model, "velocity_and_divergence"):
            v, div = model.velocity_and_divergence(x, t, cond=run.cond)
        else:
            v, div = model.velocity(x, t, cond=run.cond), model.divergence(x, t, cond=run.cond)
        return run.event(v, "velocity"), run.scalar(div, "divergence")[:, None]

    return both
