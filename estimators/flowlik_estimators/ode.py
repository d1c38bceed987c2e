r"""Likelihood by the probability-flow ODE (Chen et al. 2018, arXiv 1806.07366; FFJORD, arXiv 1810.01367).

``dx/dt = v(x, t)``, ``d log p/dt = -div v(x, t)``, hence ``log p(x_1) = log N(x_0; 0, I) - int_0^1 div v(x_t,
t) dt``. torchdiffeq solves a data point from t = 1 - eps down to 0, a sample from 0 up: x and the integral
together (``augmented``), or x alone and the integral by a nested Clenshaw-Curtis rule at times that the same
solve passes through (``quadrature``; docs/math.md section 2, `flowlik_estimators.integration.clenshaw_curtis`).

Cost: an augmented evaluation is 1 forward, plus d vjps (exact), one vjp a probe (hutchinson) or none (closed). A
fixed-step solve of N steps takes N (euler), 2 N (midpoint, heun), 3 N (heun3), 4 N (rk4, the 3/8 rule) or N + 1
(adams_pec, `flowlik_estimators.integration.adams`) evaluations; ``richardson`` takes those of N and of 2 N steps. With
the quadrature an evaluation of the solve is one forward, and a node is what an augmented evaluation is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torchdiffeq import odeint

from flowlik_estimators.call import (
    PROBE_STREAM,
    Diverged,
    Estimate,
    Run,
    Samples,
    mean_over_probes,
    standard_normal_log_prob,
)
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.pilot import PILOT_ITEMS, PILOT_PROBES, STEP_ENDS, Law, Node, Pilot
from flowlik_estimators.divergence.probes import Noise
from flowlik_estimators.divergence.products import Traced, exact, hutchinson
from flowlik_estimators.grids import Grid, time_grid
from flowlik_estimators.integration import clenshaw_curtis
from flowlik_estimators.integration.adams import adams_pec
from flowlik_estimators.integration.torchdiffeq_solve import (
    _GAVE_UP,
    _TORCHDIFFEQ,
    ADAPTIVE,
    EQUAL_STEPS,
    Evaluate,
    _Side,
    _through,
)
from flowlik_estimators.registry import register

Solver = Literal[
    "dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun",
    "euler", "midpoint", "heun", "heun3", "rk4", "explicit_adams", "implicit_adams", "adams_pec",
]  # fmt: skip

_ALIASES = {"heun2": "heun", "fixed_adams": "implicit_adams"}
NODE_STREAM = 2**16
"""Stream of the fresh probes of a node: this plus its index in the finest rule."""

FEW_DIMENSIONS = 5
"""Up to here the d products of 17 nodes cost less than the 96 evaluations of as many steps of dopri5 that end there."""

STACKED_NUMBERS = 16_384
"""Nodes are evaluated together up to so many rows x dimensions: a batch of fewer costs a CPU its calls, not its
arithmetic (two dimensions, time a row at 500 / 2,000 / 8,000 rows: 3.2 / 1.6 / 1.1 microseconds)."""

_ORDERS = {"euler": 1, "midpoint": 2, "heun": 2, "heun3": 3, "rk4": 4}


@register("ode")
@dataclass(frozen=True, kw_only=True)
class ODE(Traced):
    """The ODE estimator.

    ``solver`` adaptive with ``rtol``, ``atol`` (1e-5 each) and ``max_nfe`` (10,000 evaluations, then the call
    is given up as diverged), or fixed-step with ``steps`` on ``grid`` (uniform; of adams_pec ramped). An adaptive
    solve controls the root-mean-square errors over the batch, in x's dtype, and never leaves the time interval; a
    fixed-step solve keeps its state in float64 and calls the network in x's dtype. ``richardson`` extrapolates the
    results of ``steps`` and twice as many by the solver's order.

    ``trace``: exact, hutchinson, or closed, the model's own divergence. Hutchinson takes ``probes`` (1; with the
    quadrature 2) of ``noise`` (rademacher, gaussian, orthogonal) in a ``basis`` (pixel, dct, pca) with a ``control``
    (none, gaussian); see `flowlik_estimators.divergence.probes`. The choice auto is made by a pilot: 8 draws of the
    model itself, the same for every call, 2 probes a candidate; its cost is counted. Draws of a conditional model would
    need conditions, so there the options must be named.

    ``divergence=quadrature`` takes ``nodes`` (3, 5, 9, ..., 129), or doubles them until the estimated error is at
    most ``tol`` nats: item by item with an exact or closed trace (3e-3, the mean error comes out many times
    smaller), for all items by the pilot's root-mean-square with probes (0.05). Probes are drawn anew at every
    node. ``allocation=neyman`` spreads ``probes`` x nodes products over the nodes by the pilot's variances, at
    least one each; uniform gives each node ``probes``. A fixed-step solve takes the nodes into its grid.

    ``extra``: ``dof``, Student's degrees of freedom of ``stderr``; ``nodes`` and ``quadrature_error``, the
    rule's estimated error in nats, each (batch,). Fixed probes along the path are independent replicates (without
    replacement, if orthogonal). With fresh ones ``stderr`` pools the nodes' sample variances, taking the pilot's
    mean variance for nodes that have a single probe, and ``dof`` is Satterthwaite's.
    """

    family = "ode"

    solver: Solver = "dopri5"
    rtol: float | None = None
    atol: float | None = None
    steps: int | None = None
    grid: Grid | None = None
    richardson: bool = False
    trace: Literal["exact", "hutchinson", "closed"] = "exact"  # type: ignore[assignment]
    noise: Noise | None = None  # type: ignore[assignment]
    basis: Literal["pixel", "dct", "pca", "auto"] | None = None
    control: Literal["none", "gaussian", "auto"] | None = None
    divergence: Literal["augmented", "quadrature"] = "augmented"
    nodes: int | None = None
    tol: float | None = None
    allocation: Literal["uniform", "neyman"] | None = None
    max_nfe: int | None = None

    def __post_init__(self) -> None:
        """Fold torchdiffeq's aliases, then check."""
        object.__setattr__(self, "solver", _ALIASES.get(self.solver, self.solver))
        super().__post_init__()

    @property
    def adaptive(self) -> bool:
        """Whether the solver chooses its own steps."""
        return self.solver in ADAPTIVE

    @property
    def stochastic(self) -> bool:
        """Whether the trace is estimated by probes."""
        return self.trace == "hutchinson"

    def implied(self) -> dict[str, object]:
        """Tolerances and limit of an adaptive solver, the grid of a fixed-step one; the plain probes; the rule."""
        own: dict[str, object] = (
            {"rtol": 1e-5, "atol": 1e-5, "max_nfe": 10_000}
            if self.adaptive
            else {"grid": "ramped" if self.solver == "adams_pec" else "uniform"}
        )
        if self.stochastic:
            own |= {"basis": "pixel", "control": "none"}
        if self.divergence == "quadrature":
            own |= {"probes": 2, "allocation": "neyman"} if self.stochastic else {}
            own |= {"tol": 0.05 if self.stochastic else 3e-3} if self.nodes is None else {}
        return {**super().implied(), **own}

    def _check(self) -> None:
        super()._check()
        self._at_least_one("steps", "max_nfe")
        self._check_solver()
        if not self.stochastic:
            self._no_effect(f"with trace={self.trace}", "basis", "control", "allocation")
        if self.noise == "gaussian" and self.basis not in (None, "pixel"):
            raise ValueError(f"{self.name}: basis has no effect with noise=gaussian, whose law has no axes")
        if self.solver in EQUAL_STEPS and "auto" in (self.basis, self.control):
            raise ValueError(
                f"{self.name}: the multistep solver {self.solver} needs a named basis and control: the nodes of a "
                "pilot would make its steps unequal"
            )
        if self.divergence == "augmented":
            self._no_effect("with divergence=augmented", "nodes", "tol", "allocation")
            return
        if self.nodes is not None:
            if self.nodes not in clenshaw_curtis.LEVELS:
                valid = ", ".join(map(str, clenshaw_curtis.LEVELS))
                raise ValueError(f"{self.name}: nodes must be one of {valid}, got {self.nodes}")
            self._no_effect("with a given number of nodes", "tol")
        elif not self.adaptive:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs nodes")
        if self.solver in EQUAL_STEPS:
            raise ValueError(f"{self.name}: the multistep solver {self.solver} needs divergence=augmented")

    def _check_solver(self) -> None:
        for option in ("rtol", "atol", "tol"):
            value = getattr(self, option)
            if value is not None and value <= 0.0:
                raise ValueError(f"{self.name}: {option} must be positive, got {value}")
        if self.richardson and (self.solver not in _ORDERS or self.divergence != "augmented"):
            one_step = ", ".join(_ORDERS)
            raise ValueError(f"{self.name}: richardson needs divergence=augmented and one of {one_step}")
        if self.adaptive:
            self._no_effect(f"with the adaptive solver {self.solver}", "steps", "grid")
            return
        self._no_effect(f"with the fixed-step solver {self.solver}", "rtol", "atol", "max_nfe")
        if self.steps is None:
            raise ValueError(f"{self.name}: the fixed-step solver {self.solver} needs steps")
        if self.solver in EQUAL_STEPS and self.grid not in (None, "uniform"):
            raise ValueError(f"{self.name}: the multistep solver {self.solver} needs grid=uniform")

    def supports(self, model: object) -> str | None:
        """Needs a velocity; for trace=closed a divergence; for a basis or control the events or moments they fit."""
        if not hasattr(model, "velocity"):
            return "needs a velocity field (a `velocity` method)"
        if self.trace == "closed" and not (
            hasattr(model, "velocity_and_divergence") or hasattr(model, "divergence")
        ):
            return "trace=closed needs a closed-form divergence (`velocity_and_divergence` or `divergence`)"
        return laws.refusal(self.noise, self.basis, self.control, self.probes, model)

    # --- the two entries ---

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        if self.divergence == "quadrature":
            times = self._times(run)
            path = self.states(model, x, run, times.flip(0)).flip(0)
            return _minus(standard_normal_log_prob(path[0]), self._integral(model, path, run))
        x0, log_det = self._solve(model, x, run, start=run.data_end, end=0.0, log_prob=True)
        return self._averaged(standard_normal_log_prob(x0)[:, None] + log_det.double(), run)

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        prior = standard_normal_log_prob(x0)
        if log_prob and self.divergence == "quadrature":
            path = self.states(model, x0, run, self._times(run))
            estimate = _minus(prior, self._integral(model, path, run))
            return Samples(x=path[-1].to(run.dtype), log_prob=estimate.log_prob)
        x, log_det = self._solve(model, x0, run, start=0.0, end=run.data_end, log_prob=log_prob)
        x = x.to(run.dtype)
        if not log_prob:
            return Samples(x=x)
        return Samples(x=x, log_prob=(prior[:, None] - log_det.double()).mean(1))

    # --- x and the integral together ---

    def _averaged(self, log_probs: Tensor, run: Run) -> Estimate:
        """Mean over columns with its standard error, from (batch, columns)."""
        population = math.prod(run.event_shape) if self.noise == "orthogonal" else None
        mean, stderr = mean_over_probes(log_probs, population)
        if stderr is None:
            return Estimate(log_prob=mean)
        dof = torch.full_like(mean, max(self.columns - 1, 1)).detach()
        return Estimate(log_prob=mean, stderr=stderr, extra={"dof": dof})

    def _solve(
        self, model: Any, x: Tensor, run: Run, *, start: float, end: float, log_prob: bool
    ) -> tuple[Tensor, Tensor]:
        """x at ``end``, and the integral of div v from ``start`` to ``end``, (batch, columns)."""
        evaluate = self._augmented(model, run) if log_prob else _plain(model, run)
        dtype = run.dtype if self.adaptive else torch.float64
        columns = torch.zeros(run.batch, self.columns, dtype=dtype, device=run.device)
        state = (x.to(dtype), columns) if log_prob else (x.to(dtype),)
        times = torch.tensor([start, end], dtype=torch.float64, device=run.device)
        path = self._integrate(evaluate, run, state, times)
        first, last = path[0][-1], path[-1][-1]
        if not self.richardson:
            return first, last
        assert self.steps is not None
        path = replace(self, steps=2 * self.steps, richardson=False)._integrate(evaluate, run, state, times)
        ahead = 1.0 / (2.0 ** _ORDERS[self.solver] - 1.0)
        x_end, log_det = path[0][-1], path[-1][-1]
        return x_end + ahead * (x_end - first), log_det + ahead * (log_det - last)

    def _augmented(self, model: Any, run: Run) -> Evaluate:
        if not self.stochastic:
            return self._deterministic(model, run)
        basis, coefficient = self.basis, 1.0
        if "auto" in (self.basis, self.control):
            pilot = Pilot(self, model, run, nodes=STEP_ENDS)
            basis, coefficient = pilot.of_the_whole_path()
        assert self.probes is not None
        assert basis is not None
        assert basis != "auto"
        law = Law(self, model, run, basis)
        probes = law.draw(run, self.probes, PROBE_STREAM)
        squares = None if self.control == "none" or coefficient == 0.0 else law.squares(probes)

        def evaluate(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            value, columns = hutchinson(
                lambda y: run.velocity(model, y, t), x, probes, differentiable=run.differentiable
            )
            return value, law.controlled(columns, squares, coefficient, t[:1])

        return evaluate

    def _deterministic(self, model: Any, run: Run) -> Evaluate:
        if self.trace == "closed":
            return _closed(model, run)
        return lambda x, t: exact(lambda y: run.velocity(model, y, t), x, differentiable=run.differentiable)

    # --- x alone, the integral by quadrature ---

    def _times(self, run: Run) -> Tensor:
        """Node times from 0 to the data end, as fine as this call may want them."""
        return clenshaw_curtis.angle_rule(self.nodes or clenshaw_curtis.FINEST, run.data_end)[0].to(
            run.device
        )

    def states(self, model: Any, x: Tensor, run: Run, times: Tensor) -> Tensor:
        """x at all times (nodes, batch, *event), the first being x itself."""
        dtype = run.dtype if self.adaptive else torch.float64
        step = len(times) - 1
        if not self._interpolates(run):
            step = max(1, step // (STEP_ENDS - 1))
        path: Tensor = self._integrate(_plain(model, run), run, (x.to(dtype),), times, times[step::step])[0]
        return path

    def _interpolates(self, run: Run) -> bool:
        """Whether an adaptive solve of x may pass over the nodes and interpolate there, to its own tolerance."""
        if self.stochastic:  # beside the probes' noise the interpolation's error is nothing
            return True
        return self.trace == "exact" and math.prod(run.event_shape) <= FEW_DIMENSIONS

    def _integral(self, model: Any, path: Tensor, run: Run) -> Estimate:
        """The integral of div v over [0, data end] along states at the node times."""
        if not self.stochastic:
            return self._refined(model, path, run)
        plan = self._plan(model, run)
        return self._pooled(model, path[:: (len(path) - 1) // (len(plan) - 1)], run, plan)

    def _refined(self, model: Any, path: Tensor, run: Run) -> Estimate:
        """Exact divergences at the nodes; each item takes more until its own estimate meets the tolerance."""
        times = self._times(run)
        values = torch.zeros(run.batch, len(times), dtype=torch.float64, device=run.device)
        total, error, nodes = run.zeros(), run.zeros(), run.zeros()
        active, seen = torch.arange(run.batch, device=run.device), set[int]()
        for level in (
            [self.nodes]
            if self.nodes
            else [n for n in clenshaw_curtis.LEVELS if n >= clenshaw_curtis.FIRST_JUDGED]
        ):
            stride = clenshaw_curtis.stride(level, len(times))
            fresh = sorted(set(range(0, len(times), stride)) - seen)
            part = run.rows(active)
            together = max(1, STACKED_NUMBERS // (part.batch * math.prod(run.event_shape)))
            for js in torch.split(torch.tensor(fresh, device=run.device), together):
                states = path[js] if part.batch == run.batch else path[js][:, active]
                values[active[:, None], js] = self._divergences(model, states, times[js], part)
            seen.update(fresh)
            have = values[active][:, ::stride]
            total = total.index_copy(0, active, clenshaw_curtis.integral(have, run.data_end))
            found = clenshaw_curtis.error_estimate(have, run.data_end)
            error[active], nodes[active] = found, float(level)
            if self.tol is None:
                break
            active = active[found > self.tol]
            if len(active) == 0:
                break
        return Estimate(log_prob=total, extra={"nodes": nodes, "quadrature_error": error})

    def _divergences(self, model: Any, states: Tensor, times: Tensor, run: Run) -> Tensor:
        """Divergences (batch, nodes) at states (nodes, batch, *event), all in one evaluation."""
        every = run.repeated(len(states))
        evaluate = self._deterministic(model, every)
        at = times.repeat_interleave(run.batch)
        _, divergences = evaluate(states.flatten(0, 1).to(run.dtype), every.at(at))
        return divergences[:, 0].double().view(len(states), run.batch).T

    def _plan(self, model: Any, run: Run) -> list[Node]:
        """Law and number of the probes of every node."""
        chosen = self.allocation == "neyman" or "auto" in (self.basis, self.control)
        if self.nodes is None or chosen:
            return Pilot(self, model, run, nodes=self.nodes).plan()
        assert self.basis is not None
        assert self.basis != "auto"
        assert self.probes is not None
        return [Node(self.basis, 1.0, self.probes)] * self.nodes

    def _pooled(self, model: Any, path: Tensor, run: Run, plan: Sequence[Node]) -> Estimate:
        """Fresh probes at every node, their mean, and the pooled standard error."""
        times, weights = clenshaw_curtis.angle_rule(len(plan), run.data_end)
        first = clenshaw_curtis.stride(len(plan))
        bases = {node.basis: Law(self, model, run, node.basis) for node in plan}
        size = math.prod(run.event_shape)
        total, variance, quartic = run.zeros(), run.zeros(), run.zeros()
        known = self.probes is not None and (self.probes > 1 or all(n.probes == size for n in plan))
        for j, node in enumerate(plan):
            law, weight = bases[node.basis], float(weights[j])
            columns = law.columns(
                model, run, path[j], float(times[j]), node, NODE_STREAM + j * first
            ).double()
            total = total + weight * columns.mean(1)
            left = 1.0 - node.probes / size if self.noise == "orthogonal" else 1.0
            if node.probes > 1:
                own, degrees = columns.detach().var(1), node.probes - 1
            elif node.variance is not None:
                own, degrees = run.zeros() + node.variance, PILOT_ITEMS * (PILOT_PROBES - 1)
            else:
                continue
            share = weight**2 * left * own / node.probes
            variance, quartic = variance + share, quartic + share.square() / degrees
        extra = {"nodes": run.zeros() + len(plan)}
        if plan[0].error is not None:
            extra["quadrature_error"] = run.zeros() + plan[0].error
        if not known:
            return Estimate(log_prob=total, extra=extra)
        dof = torch.where(quartic > 0, variance.square() / quartic, math.inf)
        return Estimate(log_prob=total, stderr=variance.sqrt(), extra={**extra, "dof": dof})

    # --- torchdiffeq ---

    def _integrate(
        self,
        evaluate: Evaluate,
        run: Run,
        state: tuple[Tensor, ...],
        times: Tensor,
        step_ends: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """The parts of the state at the given monotone times, (times, batch, ...) each."""
        ends = times.tolist()
        start, end = ends[0], ends[-1]
        side = _Side(evaluate, run, min(start, end), max(start, end), self.max_nfe)
        # the end is a step's end: otherwise an adaptive solver steps beyond it and interpolates
        options: dict[str, Any] = {"step_t": times[-1:] if step_ends is None else step_ends}
        if self.adaptive:
            side.callback_accept_step = lambda *_: run.stepped()
            side.callback_reject_step = lambda *_: run.stepped(accepted=False)
        else:
            assert self.steps is not None
            assert self.grid is not None
            grid = _through(time_grid(self.grid, self.steps, start, end), ends).to(run.device)
            if self.solver == "adams_pec":
                return _by_adams(side, state, grid, set(ends))
            side.callback_step = lambda *_: run.stepped()
            options = {"grid_constructor": lambda func, y0, t: grid}
        method = _TORCHDIFFEQ.get(self.solver, self.solver)
        tolerances = {} if self.rtol is None else {"rtol": self.rtol, "atol": self.atol}
        try:
            path: tuple[Tensor, ...] = odeint(
                side, state, times, method=method, options=options, **tolerances
            )
        except AssertionError as error:
            if not str(error).startswith(_GAVE_UP):
                raise
            why = str(error).partition(":")[0]
            raise Diverged(f"{self.solver} gave up near t = {float(side.last):.6g}: {why}") from error
        return path


def _by_adams(side: _Side, state: tuple[Tensor, ...], grid: Tensor, wanted: set[float]) -> tuple[Tensor, ...]:
    """The states at the wanted times of the grid, (times, batch, ...) each part."""
    kept = [at for t, at in zip(grid.tolist(), adams_pec(side, state, grid), strict=True) if t in wanted]
    for _ in range(len(grid) - 1):
        side.run.stepped()
    return tuple(torch.stack(parts) for parts in zip(*kept, strict=True))


def _minus(prior: Tensor, integral: Estimate) -> Estimate:
    return replace(integral, log_prob=prior - integral.log_prob)


def _plain(model: Any, run: Run) -> Evaluate:
    return lambda x, t: (run.velocity(model, x, t),)


def _closed(model: Any, run: Run) -> Evaluate:
    """Velocity and the model's own divergence, by one evaluation where the model offers both at once."""

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        if hasattr(model, "velocity_and_divergence"):
            v, div = model.velocity_and_divergence(x, t, cond=run.cond)
        else:
            v, div = model.velocity(x, t, cond=run.cond), model.divergence(x, t, cond=run.cond)
        return run.event(v, "velocity"), run.scalar(div, "divergence")[:, None]

    return both
