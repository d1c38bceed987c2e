r"""Likelihood of a one-step generator x = G(z), z ~ N(0, I): RealUID, arXiv 2509.22459; docs/math.md section 7.

The paper samples and has no likelihood. The routes:

- ``invert``: solve G(z) = x and sum over the roots, ``p(x) = sum_k N(z_k; 0, I)/|det J(z_k)|``. Damped Newton steps,
  the Jacobian by d reverse products, from ``starts`` draws of a bank: half of them those whose images lie closest to
  x, the others as far from those chosen as any of the next closest, since where G folds these lie on other branches.
  Roots that coincide count once. Exact where all roots are found. Where none is, the density is 0: log p is minus
  infinity and the row invalid.
- ``own-samples``: draws only, each with ``log N(z) - log |det J(z)|``. That is the density where G is one-to-one, and
  one root's part of it where it folds.
- ``fake-flow``: the ODE of the fake model, by `ode` with an exact trace at tolerance 1e-6. Its density is G's as far as
  the fake model has converged to the generator.
- ``head``: a joint map distilled on the generator, one evaluation, as `f2d2` with one step.

``extra`` of ``invert``: ``roots``, and ``negative_roots`` among them, where det J < 0; ``residual``, the largest
|G(z) - x| of the roots, or the smallest of all starts where there is none; ``failed_starts``, the share that found no
root. Jacobians of both signs mean that G folds, and ``reason`` says so.

Cost: ``invert`` one forward a draw of the bank, and in each Newton step a forward and d vjps a start that is still
moving, and a forward a trial step. ``own-samples`` a forward and d vjps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples, standard_normal_log_prob
from flowlik_estimators.divergence.products import jacobian_rows, with_graph
from flowlik_estimators.f2d2 import F2D2
from flowlik_estimators.model_checks.calls import checked_part
from flowlik_estimators.ode import ODE
from flowlik_estimators.registry import register
from flowlik_models import interfaces, random
from flowlik_models.interfaces import lacks
from flowlik_models.numerics.streams import BANK_STREAM

MAX_DIM = 784
"""Beyond it d products a step and a d^3 solve are out of proportion."""

JACOBIAN_NUMBERS = 2**22
"""Entries of the Jacobians held at once."""

BANK = 1024
"""Draws whose images say where to start; the same ones for every point of a call."""

CANDIDATES = 8
"""So many times the starts are close enough to be one."""

BROAD = 2.0
"""Standard deviation of every second draw of the bank: roots of points in the tails lie far out, on all branches."""

CONDITIONAL_BANK = 64
"""Draws for every point where the generator has a condition, whose images are each point's own."""

ITERATIONS = 50
HALVINGS = 6
"""Of a Newton step that does not come closer, before the start is given up."""

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-10}
"""Residual at which a root counts, for |x| = 1; it grows with 1 + |x|."""

SAME_ROOT = 100.0
"""Two roots are one where they are closer than so many tolerances, times 1 + |z|."""

Route = Literal["invert", "own-samples", "fake-flow", "head"]


