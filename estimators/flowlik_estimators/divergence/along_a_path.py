"""The integral of the divergence along a path by a nested rule: with exact divergences, or with probes at every node.

The path is the states at the nodes of the finest rule that a call may want, from `Solve.states`; the rules are those of
`flowlik_estimators.integration.clenshaw_curtis`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.call import Estimate, Run
from flowlik_estimators.divergence.law import Law, Node, ProbeOptions
from flowlik_estimators.divergence.pilot import Pilot
from flowlik_estimators.integration import clenshaw_curtis
from flowlik_estimators.integration.torchdiffeq_solve import Evaluate, Solve
from flowlik_models.numerics.streams import NODE_STREAM

STACKED_NUMBERS = 16_384
"""Nodes are evaluated together up to so many rows x dimensions: a batch of fewer costs a CPU its calls, not its
arithmetic (two dimensions, time a row at 500 / 2,000 / 8,000 rows: 3.2 / 1.6 / 1.1 microseconds)."""

Evaluator = Callable[[Run], Evaluate]
"""A call -> velocity and divergence (batch, 1) of its rows; nodes are stacked, so that a call may have more of them."""


@dataclass(frozen=True, kw_only=True)
class Quadrature:
    """The rule of ``nodes`` nodes, or (None) of as many as bring the estimated error down to ``tol`` nats."""

    nodes: int | None
    tol: float | None
    rule: clenshaw_curtis.Rule = clenshaw_curtis.angle_rule

    @property
    def stiff(self) -> Quadrature:
        """The same with its nodes where a stiff field needs them."""
        return replace(self, rule=clenshaw_curtis.stretched_rule)

    def times(self, run: Run) -> Tensor:
        """Node times from the noise end to the data end, as fine as this call may want them, on the CPU."""
        nodes = self.nodes or clenshaw_curtis.FINEST
        return self.rule(nodes, run.data_end, run.noise_end)[0]

    def exact(self, evaluator: Evaluator, path: Tensor, run: Run) -> Estimate:
        """The integral of div v over [noise end, data end] along states (nodes, batch, *event) at `times`.

        Each item takes more nodes until its own estimate of the error meets the tolerance.
        """
        times = self.times(run).to(run.device, non_blocking=True)
        values = torch.zeros(run.batch, len(times), dtype=torch.float64, device=run.device)
        total, error, nodes = run.zeros(), run.zeros(), run.zeros()
        active, first = torch.arange(run.batch, device=run.device), True
        for level in self._levels():
            stride = clenshaw_curtis.stride(level, len(times))
            start, step = (0, stride) if first else (stride, 2 * stride)  # every second one is known
            fresh, first = torch.arange(start, len(times), step, device=run.device), False
            every = len(active) == run.batch
            rows = run if every else run.rows(active)
            for js in torch.split(fresh, _together(run, len(active))):
                states = path[js] if every else path[js][:, active]
                values[active[:, None], js] = _divergences(evaluator, states, times[js], rows)
            here = values[active][:, ::stride]
            total = total.index_copy(
                0, active, clenshaw_curtis.integral(here, run.data_end, self.rule, run.noise_end)
            )
            estimated = clenshaw_curtis.error_estimate(here, run.data_end, self.rule, run.noise_end)
            error[active], nodes[active] = estimated, float(level)
            if self.tol is None:
                break
            active = active[estimated > self.tol]
            if len(active) == 0:
                break
        return Estimate(log_prob=total, extra={"nodes": nodes, "quadrature_error": error})

    def _levels(self) -> list[int]:
        if self.nodes:
            return [self.nodes]
        return [n for n in clenshaw_curtis.LEVELS if n >= clenshaw_curtis.FIRST_JUDGED]

    def probed(
        self, options: ProbeOptions, solve: Solve, model: Any, path: Tensor, run: Run, *, neyman: bool
    ) -> Estimate:
        """The same with fresh probes at every node, their mean, and the pooled standard error.

        ``neyman``: a pilot, whose draws ``solve`` takes along their path, allocates the probes to the nodes.
        """
        plan = self._plan(options, solve, model, run, neyman=neyman)
        path = path[:: (len(path) - 1) // (len(plan) - 1)]
        times, weights = clenshaw_curtis.angle_rule(len(plan), run.data_end, run.noise_end)
        first = clenshaw_curtis.stride(len(plan))
        bases = {node.basis: Law(options, model, run, node.basis) for node in plan}
        pool = _Pool(run, math.prod(run.event_shape) if options.noise == "orthogonal" else None)
        for j, node in enumerate(plan):
            stream = NODE_STREAM + j * first
            columns, squares = bases[node.basis].columns(model, run, path[j], float(times[j]), node, stream)
            pool.add(float(weights[j]), columns.double(), squares, node)
        size = math.prod(run.event_shape)
        return pool.estimate(plan, known=options.probes > 1 or all(node.probes == size for node in plan))

    def _plan(
        self, options: ProbeOptions, solve: Solve, model: Any, run: Run, *, neyman: bool
    ) -> Sequence[Node]:
        """Law and number of the probes of every node."""
        if self.nodes is None or neyman or options.automatic:
            return Pilot(options, solve, model, run, nodes=self.nodes, tol=self.tol).plan(neyman=neyman)
        return [Node(options.named_basis, 1.0, options.probes)] * self.nodes


@dataclass
class _Pool:
    """The sum over nodes and its variance; ``population`` where probes are drawn without replacement from so many."""

    run: Run
    population: int | None
    total: Tensor = field(init=False)
    variance: Tensor = field(init=False)
    quartic: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.total, self.variance, self.quartic = self.run.zeros(), self.run.zeros(), self.run.zeros()

    def add(self, weight: float, columns: Tensor, squares: Tensor, node: Node) -> None:
        """A node's estimates and squared products, (batch, probes)."""
        self.total = self.total + weight * columns.mean(1)
        left = 1.0 - node.probes / self.population if self.population else 1.0
        found = _variance(columns.detach(), squares.double(), node)
        if found is None:
            return
        own, degrees = found
        share = weight**2 * left * own / node.probes
        self.variance, self.quartic = self.variance + share, self.quartic + share.square() / degrees

    def estimate(self, plan: Sequence[Node], *, known: bool) -> Estimate:
        """The integral; with its standard error and Satterthwaite's degrees of freedom where they are known."""
        extra = {"nodes": self.run.zeros() + len(plan)}
        if plan[0].error is not None:
            extra["quadrature_error"] = self.run.zeros() + plan[0].error
        if not known:
            return Estimate(log_prob=self.total, extra=extra)
        dof = torch.where(self.quartic > 0, self.variance.square() / self.quartic, math.inf)
        return Estimate(log_prob=self.total, stderr=self.variance.sqrt(), extra={**extra, "dof": dof})


