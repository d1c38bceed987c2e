"""Solves of dx/dt = v(x, t) by torchdiffeq or by Adams' predictor and corrector, and the table of all solvers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Run
from flowlik_estimators.grids import time_grid
from flowlik_estimators.integration.adams import adams_pec

Adaptive = Literal["dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun"]
OneStep = Literal["euler", "midpoint", "heun", "heun3", "rk4"]
Multistep = Literal["explicit_adams", "implicit_adams", "adams_pec"]
Solver = Literal[Adaptive, OneStep, Multistep]


@dataclass(frozen=True, kw_only=True)
class Method:
    """What is known of one solver.

    ``adaptive``: it chooses its own steps. ``order``: of the global error, for Richardson's extrapolation.
    ``evaluations`` of the field a step. ``equal_steps``: it needs a uniform grid. ``grid``: the one it takes where none
    is named. ``torchdiffeq``: its name there, where that is another.
    """

    adaptive: bool = False
    order: int | None = None
    evaluations: int | None = None
    equal_steps: bool = False
    grid: str = "uniform"
    torchdiffeq: str | None = None


SOLVERS: dict[str, Method] = {
    "dopri5": Method(adaptive=True),
    "dopri8": Method(adaptive=True),
    "bosh3": Method(adaptive=True),
    "fehlberg2": Method(adaptive=True),
    "adaptive_heun": Method(adaptive=True),
    "euler": Method(order=1, evaluations=1),
    "midpoint": Method(order=2, evaluations=2),
    "heun": Method(order=2, evaluations=2, torchdiffeq="heun2"),
    "heun3": Method(order=3, evaluations=3),
    "rk4": Method(order=4, evaluations=4),
    "explicit_adams": Method(equal_steps=True),
    "implicit_adams": Method(equal_steps=True),
    "adams_pec": Method(evaluations=1, grid="ramped"),
}
"""Solver -> what is known of it; adams_pec is this package's own and evaluates the field once more at the start."""

ALIASES = {"heun2": "heun", "fixed_adams": "implicit_adams"}
"""torchdiffeq's other names of them."""

ONE_STEP = {name: method.order for name, method in SOLVERS.items() if method.order is not None}
"""Order of the global error of the one-step solvers of fixed steps."""

GAVE_UP = ("underflow in dt", "non-finite values", "max_num_steps")
"""How the messages begin by which torchdiffeq gives a solve up."""

LATEST = 14
"""Evaluations that are remembered, all of a step: where a solve is given up, they say which rows it was."""

_SAME_TIME = 1e-9

CONTROLLED = 2
"""Parts of the state, x and its divergence, that an error controller sees; further ones are carried along."""

