r"""F2D2 with its divergence head corrected: unbiased along the learned path, with a standard error.

Source: docs/math.md section 8. The head's average divergence D(x, t, r) of a joint flow map says what the
integral of the divergence along the learned path ``X(r) = x + (r - t) u(x, t, r)`` has become at time r; its
derivative is

    g(r) = D(x, t, r) + (r - t) dD/dr,    so    int_t^s g dr = (s - t) D(x, t, s)

whatever the head has learned. Hence, with r stratified on [t, s] and E[e e^T] = I,

    D_hat = D(x, t, s) + E_r [ e^T J_v(X(r), r) e - g(r) ]

is unbiased for the mean of div v along the learned path: the head is a control variate. A step has n = replicates x
corrections times, one in each of n equal parts of [t, s]. The values of two neighbouring parts differ by their noise
and by no less, so half the sum of their squared differences over n^2, the first and the last taken twice, is the
variance of the mean or more (collapsed strata; Cochran, Sampling Techniques, 5A.12). ``dof`` is Satterthwaite's.

Replicates at independent times would be one random time each: the residual is large on a short stretch, which few of
them hit, and where none does the scatter says nothing of it: such bars covered 88 to 94 % with one
step. With four replicates or more these cover 98 % and more with an exact trace, where they may be three times the
error; with probes the tests ask for 93 % on shipped maps.
The error of the path itself stays, and no bar covers it: `cycle_error` shows it.

Cost per sample: a step is 1 forward, and for each replicate and correction 2 forwards (head and field), 1 vjp
(dD/dr, which is one number a sample) and one vjp a probe (hutchinson) or d (exact).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_estimators.divergence.products import Traced, exact, hutchinson
from flowlik_estimators.grids import Grid
from flowlik_estimators.model_checks.calls import checked_part
from flowlik_estimators.registry import register
from flowlik_models.interfaces import can, lacks
from flowlik_models.numerics import random
from flowlik_models.numerics.streams import OPPOSED_STREAM, TIME_STREAM


@register("f2d2-corrected")
@dataclass(frozen=True, kw_only=True)
class F2D2Corrected(Traced):
    """F2D2 with ``steps`` steps on ``grid``, each corrected at ``corrections`` x ``replicates`` times.

    ``field``: diagonal, the map's own velocity at s = t, or teacher, the velocity of ``model.teacher``. ``trace``:
    hutchinson with ``probes`` (1) of ``noise`` (rademacher), fresh at every time, or exact. ``extra``:
    ``correction`` (batch,) nats, the estimate minus that of `f2d2`, and ``dof`` (batch,) of its standard error.
    """

    family = "joint-flow-map"
    version = 2

    steps: int = 4
    grid: Grid = "uniform"
    corrections: int = 1
    replicates: int = 4
    field: Literal["diagonal", "teacher"] = "diagonal"
    trace: Literal["exact", "hutchinson"] = "hutchinson"

    def _check(self) -> None:
        super()._check()
        self._at_least_one("steps", "corrections")
        if self.replicates < 2:
            raise ValueError(f"{self.name}: replicates must be at least 2, got {self.replicates}")

    def supports(self, model: object) -> str | None:
        """Needs a joint map, and for field=teacher its teacher."""
        if why := lacks(model, "joint flow map"):
            return why
        if self.field == "teacher" and (why := lacks(model, "teacher")):
            return f"field=teacher {why}"
        return None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        x0, plain, residuals = self._walk(model, x, run, start=run.data_end, end=run.noise_end)
        correction = residuals.mean(2).sum(1)
        variance, dof = _of_the_mean(residuals.detach())
        return Estimate(
            log_prob=run.source_log_prob(x0) + plain + correction,
            stderr=variance.sqrt(),
            extra={"correction": correction.detach(), "dof": dof},
        )

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if not log_prob:
            x = x0
            for t, s in pairwise(run.times(self.grid, self.steps, run.noise_end, run.data_end)):
                x = x + (s - t) * _joint(model, run, x, run.at(t), run.at(s))[0]
                run.stepped()
            return Samples(x=x)
        x, plain, residuals = self._walk(model, x0, run, start=run.noise_end, end=run.data_end)
        return Samples(x=x, log_prob=run.source_log_prob(x0) - plain - residuals.mean(2).sum(1))

    def _walk(
        self, model: Any, x: Tensor, run: Run, *, start: float, end: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x at ``end``; the head's integral (batch,), and its error at every time (batch, steps, times), float64."""
        plain, every, draws = run.zeros(), [], self._draws(run)
        for step, (t, s) in enumerate(pairwise(run.times(self.grid, self.steps, start, end))):
            times = self._times(draws[:, step], t, s, run)
            residuals = [
                self._residual(model, x, t, r, probes, run)
                for r, probes in zip(times, self._probes(step, run), strict=True)
            ]
            every.append((s - t) * torch.stack(residuals, 1))
            u, div = _joint(model, run, x, run.at(t), run.at(s))
            x, plain = x + (s - t) * u, plain + (s - t) * div
            run.stepped()
        return x, plain, torch.stack(every, 1)

    def _draws(self, run: Run) -> Tensor:
        """Uniform draws for the times of all steps, (batch, steps, times) float64."""
        shape = (self.steps, self.replicates * self.corrections)
        return random.uniform(
            run.key, run.items, shape, stream=TIME_STREAM, dtype=torch.float64, device=run.device
        )

    def _times(self, unit: Tensor, t: float, s: float, run: Run) -> Iterator[Tensor]:
        """Times (batch,) on [t, s], one in each of replicates x corrections equal parts, in order."""
        count = self.replicates * self.corrections
        part = torch.arange(count, dtype=torch.float64, device=run.device)
        yield from (t + (s - t) * (part + unit) / count).to(run.dtype).unbind(1)

    def _probes(self, step: int, run: Run) -> Iterator[Tensor | None]:
        """Probes (batch, probes, *event) of every time of a step; None where the trace is exact.

        Rademacher probes of a pair of neighbours differ in the signs of half of the coordinates, chosen at random: they
        are orthogonal, and what one term of the noise adds to the mean it rarely hides from the difference.
        """
        times = self.replicates * self.corrections
        if self.trace == "exact":
            yield from [None] * times
            return
        assert self.probes is not None
        assert self.noise is not None
        stream = TIME_STREAM + 1 + step
        drawn = run.probes(times * self.probes, self.noise, stream=stream)
        drawn = drawn.view(run.batch, times, self.probes, *run.event_shape)
        if self.noise == "rademacher":
            drawn = self._opposed(drawn, stream + OPPOSED_STREAM, run)
        yield from drawn.unbind(1)

    def _opposed(self, drawn: Tensor, stream: int, run: Run) -> Tensor:
        """Every second probe the one before it with half of its signs turned round."""
        pairs, probes = drawn.shape[1] // 2, drawn.shape[2]
        size = math.prod(run.event_shape)
        ranks = random.uniform(run.key, run.items, (pairs * probes, size), stream=stream, dtype=torch.float64)
        turned = ranks.argsort(2) < size // 2
        signs = 1.0 - 2.0 * turned.to(run.device, run.dtype, non_blocking=True)
        second = drawn[:, 0 : 2 * pairs : 2] * signs.view(run.batch, pairs, probes, *run.event_shape)
        drawn = drawn.clone()
        drawn[:, 1 : 2 * pairs : 2] = second
        return drawn

    def _residual(
        self, model: Any, x: Tensor, t: float, r: Tensor, probes: Tensor | None, run: Run
    ) -> Tensor:
        """div v(X(r), r) - g(r), (batch,) float64."""
        there, g = _path_and_rate(model, run, x, t, r)
        velocity = self._velocity(model, run)

        def field(y: Tensor) -> Tensor:
            return run.event(velocity(y, r), "velocity")

        if probes is None:
            _, div = exact(field, there, differentiable=run.differentiable)
        else:
            _, div = hutchinson(field, there, probes, differentiable=run.differentiable)
        return div.double().mean(1) - g

    def _velocity(self, model: Any, run: Run) -> Any:
        """The field (x, r) -> v, its evaluations counted."""
        if self.field == "teacher":
            teacher = checked_part(model, "teacher", run.counts)
            return lambda y, r: teacher.velocity(y, r, cond=run.cond)
        if can(model, "velocity"):
            return lambda y, r: model.velocity(y, r, cond=run.cond)
        return lambda y, r: model.joint(y, r, r, cond=run.cond)[0]