@register("generator")
@dataclass(frozen=True, kw_only=True)
class Generator(Estimator):
    """The generator estimator; ``starts`` (8) belongs to ``route=invert``."""

    family = "generator"

    route: Route = "invert"
    starts: int | None = None

    def implied(self) -> dict[str, object]:
        """Eight starts, where roots are sought."""
        return {"starts": 8} if self.route == "invert" else {}

    def _check(self) -> None:
        self._at_least_one("starts")
        if self.route != "invert":
            self._no_effect(f"with route={self.route}", "starts")
        elif self.starts is not None and self.starts > BANK:
            raise ValueError(f"{self.name}: starts must be at most {BANK}, got {self.starts}")

    def supports(self, model: object) -> str | None:
        """Needs what the route follows; the reason names the routes that would work."""
        why = self._lacks(model, self.route)
        if why is None:
            return None
        others = [f"route={route}" for route in get_args(Route) if self._lacks(model, route) is None]
        return f"{why}; use {' or '.join(others)}" if others else why

    @staticmethod
    def _lacks(model: object, route: str) -> str | None:
        """None, or why this route cannot be taken."""
        if route == "head":
            why = lacks(model, "joint flow map")
            return f"route=head {why}" if why else None
        if why := lacks(model, "generator"):
            return f"{why}, such as realuid"
        if route == "fake-flow":
            if why := lacks(model, "fake flow"):
                return f"route=fake-flow {why}"
            if not getattr(model, "fake_is_flow", True):
                return "the fake model was fitted to real data too, so that its ODE is not the generator's"
            return None
        dim = math.prod(getattr(model, "event_shape", ()))
        if dim > MAX_DIM:
            return f"determinants are taken up to {MAX_DIM} dimensions, the model has {dim}"
        return None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        if (why := _missing_condition(model, run)) is not None:
            return _refused(run, why)
        if self.route == "own-samples":
            return _refused(
                run, "own-samples has the density of what it draws only; use route=invert for points"
            )
        if self.route == "fake-flow":
            return self._ode()._log_prob(_fake(model, run), x, run)
        if self.route == "head":
            return self._head()._log_prob(model, x, run)
        assert self.starts is not None
        return _Inversion(model, x, run, self.starts).estimate()

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        if (why := _missing_condition(model, run)) is not None:
            nothing = torch.full_like(x0, math.nan)
            return Samples(x=nothing, status="refused", reason=why)
        if self.route == "fake-flow":
            return self._ode()._sample(_fake(model, run), x0, run, log_prob=log_prob)
        if self.route == "head":
            return self._head()._sample(model, x0, run, log_prob=log_prob)
        if not log_prob:
            return Samples(x=_generated(model, x0, run, slice(None)))
        x, jacobian = _with_jacobian(model, x0, run, slice(None))
        sign, log_det = torch.linalg.slogdet(jacobian)
        found = Samples(x=x, log_prob=standard_normal_log_prob(x0) - log_det, reason=_folds(sign))
        if self.route == "own-samples":
            return found
        assert self.starts is not None  # all roots of a sample, not its own latent alone
        whole = _Inversion(model, x, run, self.starts, known=x0).estimate()
        return Samples(x=x, log_prob=whole.log_prob, reason=whole.reason)

    def _ode(self) -> ODE:
        return ODE(eps=self.eps, rtol=1e-6, atol=1e-6)

    def _head(self) -> F2D2:
        return F2D2(eps=self.eps, steps=1)