def _variance(columns: Tensor, squares: Tensor, node: Node) -> tuple[Tensor, int] | None:
    """Variance of one probe of every item (batch,) and its degrees of freedom; None where nothing is known of it.

    Scaled by the pilot, an item's own squared products follow its noise, also from a single probe: a mean over the
    pilot's items would be too small wherever the noise falls at other times in each item.
    """
    k = node.probes
    scaled = None if node.scale is None else node.scale * squares.mean(1)
    if k == 1:
        return None if scaled is None else (scaled, 1)
    sample = columns.var(1)
    return (sample, k - 1) if scaled is None else ((sample + scaled) / 2.0, 2 * k - 1)


def _together(run: Run, rows: int) -> int:
    """How many nodes are stacked."""
    return max(1, STACKED_NUMBERS // (rows * math.prod(run.event_shape)))


def _divergences(evaluator: Evaluator, states: Tensor, times: Tensor, run: Run) -> Tensor:
    """Divergences (batch, nodes) at states (nodes, batch, *event), all in one evaluation."""
    every = run.repeated(len(states))
    at = times.repeat_interleave(run.batch)
    _, divergences = evaluator(every)(states.flatten(0, 1).to(run.dtype), every.at(at))
    return divergences[:, 0].double().view(len(states), run.batch).T