SAFETY = 0.8
"""Share of the longest step that a solve with probes dares; torchdiffeq's 0.9 has more steps refused."""

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""(x, t) -> (v,) or (v, divergence columns), and what is carried along."""


def torchdiffeq_name(solver: str) -> str:
    """What torchdiffeq calls the solver."""
    return SOLVERS[solver].torchdiffeq or solver


def velocity_alone(model: Any, run: Run) -> Evaluate:
    """The right-hand side of x without its divergence."""
    return lambda x, t: (run.velocity(model, x, t),)


@dataclass(frozen=True, kw_only=True)
class Solve:
    """A solver with its tolerances and limit of evaluations (adaptive), or with its steps and grid.

    ``probed``: the second part of a state is a divergence estimated by probes, which is controlled as one number beside
    the d of its row.
    """

    solver: str
    rtol: float | None = None
    atol: float | None = None
    max_nfe: int | None = None
    steps: int | None = None
    grid: str | None = None
    probed: bool = False

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return SOLVERS[self.solver].adaptive

    def dtype(self, run: Run) -> torch.dtype:
        """Of the state: x's own where an error controller looks at it, float64 where steps only add up."""
        return run.dtype if self.adaptive else torch.float64

    def loosened(self, tolerance: float) -> Solve:
        """An adaptive solve at no less than that tolerance; a fixed-step one as it is."""
        if not self.adaptive:
            return self
        rtol, atol = (max(value or 0.0, tolerance) for value in (self.rtol, self.atol))
        return replace(self, rtol=rtol, atol=atol)

    def tightened(self, share: float) -> Solve:
        """An adaptive solve at that share of its tolerances."""
        assert self.rtol is not None
        assert self.atol is not None
        return replace(self, rtol=share * self.rtol, atol=share * self.atol)

    def halved(self) -> Solve:
        """A fixed-step solve by twice as many steps."""
        assert self.steps is not None
        return replace(self, steps=2 * self.steps)

    def states(
        self, model: Any, x: Tensor, run: Run, times: Tensor, step_ends: Tensor | None = None
    ) -> Tensor:
        """x at all times (times, batch, *event), the first being x itself; ``step_ends`` as in `path`."""
        start = (x.to(self.dtype(run)),)
        states: Tensor = self.path(velocity_alone(model, run), run, start, times, step_ends)[0]
        return states

    def path(
        self,
        evaluate: Evaluate,
        run: Run,
        state: tuple[Tensor, ...],
        times: Tensor,
        step_ends: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The parts of the state at the given monotone times, (times, batch, ...) each; the times are on the CPU.

        ``step_ends``: times at which an adaptive solver ends a step, by default the last one alone; at the others it
        interpolates. A fixed-step solver takes all times into its grid.

        Raises:
            Diverged: the solver gave up, or reached its limit of evaluations.
        """
        ends = times.tolist()
        start, end = ends[0], ends[-1]
        side = _RightHandSide(evaluate, run, min(start, end), max(start, end), self.max_nfe)
        if self.adaptive:
            side.callback_accept_step = lambda *_: run.stepped()
            side.callback_reject_step = lambda *_: run.stepped(accepted=False)
            # the end is a step's end: otherwise the solver steps beyond it and interpolates
            times, step_ends = _moved(run, times, times[-1:] if step_ends is None else step_ends)
            return self._torchdiffeq(side, state, times, {"step_t": step_ends})
        assert self.steps is not None
        assert self.grid is not None
        grid = _through(time_grid(self.grid, self.steps, start, end), ends)
        if self.solver == "adams_pec":
            return _by_adams(side, state, grid, set(ends))
        side.callback_step = lambda *_: run.stepped()
        times, grid = _moved(run, times, grid)
        return self._torchdiffeq(side, state, times, {"grid_constructor": lambda func, y0, t: grid})

    def _torchdiffeq(
        self, side: _RightHandSide, state: tuple[Tensor, ...], times: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        if self.adaptive and self.probed and len(state) > 1:
            options = {**options, "norm": _norm_of_rows, "safety": SAFETY}
        elif self.adaptive and len(state) > CONTROLLED:
            options = {**options, "norm": _norm_of_the_controlled}
        tolerances = {} if self.rtol is None else {"rtol": self.rtol, "atol": self.atol}
        method = torchdiffeq_name(self.solver)
        try:
            path: tuple[Tensor, ...] = _odeint()(
                side, state, times, method=method, options=options, **tolerances
            )
        except AssertionError as error:
            if not str(error).startswith(GAVE_UP):
                raise
            why = str(error).partition(":")[0]
            message = f"{self.solver} gave up near t = {float(side.last):.6g}: {why}"
            raise Diverged(message, rows=side.not_finite(), suspicion=side.unsteadiness()) from error
        return path


@cache
def _odeint() -> Callable[..., tuple[Tensor, ...]]:
    """torchdiffeq's, loaded when a solve needs it."""
    from torchdiffeq import odeint

    return odeint  # type: ignore[no-any-return]


def _norm_of_the_controlled(parts: tuple[Tensor, ...]) -> Tensor:
    """The largest root-mean-square of the controlled parts, as torchdiffeq takes it of all."""
    return torch.stack([part.abs().pow(2).mean().sqrt() for part in parts[:CONTROLLED]]).amax()


def _norm_of_rows(parts: tuple[Tensor, ...]) -> Tensor:
    """Root-mean-square over the d + 1 numbers of each row, the columns of its divergence being one together.

    The noise of the probes grows by the root of d, as does the error of the divergence that this allows.
    """
    x, columns = parts[0].flatten(1), parts[1]
    squares = x.square().sum(1) + columns.square().mean(1)
    return (squares / (x.shape[1] + 1)).mean().sqrt()


def _moved(run: Run, times: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the device, by one copy; what the host gives away is copied aside, so that it need not wait."""
    moved = torch.cat((times, others)).to(run.device, non_blocking=True)
    return moved[: len(times)], moved[len(times) :]


def _through(grid: Tensor, times: list[float]) -> Tensor:
    """A grid with the given times added; its own points that all but fall on one of them are dropped."""
    if len(times) == 2:
        return grid
    nodes = torch.tensor(times, dtype=torch.float64)
    apart = (grid[:, None] - nodes).abs().amin(1) > _SAME_TIME
    return torch.cat([grid[apart], nodes]).sort(descending=times[0] > times[-1]).values


def _by_adams(
    side: _RightHandSide, state: tuple[Tensor, ...], grid: Tensor, times: set[float]
) -> tuple[Tensor, ...]:
    """The states at those times of the grid, (times, batch, ...) each part."""
    states = [at for t, at in zip(grid.tolist(), adams_pec(side, state, grid), strict=True) if t in times]
    for _ in range(len(grid) - 1):
        side.run.stepped()
    return tuple(torch.stack(parts) for parts in zip(*states, strict=True))


class _RightHandSide:
    """The field as torchdiffeq calls it; keeps time in its interval and evaluations to the limit."""

    callback_accept_step: Callable[..., None]
    callback_reject_step: Callable[..., None]
    callback_step: Callable[..., None]

    def __init__(self, evaluate: Evaluate, run: Run, low: float, high: float, max_nfe: int | None) -> None:
        self.evaluate, self.run, self.low, self.high, self.max_nfe = evaluate, run, low, high, max_nfe
        self.last = torch.tensor(high)
        self.limit = None if max_nfe is None else run.counts.forwards + max_nfe * run.batch
        self.latest: deque[tuple[Tensor, tuple[Tensor, ...]]] = deque(maxlen=LATEST)

    def not_finite(self) -> Tensor | None:
        """The rows (batch,) whose values were the first not to be finite; None where all are."""
        for t, values in self.latest:
            bad = torch.stack([~torch.isfinite(value).flatten(1).all(1) for value in values]).any(0)
            if bool(torch.isfinite(t)) and bool(bad.any()):
                return bad
        return None

    def unsteadiness(self) -> Tensor | None:
        """How much the velocity of every row has changed of late, (batch,): most where it is stiff."""
        if len(self.latest) < 2:
            return None
        velocities = [values[0].flatten(1) for _, values in self.latest]
        return torch.stack([(new - old).norm(dim=1) for old, new in pairwise(velocities)]).amax(0)

    def __call__(self, t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        run = self.run
        t = t.clamp(self.low, self.high)
        self.last = t.detach()
        if self.limit is not None and run.counts.forwards >= self.limit:
            last = float(self.last)
            message = f"stopped at t = {last:.6g} after max_nfe = {self.max_nfe} evaluations"
            raise Diverged(message, suspicion=self.unsteadiness())
        values = self.evaluate(state[0].to(run.dtype), run.at(t))
        self.latest.append((self.last, tuple(value.detach() for value in values)))
        return tuple(value.to(state[0].dtype) for value in values)