class _Inversion:
    """The roots of G(z) = x for one call, from ``starts`` of the bank and from ``known`` latents (batch, *event)."""

    def __init__(self, model: Any, x: Tensor, run: Run, starts: int, known: Tensor | None = None) -> None:
        self.model, self.run, self.x = model, run, x
        z = self._closest(starts)
        self.z = z if known is None else torch.cat((known[:, None], z), 1)
        self.starts = self.z.shape[1]
        size = 1 + x.flatten(1).double().norm(dim=1)
        self.tolerance = TOLERANCES[run.dtype] * size

    def estimate(self) -> Estimate:
        """The sum over all roots found."""
        run, starts = self.run, self.starts
        owner = torch.arange(run.batch, device=run.device).repeat_interleave(starts)
        with torch.no_grad():
            z, residual, sign, log_det = self._solved(self.z.flatten(0, 1), owner)
        solved = (residual <= self.tolerance[owner]).reshape(-1, starts)
        residual, sign = residual.reshape(-1, starts), sign.reshape(-1, starts)
        root = solved & ~self._repeated(z.reshape(run.batch, starts, -1), solved)
        terms = standard_normal_log_prob(z) - log_det
        if run.differentiable:
            chosen = root.flatten().nonzero()[:, 0]
            if len(chosen):
                terms = terms.index_put((chosen,), self._with_graph(z[chosen], owner[chosen]))
        none = ~root.any(1)
        terms = terms.reshape(-1, starts).masked_fill(~root, -math.inf)
        log_prob = terms.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -math.inf)
        largest = residual.masked_fill(~root, 0.0).amax(1)
        negative = root & (sign < 0)
        return Estimate(
            log_prob=log_prob,
            valid=~none,
            reason=_complaint(none, _folds(sign[root])),
            extra={
                "roots": root.sum(1),
                "negative_roots": negative.sum(1),
                "residual": torch.where(none, residual.nan_to_num(math.inf).amin(1), largest),
                "failed_starts": (~solved).double().mean(1),
            },
        )

    def _with_graph(self, z: Tensor, owner: Tensor) -> Tensor:
        """``log N(z) - log |det J(z)|`` of roots (k, *event), differentiable as the roots of G(z) = x are."""
        run = self.run
        with torch.no_grad():
            _, jacobian = _with_jacobian(self.model, z, run, owner)
        gap = (self.x[owner] - _generated(self.model, z, run, owner)).flatten(1).double()
        step = torch.linalg.solve(jacobian, gap[:, :, None])[:, :, 0]
        # a step of length nought, with the derivative of the implicit function
        z = z + step.to(z.dtype).reshape(z.shape)
        _, jacobian = _with_jacobian(self.model, z, run, owner, differentiable=True)
        log_det: Tensor = torch.linalg.slogdet(jacobian)[1]
        return standard_normal_log_prob(z) - log_det

    def _closest(self, starts: int) -> Tensor:
        """The draws of the bank whose images are closest to each x, (batch, starts, *event)."""
        run = self.run
        bank = random.gaussian(
            run.key,
            torch.arange(BANK),
            run.event_shape,
            stream=BANK_STREAM,
            dtype=run.dtype,
            device=run.device,
        )
        bank[1::2] *= BROAD
        if run.cond is None:
            images = _generated(self.model, bank, run, slice(None)).flatten(1)
        else:  # images depend on the condition
            bank = bank[: max(starts, CONDITIONAL_BANK)]
            rows = torch.arange(run.batch, device=run.device).repeat_interleave(len(bank))
            every = bank.repeat(run.batch, *(1 for _ in run.event_shape))
            images = _generated(self.model, every, run, rows).reshape(run.batch, len(bank), -1)
        apart = torch.cdist(self.x.flatten(1)[:, None], images)[:, 0]
        near = bank[apart.topk(min(len(bank), CANDIDATES * starts), largest=False).indices]
        return _spread(near, starts)

    def _solved(self, z: Tensor, owner: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where Newton's steps end, the residual there, and sign and log-modulus of the determinant, (rows,) each."""
        run, x = self.run, self.x.flatten(1)
        residual = torch.full(z.shape[:1], math.inf, dtype=torch.float64, device=z.device)
        sign, log_det = torch.zeros_like(residual), torch.zeros_like(residual)
        z, active = z.clone(), torch.arange(len(z), device=z.device)
        for _ in range(ITERATIONS):
            whose = owner[active]
            image, jacobian = _with_jacobian(self.model, z[active], run, whose)
            gap = (x[whose] - image.flatten(1)).double()
            residual[active] = gap.norm(dim=1)
            sign[active], log_det[active] = torch.linalg.slogdet(jacobian)
            moving = (residual[active] > self.tolerance[whose]) & (log_det[active] > -math.inf)
            moving &= torch.isfinite(residual[active])
            rows = moving.nonzero()[:, 0]
            if not len(rows):
                break
            step = torch.linalg.solve_ex(jacobian[rows], gap[rows][:, :, None])[0][:, :, 0]
            z, came = self._stepped(z, active[rows], owner, step, residual)
            active = active[rows][came]
            if not len(active):
                break
        return z, residual, sign, log_det

    def _stepped(
        self, z: Tensor, rows: Tensor, owner: Tensor, step: Tensor, residual: Tensor
    ) -> tuple[Tensor, Tensor]:
        """z with the longest of the halved steps that comes closer, and which of ``rows`` (k,) did."""
        came = torch.zeros(len(rows), dtype=torch.bool, device=z.device)
        left = torch.arange(len(rows), device=z.device)
        size = step.norm(dim=1, keepdim=True)
        step = step * (self._longest() / size).clamp(max=1.0)
        for halving in range(HALVINGS):
            at = rows[left]
            tried = z[at] + (step[left] * 0.5**halving).to(z.dtype).reshape(-1, *self.run.event_shape)
            gap = (self.x[owner[at]] - _generated(self.model, tried, self.run, owner[at])).flatten(1).double()
            closer = gap.norm(dim=1) < residual[at]
            z[at[closer]] = tried[closer]
            came[left[closer]] = True
            left = left[~closer]
            if not len(left):
                break
        return z, came

    def _longest(self) -> float:
        """No step is longer than the latent's own size: beyond that the linear model means nothing."""
        return math.sqrt(math.prod(self.run.event_shape))

    def _repeated(self, z: Tensor, solved: Tensor) -> Tensor:
        """Which solved starts (batch, starts) ended where an earlier one did, z (batch, starts, d)."""
        z = z.double()
        apart = torch.cdist(z, z)
        near = SAME_ROOT * TOLERANCES[self.run.dtype] * (1 + z.norm(dim=2))
        same = (apart <= near[:, :, None]) & solved[:, None, :] & solved[:, :, None]
        repeated: Tensor = same.tril(-1).any(2)
        return repeated


def _spread(near: Tensor, starts: int) -> Tensor:
    """``starts`` of the candidates (batch, k, *event), nearest first: a half the nearest, the rest far from those."""
    z = near.flatten(2)
    chosen = torch.arange(-(-starts // 2), device=z.device).expand(len(z), -1)
    rows = torch.arange(len(z), device=z.device)
    apart = torch.cdist(z, z[:, : chosen.shape[1]]).amin(2)
    for _ in range(starts - chosen.shape[1]):
        farthest = apart.argmax(1)
        chosen = torch.cat((chosen, farthest[:, None]), 1)
        apart = torch.minimum(apart, (z - z[rows, farthest][:, None]).norm(dim=2))
    return near[rows[:, None], chosen]


def _generated(model: interfaces.Generator, z: Tensor, run: Run, rows: slice | Tensor) -> Tensor:
    """G(z), for the conditions of those rows of the call; ValueError where its shape is not that of z."""
    cond = run.condition(rows)
    x: Tensor = model.generate(z, cond=cond)
    if x.shape != z.shape:
        raise ValueError(f"the model's generate has shape {tuple(x.shape)}, expected {tuple(z.shape)}")
    return x.to(run.dtype)


def _with_jacobian(
    model: interfaces.Generator,
    z: Tensor,
    run: Run,
    rows: slice | Tensor,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor]:
    """G(z) (k, *event) and its Jacobians (k, d, d) float64, in pieces."""
    whose = torch.arange(run.batch, device=z.device)[rows]
    piece = max(1, JACOBIAN_NUMBERS // z[0].numel() ** 2)
    images, jacobians = [], []
    for part, owner in zip(torch.split(z, piece), torch.split(whose, piece), strict=True):
        leaf, image = with_graph(
            lambda y, owner=owner: _generated(model, y, run, owner),  # type: ignore[misc]
            part,
            differentiable,
        )
        jacobians.append(torch.stack(list(jacobian_rows(image, leaf, differentiable)), 1).double())
        images.append(image if differentiable else image.detach())
    return torch.cat(images), torch.cat(jacobians)


def _fake(model: interfaces.HasFakeFlow, run: Run) -> interfaces.VelocityField:
    """The fake model; where it is no network that the counter knows of, counted here."""
    fake: interfaces.VelocityField = checked_part(model, "fake", run.counts)
    return fake


def _missing_condition(model: Any, run: Run) -> str | None:
    needs = getattr(model, "conditional", False) and run.cond is None
    return (
        "the generator is conditioned on x_0: give it as cond= in Python, a run has no pairs"
        if needs
        else None
    )


def _refused(run: Run, why: str) -> Estimate:
    return Estimate(log_prob=run.zeros() * math.nan, status="refused", reason=why)


def _folds(sign: Tensor) -> str | None:
    """One line where determinants have both signs."""
    up, down = int((sign > 0).sum()), int((sign < 0).sum())
    return (
        f"the generator folds: determinants are positive at {up} roots, negative at {down}"
        if up and down
        else None
    )


def _rootless(count: int, total: int) -> str:
    return f"no root of G(z) = x found for {count} of {total} rows, whose density counts as 0 and as invalid"


def _complaint(none: Tensor, folds: str | None) -> str | None:
    missing = int(none.sum())
    parts = [_rootless(missing, len(none))] if missing else []
    return "; ".join(parts + ([folds] if folds else [])) or None