def _of_the_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of the sum over steps of the means of stratified values (batch, steps, times), and its dof; (batch,)."""
    steps, count = values.shape[1:]
    weights = torch.ones(count - 1, dtype=values.dtype, device=values.device)
    weights[0] = weights[-1] = 2.0
    shares = weights * values.diff(dim=2).square() / (2 * count**2)
    variance = shares.sum((1, 2))
    # Satterthwaite's ratio for squares of one degree, which is too small, made unbiased by 3 - 2; neighbouring
    # differences share a value, which takes a third of the degrees: 2 - 1
    quartic = shares.square().sum((1, 2))
    ratio = 2.0 * variance.square() / torch.where(quartic > 0.0, quartic, 1.0) - 1.0
    most = float(steps * (count - 1))
    return variance, torch.where(quartic > 0.0, ratio.clamp(1.0, most), most)


def _path_and_rate(model: Any, run: Run, x: Tensor, t: float, r: Tensor) -> tuple[Tensor, Tensor]:
    """X(r) (batch, *event) and g(r) (batch,) float64.

    D is one number a sample, so dD/dr of the whole batch is one vector-Jacobian product, and no network needs forward
    mode.
    """
    with torch.enable_grad():
        r = r.detach().requires_grad_()
        u, div = _joint(model, run, x, run.at(t), r)
        there = x + (r - t).view(-1, *[1] * (x.ndim - 1)) * u
        slope = torch.zeros_like(r)
        if div.requires_grad:
            (derivative,) = torch.autograd.grad(
                div.sum(), r, create_graph=run.differentiable, allow_unused=True
            )
            slope = slope if derivative is None else derivative
        g = div + (r - t).double() * slope.double()
    return (there, g) if run.differentiable else (there.detach(), g.detach())


def _joint(model: Any, run: Run, x: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    u, div = model.joint(x, t, s, cond=run.cond)
    return run.event(u, "average velocity"), run.scalar(div, "average divergence")
