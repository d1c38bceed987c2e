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
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Estimate, Run, Samples, mean_over_probes
from flowlik_estimators.divergence import augmented, skewness
from flowlik_estimators.divergence.along_a_path import Quadrature
from flowlik_estimators.divergence.ode_options import ODEOptions
from flowlik_estimators.integration.torchdiffeq_solve import ONE_STEP, Evaluate, Solve, velocity_alone
from flowlik_estimators.registry import register

STEP_ENDS = 17
"""Without probes, the adaptive solve of x ends a step at the nodes of this rule; it interpolates between its steps."""

FEW_DIMENSIONS = 5
"""Up to here the d vector-Jacobian products of 17 nodes cost less than the 96 evaluations of as many steps of dopri5
that end there."""


STIFF = 0.1
"""Share of the tolerances for the items that a quadrature has found stiff: what is thin asks for a nearer path."""


@register("ode")
@dataclass(frozen=True, kw_only=True)
class ODE(ODEOptions):
    """The ODE estimator.

    ``solver`` adaptive with ``rtol``, ``atol`` (1e-5 each) and ``max_nfe`` (10,000 evaluations, then the call
    is given up as diverged), or fixed-step with ``steps`` on ``grid`` (uniform; of adams_pec ramped). An adaptive
    solve controls the root-mean-square errors over the batch, in x's dtype, and never leaves the time interval: the
    larger of those of x and of the divergence, or with probes that of a row's d + 1 numbers, since a solve need not be
    far more exact than its trace. A fixed-step solve keeps its state in float64 and calls the network in x's dtype.
    ``richardson`` extrapolates the results of ``steps`` and twice as many by the solver's order.

    ``trace``: exact, hutchinson, or closed, the model's own divergence. Hutchinson takes ``probes`` (1; with the
    quadrature 2) of ``noise`` (rademacher, gaussian, orthogonal, hutch++) in a ``basis`` (pixel, dct, pca) with a
    ``control`` (none, gaussian); see `flowlik_estimators.divergence.probes`. The choice auto is made by a pilot: 8
    draws of the model itself, the same for every call, 2 probes a candidate; its cost is counted. Draws of a
    conditional model would need conditions, so there the options must be named.

    ``redraw`` draws the probes anew for every evaluation of a fixed-step solve instead of keeping them along the path:
    a step's errors average out, so that one probe is about as quiet as several fixed ones at the same cost.

    ``divergence=quadrature`` takes ``nodes`` (3, 5, 9, ..., 129), or doubles them until the estimated error is at most
    ``tol`` nats: item by item with an exact or closed trace (3e-3, the mean error comes out many times smaller; what
    129 nodes leave above it is solved again, at a tenth of the tolerances, with nodes in the reparametrised time for
    stiff fields), for all items by the pilot's root-mean-square with probes (0.05). Probes are drawn anew at every
    node. ``allocation=neyman`` allocates ``probes`` x nodes vector-Jacobian products to the nodes by the pilot's
    variances, at least one each; uniform gives each node ``probes``. A fixed-step solve takes the nodes into its grid.

    ``guidance`` w estimates the field ``(1 + w) v(x, t, cond) - w v(x, t, null)`` of a model that can be guided, as
    `flowlik.wrap` gives it: two evaluations, both counted. Its density is that of its own ODE.

    ``extra``: ``dof``, Student's degrees of freedom of ``stderr``; ``nodes`` and ``quadrature_error``, the
    rule's estimated error in nats, each (batch,). Fixed probes along the path are independent replicates (without
    replacement, if orthogonal), and their products widen a bar that a Jacobian of nearly rank one makes too short
    (`flowlik_estimators.divergence.skewness`). With fresh ones ``stderr`` pools over the nodes the mean of the sample
    variance and of the squared products, which the pilot scales to a variance (a single probe has the latter alone),
    and ``dof`` is Satterthwaite's.
    """

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        self._check_condition(run)
        if self.divergence == "quadrature":
            return self._by_quadrature(model, x, run)
        x0, log_det, cross = self._solved(model, x, run, start=run.data_end, end=run.noise_end, log_prob=True)
        return self._averaged(run.source_log_prob(x0)[:, None] + log_det.double(), cross, run)

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if not log_prob:
            x, *_ = self._solved(model, x0, run, start=run.noise_end, end=run.data_end, log_prob=False)
            return Samples(x=x.to(run.dtype))
        self._check_condition(run)
        prior = run.source_log_prob(x0)
        if self.divergence == "quadrature":
            quadrature = self.quadrature
            path = self._states(model, x0, run, quadrature.times(run), self.solve)
            estimate = _minus(prior, self._integral(model, path, run, quadrature))
            return Samples(x=path[-1].to(run.dtype), log_prob=estimate.log_prob)
        x, log_det, _ = self._solved(model, x0, run, start=run.noise_end, end=run.data_end, log_prob=True)
        return Samples(x=x.to(run.dtype), log_prob=(prior[:, None] - log_det.double()).mean(1))

    # --- x and the integral together ---

    def _averaged(self, log_probs: Tensor, cross: Tensor | None, run: Run) -> Estimate:
        """Mean over columns with its standard error, from (batch, columns) and what the probes' pairs say of them."""
        population = math.prod(run.event_shape) if self.noise == "orthogonal" else None
        mean, stderr = mean_over_probes(log_probs, population)
        if stderr is None:
            return Estimate(log_prob=mean)
        if cross is not None:
            sample = log_probs.detach().var(1)
            stderr = stderr * skewness.widening(sample, cross.detach(), self.columns)
        dof = torch.full_like(mean, max(self.columns - 1, 1)).detach()
        return Estimate(log_prob=mean, stderr=stderr, extra={"dof": dof})

    def _solved(
        self, model: Any, x: Tensor, run: Run, *, start: float, end: float, log_prob: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """x at ``end``, the integral of div v from ``start`` to ``end``, (batch, columns), and of `skewness.forms`."""
        evaluate, overlap = self._augmented(model, run) if log_prob else (velocity_alone(model, run), None)
        solve = self.solve
        dtype = solve.dtype(run)
        state = [x.to(dtype)]
        if log_prob:
            state.append(torch.zeros(run.batch, self.columns, dtype=dtype, device=run.device))
        if overlap is not None:
            forms = skewness.form_count(self.columns)
            state.append(torch.zeros(run.batch, forms, dtype=dtype, device=run.device))
        times = torch.tensor([start, end], dtype=torch.float64)
        path = solve.path(evaluate, run, tuple(state), times)
        coarse, integral = path[0][-1], path[1 if log_prob else 0][-1]
        cross = None
        if overlap is not None:
            cross = skewness.without_identity(path[2][-1].double(), overlap.double())
        if not self.richardson:
            return coarse, integral, cross
        path = solve.halved().path(evaluate, run, tuple(state), times)
        ahead = 1.0 / (2.0 ** ONE_STEP[self.solver] - 1.0)
        fine, finer = path[0][-1], path[1 if log_prob else 0][-1]
        return fine + ahead * (fine - coarse), finer + ahead * (finer - integral), cross

    def _augmented(self, model: Any, run: Run) -> tuple[Evaluate, Tensor | None]:
        if self.stochastic:
            return augmented.with_probes(self.probe_options, self.solve, model, run, redraw=self.redraw)
        return augmented.without_probes(self.trace, model, run), None

    # --- x alone, the integral by quadrature ---

    def _by_quadrature(self, model: Any, x: Tensor, run: Run) -> Estimate:
        """The rule in the angle; of the items that it leaves above ``tol`` once more in the clock for stiff fields."""
        found = self._along(model, x, run, self.quadrature, self.solve)
        if self.tol is None:
            return found
        if self.stochastic:
            return replace(found, reason=_missed(found, self.tol))
        missed = torch.nonzero(found.extra["quadrature_error"] > self.tol)[:, 0]
        if len(missed) == 0:
            return found
        stiff, solve = self.quadrature.stiff, self.solve.tightened(STIFF)
        with suppress(
            Diverged
        ):  # then the rule in the angle is all there is, and the reason says what it is worth
            found = _replaced(found, missed, self._along(model, x[missed], run.rows(missed), stiff, solve))
        return replace(found, reason=_missed(found, self.tol))

    def _along(self, model: Any, x: Tensor, run: Run, quadrature: Quadrature, solve: Solve) -> Estimate:
        times = quadrature.times(run)
        path = self._states(model, x, run, times.flip(0), solve).flip(0)
        return _minus(run.source_log_prob(path[0]), self._integral(model, path, run, quadrature))

    def _states(self, model: Any, x: Tensor, run: Run, times: Tensor, solve: Solve) -> Tensor:
        """x at all times (nodes, batch, *event), the first being x itself."""
        step = len(times) - 1
        if not self._interpolates(run):
            step = max(1, step // (STEP_ENDS - 1))
        return solve.states(model, x, run, times, times[step::step])

    def _interpolates(self, run: Run) -> bool:
        """Whether an adaptive solve of x may pass over the nodes and interpolate there, to its own tolerance."""
        if self.stochastic:  # next to the probes' noise the interpolation's error is nothing
            return True
        return self.trace == "exact" and math.prod(run.event_shape) <= FEW_DIMENSIONS

    def _integral(self, model: Any, path: Tensor, run: Run, quadrature: Quadrature) -> Estimate:
        """The integral of div v over [noise end, data end] along states at the node times."""
        if not self.stochastic:
            return quadrature.exact(lambda rows: augmented.without_probes(self.trace, model, rows), path, run)
        neyman = self.allocation == "neyman"
        return quadrature.probed(self.probe_options, self.solve, model, path, run, neyman=neyman)


def _minus(prior: Tensor, integral: Estimate) -> Estimate:
    return replace(integral, log_prob=prior - integral.log_prob)


def _replaced(found: Estimate, rows: Tensor, by: Estimate) -> Estimate:
    """The estimate with some of its items taken from another one of these items."""
    extra = {name: values.index_copy(0, rows, by.extra[name]) for name, values in found.extra.items()}
    return replace(found, log_prob=found.log_prob.index_copy(0, rows, by.log_prob), extra=extra)


def _missed(found: Estimate, tol: float) -> str | None:
    """One line where a quadrature's estimated error stayed above the tolerance."""
    share = float((found.extra["quadrature_error"] > tol).double().mean())
    return (
        f"tol = {tol:g} nats of the quadrature was missed by {100.0 * share:.3g} % of the items"
        if share
        else None
    )
