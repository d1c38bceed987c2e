r"""Likelihood of a policy flow: pi-Flow, arXiv 2510.14974; docs/math.md section 6. The paper has no likelihood.

One network evaluation at the start of each segment leaves a closed-form field, the policy, which is followed to the
segment's end in network-free substeps, uniform in ``logit(t)``; stretches closer than 1e-3 to t = 0 or t = 1 are one
further substep in t each. What is estimated is log p at t = 1 - eps; ``extra["truncation"]`` is the first-order
estimate of what is missing to t = 1, ``-eps (div v + v . grad log p)``, in nats.

- ``jacobian=frozen`` integrates the divergence at fixed policy. It is exact if the policy is the true denoising
  posterior. A policy of predictions (DX) has divergence -d/(1 - t) whatever x is, and is refused.
- ``jacobian=full`` takes log |det| of each segment's map, the change of the policy with the point it was asked at
  included: the exact density of the discrete map, folds included (``extra["sign_changes"]``). ``extra["frozen_gap"]``
  is full minus frozen, where the frozen estimate means something: how far the policies are from the posterior.

Cost: ``segments`` forwards; ``full`` d vjps a segment more. Policy evaluations, four a substep for rk4 and two for
heun, need no network and are counted as ``policy_calls``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Diverged, Estimate, Run, Samples
from flowlik_estimators.divergence.products import jacobian_rows, with_graph
from flowlik_estimators.model_checks import answers
from flowlik_estimators.registry import register
from flowlik_models.interfaces import Policy, PolicyFlow, lacks, velocity_and_divergence
from flowlik_models.numerics.runge_kutta import rk4_increments

EPS = 1e-3
"""Where a model has no eps of its own, and how close to the ends substeps are uniform in logit(t)."""

MAX_DIM = 784
JACOBIAN_NUMBERS = 2**22
"""Entries of the Jacobians in memory at once; the graph of all substeps comes on top."""

Solver = Literal["rk4", "heun"]
Slope = Callable[[Tensor, float], tuple[Tensor, Tensor]]
"""x and a node's time -> the derivatives of x and of the integrated divergence in the substep's variable."""


@register("pi-flow")
@dataclass(frozen=True, kw_only=True)
class PiFlow(Estimator):
    """The policy-flow estimator: ``segments`` equal in t, about ``substeps`` in all by ``solver``."""

    family = "policy"

    segments: int = 1
    substeps: int = 32
    solver: Solver = "rk4"
    jacobian: Literal["frozen", "full"] = "frozen"

    def _check(self) -> None:
        self._at_least_one("segments", "substeps")

    def supports(self, model: object) -> str | None:
        """Needs policies, trained for this number of segments, whose divergence means something (or ``full``)."""
        if why := lacks(model, "policy flow"):
            return f"{why}, such as pi-flow or a closed form"
        trained = getattr(model, "segments", None)
        if trained is not None and self.segments not in trained:
            works = " or ".join(f"segments={count}" for count in trained)
            return f"the model was not trained for segments={self.segments}; use {works}"
        if self.jacobian == "frozen" and not getattr(model, "frozen_density", True):
            return (
                "the divergence of the model's policies is -d/(1 - t) whatever x is, "
                "so the frozen estimate says nothing of the density; use jacobian=full"
            )
        dim = math.prod(getattr(model, "event_shape", ()))
        if self.jacobian == "full" and dim > MAX_DIM:
            return f"jacobian=full goes up to {MAX_DIM} dimensions, the model has {dim}; use jacobian=frozen"
        return None

    def _log_prob(self, model: PolicyFlow, x: Tensor, run: Run) -> Estimate:
        path = _Path(self, model, run, run.data_end, run.noise_end)
        if self.jacobian == "full":
            x0, change, extra = path.with_determinants(x)
        else:
            x0, change = path.frozen(x)
            extra = {}
        if path.truncation:
            extra["truncation"] = torch.cat(path.truncation)
        return Estimate(
            log_prob=run.source_log_prob(x0) + change,
            valid=path.valid,
            reason=path.complaint(),
            extra=extra,
        )

    def _sample(self, model: PolicyFlow, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        path = _Path(self, model, run, run.noise_end, run.data_end)
        if not log_prob or (self.jacobian == "frozen" and not getattr(model, "frozen_density", True)):
            return path.samples(path.moved(x0))
        if self.jacobian == "full":
            x, change, _ = path.with_determinants(x0)
        else:
            x, change = path.frozen(x0)
        return path.samples(x, run.source_log_prob(x0) - change)


class _Rows(NamedTuple):
    """How many rows have a policy that can be followed, are finite at the end, and have but are not."""

    usable: int
    finite: int
    lost: int


class _Path:
    """The segments of one call from time ``start`` to ``end``, either order."""

    def __init__(self, estimator: PiFlow, model: PolicyFlow, run: Run, start: float, end: float) -> None:
        self.estimator, self.model, self.run = estimator, model, run
        self.ends = run.times("uniform", estimator.segments, start, end)
        self.usable = torch.ones(run.batch, dtype=torch.bool, device=run.device)
        self.rows = _Rows(run.batch, run.batch, 0)
        self.informative = getattr(model, "frozen_density", True)
        self.truncation: list[Tensor] = []

    def frozen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x at the end, and minus the change of log p on the way by the policies' own divergence, (batch,) float64."""
        change = self.run.zeros()
        for t, s in pairwise(self.ends):
            x, part = self._followed(self._policy(x, t, s), x, t, s)
            change = change + part
        self._check(x)
        return x, change

    def moved(self, x: Tensor) -> Tensor:
        """x at the end alone."""
        for t, s in pairwise(self.ends):
            x, _ = self._followed(self._policy(x, t, s), x, t, s, divergence=False)
        self._check(x)
        return x

    def with_determinants(self, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """x at the end, the sum of log |det| of the segments' maps (batch,) float64, and what `extra` says of them."""
        piece = max(1, JACOBIAN_NUMBERS // x[0].numel() ** 2)
        pieces = [slice(i, i + piece) for i in range(0, self.run.batch, piece)]
        folds, change, frozen = (
            torch.zeros_like(self.usable, dtype=torch.int64),
            self.run.zeros(),
            self.run.zeros(),
        )
        for t, s in pairwise(self.ends):
            done = [self._determinant(x[part], t, s, part) for part in pieces]
            x, sign, log, part_frozen = (torch.cat(parts) for parts in zip(*done, strict=True))
            folds, change, frozen = folds + (sign < 0), change + log, frozen + part_frozen
        self._check(x)
        extra = {"sign_changes": folds}
        if self.informative:
            extra["frozen_gap"] = (change - frozen).detach()
        return x, change, extra

    def samples(self, x: Tensor, log_prob: Tensor | None = None) -> Samples:
        """Samples x (batch, *event); NaN where the policy could not be followed, whatever came out of it."""
        broken = ~self.usable.reshape(-1, *([1] * (x.ndim - 1)))
        return Samples(x=x.masked_fill(broken, math.nan), log_prob=log_prob, reason=self.complaint())

    @property
    def valid(self) -> Tensor:
        """Which rows' policies could be followed; a single truth on the CPU where all could."""
        return self.usable if self.rows.usable < len(self.usable) else torch.ones((), dtype=torch.bool)

    def complaint(self) -> str | None:
        """One line where some rows got a policy that cannot be followed, or substeps that are not finite."""
        rows, total = self.rows, len(self.usable)
        parts = []
        if rows.usable < total:
            what = "the policy's parameters are not finite or a variance is not positive"
            parts.append(f"{what} in {total - rows.usable} of {total} rows")
        if rows.lost:
            more = f"more than substeps={self.estimator.substeps} may help"
            parts.append(f"the substeps do not stay finite in {rows.lost} of {total} rows; {more}")
        return "; ".join(parts) or None

    def _policy(self, x: Tensor, t: float, s: float, rows: slice = slice(None)) -> Policy:
        run = self.run
        cond = run.condition(rows)
        policy = self.model.policy(x, run.at(t)[rows], run.at(s)[rows], cond=cond)
        if hasattr(policy, "usable"):
            self.usable[rows] &= policy.usable(run.at(s)[rows])
        if self.informative and 1.0 > t == self.ends[0] > self.ends[-1]:
            self.truncation.append(_truncation(policy, x.detach(), t))
        return policy

    def _check(self, x: Tensor) -> None:
        """Raise where nothing is left: a policy that cannot be followed, or steps that are not finite."""
        finite = torch.isfinite(x).flatten(1).all(1)
        counts = torch.stack([self.usable.sum(), finite.sum(), (self.usable & ~finite).sum()])
        self.rows = _Rows(*counts.tolist())  # the host waits once
        if not self.rows.usable:
            raise self._lost(f"{self.complaint()}; the model's training went wrong, train it again")
        if not self.rows.finite:
            raise self._lost(str(self.complaint()))

    def _lost(self, message: str) -> Diverged:
        return Diverged(message, rows=torch.ones_like(self.usable), explained=True)

    def _followed(
        self, policy: Policy, x: Tensor, t: float, s: float, *, divergence: bool = True
    ) -> tuple[Tensor, Tensor]:
        """x at s, and the integral of the policy's divergence from t to s, (batch,) float64."""
        change = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        step = {"rk4": _rk4, "heun": _heun}[self.estimator.solver]
        for nodes, speed in _substeps(t, s, self._count(t, s)):
            moved, added = step(_slope(policy, speed, divergence), x, *nodes)
            x, change = x + moved, change + added
        self.run.stepped()
        return x, change

    def _count(self, t: float, s: float) -> int:
        """Substeps of one segment: its share of all, by length in logit(t)."""
        whole = abs(_logit(self.ends[-1]) - _logit(self.ends[0]))
        if whole == 0:  # all of it closer to an end than substeps are uniform in logit(t)
            return 1
        share = abs(_logit(s) - _logit(t)) / whole
        return max(1, round(self.estimator.substeps * share))

    def _determinant(
        self, x: Tensor, t: float, s: float, rows: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Rows after one segment, sign and log-modulus of its map's determinant, and the frozen change."""
        frozen: list[Tensor] = []

        def segment(y: Tensor) -> Tensor:
            end, change = self._followed(self._policy(y, t, s, rows), y, t, s)
            frozen.append(change.detach())
            return end

        differentiable = self.run.differentiable
        x, end = with_graph(segment, x, differentiable)
        jacobian = torch.stack(list(jacobian_rows(end, x, differentiable)), 1).double()
        sign, log = torch.linalg.slogdet(jacobian)
        return end if differentiable else end.detach(), sign.detach(), log, frozen[0]


@torch.no_grad()
def _truncation(policy: Policy, x: Tensor, t: float) -> Tensor:
    """First-order estimate of log p_1(x) - log p_t(x), (batch,) nats: `-(1 - t)(div v + v . grad log p_t)`."""
    v, div = _both(policy, x, torch.full((len(x),), t, dtype=x.dtype, device=x.device))
    score = (t * v - x) / (1 - t)
    return -(1 - t) * (div.double() + (v * score).flatten(1).sum(1).double())


def _logit(t: float) -> float:
    t = min(max(t, EPS), 1 - EPS)
    return math.log(t / (1 - t))


def _substeps(t: float, s: float, count: int) -> Iterator[tuple[tuple[float, float, float, float], bool]]:
    """(step, time before, halfway, after) of each substep in its own variable; True where that is logit(t)."""
    first, last = _logit(t), _logit(s)
    inner = [1 / (1 + math.exp(-(first + (last - first) * k / (2 * count)))) for k in range(2 * count + 1)]
    if abs(t - inner[0]) > EPS * 1e-3:
        yield (inner[0] - t, t, (t + inner[0]) / 2, inner[0]), False
    for k in range(count):
        yield ((last - first) / count, inner[2 * k], inner[2 * k + 1], inner[2 * k + 2]), True
    if abs(s - inner[-1]) > EPS * 1e-3:
        yield (s - inner[-1], inner[-1], (s + inner[-1]) / 2, s), False


def _slope(policy: Policy, logit: bool, divergence: bool) -> Slope:
    """Derivatives in logit(t), ``dt = t (1 - t) dlogit``, or in t."""

    def slope(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
        time = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        speed = t * (1 - t) if logit else 1.0
        if not divergence:
            v = answers.tensor("policy's velocity", policy.velocity(x, time), x)
            return speed * v, x.new_zeros(len(x), dtype=torch.float64)
        v, div = _both(policy, x, time)
        return speed * v, speed * div.double()

    return slope


def _both(policy: Policy, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    v, div = velocity_and_divergence(policy, x, t)
    return answers.tensor("policy's velocity", v, x), answers.tensor("policy's divergence", div, x)


def _rk4(slope: Slope, x: Tensor, h: float, t: float, middle: float, s: float) -> tuple[Tensor, Tensor]:
    moved, added = rk4_increments(slope, x, h, (t, middle, s))
    return moved, added


def _heun(slope: Slope, x: Tensor, h: float, t: float, middle: float, s: float) -> tuple[Tensor, Tensor]:
    k1, d1 = slope(x, t)
    k2, d2 = slope(x + h * k1, s)
    return h / 2 * (k1 + k2), h / 2 * (d1 + d2)
