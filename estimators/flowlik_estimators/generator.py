r"""Likelihood of a one-step generator x = G(z), z ~ N(0, I): RealUID, arXiv 2509.22459; docs/math.md section 7.

The paper samples and has no likelihood. The routes:

- ``invert``: solve G(z) = x and sum over the roots, ``p(x) = sum_k N(z_k; 0, I)/|det J(z_k)|``. Damped Newton steps,
  the Jacobian by d vector-Jacobian products, from ``starts`` draws of a bank: half of them those whose images lie
  closest to x, the others as far from those chosen as any of the next closest, since where G folds these lie on other
  branches. The starts are doubled until the roots of an item stand still, twice in a row, or `MOST_STARTS` are tried;
  ``reason`` gives the share of the rows where they do not. Roots that coincide count once. Exact where all roots are
  found. Where none is, the density is 0: log p is minus infinity and the row invalid.
- ``own-samples``: draws only, each with ``log N(z) - log |det J(z)|``. That is the density where G is one-to-one, and
  one root's part of it where it folds.
- ``fake-flow``: the ODE of the fake model, by `ode` with an exact trace at tolerance 1e-6. Its density is G's as far as
  the fake model has converged to the generator.
- ``head``: a joint map distilled on the generator, one evaluation, as `f2d2` with one step.

``extra`` of ``invert``: ``roots``, and ``negative_roots`` among them, where det J < 0; ``residual``, the largest
|G(z) - x| of the roots, or the smallest of all starts where there is none; ``starts``, how many were tried, and
``failed_starts``, the share that found no root; ``unsettled``, 1 where the roots did not stand still. Jacobians of both
signs mean that G folds, and ``reason`` says so.

Cost: ``invert`` one forward a draw of the bank, and in each Newton step a forward and d vjps a start that is still
moving, and a forward a trial step, of which several are tried at once where few starts move. ``own-samples`` a forward
and d vjps.
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
from flowlik_models import interfaces
from flowlik_models.interfaces import lacks
from flowlik_models.numerics import random
from flowlik_models.numerics.streams import BANK_STREAM

MAX_DIM = 784
"""Beyond it d vector-Jacobian products a step and a d^3 solve are out of proportion."""

JACOBIAN_NUMBERS = 2**22
"""Entries of the Jacobians in memory at once."""

BANK = 1024
"""Draws whose images say where to start; the same ones for every point of a call."""

CANDIDATES = 8
"""So many times the starts are close enough to be one."""

BROAD = 2.0
"""Standard deviation of every second draw of the bank: roots of points in the tails lie far out, on all branches."""

MOST_STARTS = 512
"""No item gets more than so many, or four times those that were asked for where that is more."""

STILL = 2
"""Doublings of the starts that bring no new root before an item is done."""

PAIRS = 2**22
"""Distances held at once."""

CONDITIONAL_BANK = 64
"""Draws for every point where the generator has a condition, whose images are each point's own."""

TURN, LAST, TRY, STOP = range(4)
"""What a row does in the next round of Newton's steps: a new direction; a determinant, where it has arrived; the next
half of its step; nothing."""

TOGETHER = 256
"""Trial points of an evaluation with few rows, which costs hardly more than one with fewer: these try several halves of
their steps at once. Rounds are fewer so, each with Jacobians of its own, and the host waits less often."""

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
    """The generator estimator: ``starts`` (8) begins ``route=invert``, ``eps`` is for the routes of a flow, fake-flow
    and head: where the determinant of G is taken, the density is that of G's own images.
    """

    family = "generator"
    version = 2

    route: Route = "invert"
    starts: int | None = None

    def implied(self) -> dict[str, object]:
        """Eight starts, where roots are sought."""
        return {"starts": 8} if self.route == "invert" else {}

    def _check(self) -> None:
        self._at_least_one("starts")
        if self.route in ("invert", "own-samples"):
            self._no_effect(f"with route={self.route}", "eps")
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
        samples = Samples(x=x, log_prob=standard_normal_log_prob(x0) - log_det, reason=_folds(sign))
        if self.route == "own-samples":
            return samples
        assert self.starts is not None  # all roots of a sample, not its own latent alone
        whole = _Inversion(model, x, run, self.starts, known=x0).estimate()
        return Samples(x=x, log_prob=whole.log_prob, reason=whole.reason)

    def _ode(self) -> ODE:
        return ODE(eps=self.eps, rtol=1e-6, atol=1e-6)

    def _head(self) -> F2D2:
        return F2D2(eps=self.eps, steps=1)


class _Inversion:
    """The roots of G(z) = x for one call, from ``starts`` of the bank and more until they stand still, and from
    ``known`` latents (batch, *event)."""

    def __init__(self, model: Any, x: Tensor, run: Run, starts: int, known: Tensor | None = None) -> None:
        self.model, self.run, self.x, self.starts = model, run, x, starts
        bank, apart = self._bank(max(MOST_STARTS, 4 * starts))
        self.limit = min(len(bank), max(MOST_STARTS, 4 * starts))
        self.draws = _Draws(bank, apart)
        self.first = None if known is None else known[:, None]
        size = 1 + x.flatten(1).double().norm(dim=1)
        self.tolerance = TOLERANCES[run.dtype] * size

    def estimate(self) -> Estimate:
        """The sum over all roots found."""
        run = self.run
        with torch.no_grad():
            roots, tried, least, unsettled = self._searched()
        there, none = roots.there, roots.count == 0
        up, down = (there & (roots.sign > 0)).sum(), (there & (roots.sign < 0)).sum()
        numbers = (none.sum(), unsettled.sum(), up, down, roots.count.sum())
        missing, moving, *signs, total = torch.stack(numbers).tolist()  # the host waits once
        terms = standard_normal_log_prob(roots.z.flatten(0, 1)).view_as(roots.log_det) - roots.log_det
        if run.differentiable and total:
            which = _first(there.flatten(), total)
            owner = which // there.shape[1]
            terms = terms.flatten().index_copy(
                0, which, self._with_graph(roots.z.flatten(0, 1)[which], owner)
            )
            terms = terms.view_as(there)
        terms = torch.where(there, terms, -math.inf)
        log_prob = terms.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -math.inf)
        largest = torch.where(there, roots.residual, 0.0).amax(1)
        return Estimate(
            log_prob=log_prob,
            valid=~none if missing else torch.ones((), dtype=torch.bool),
            reason=_complaint(missing, moving, run.batch, _folded(*signs)),
            extra={
                "roots": roots.count,
                "negative_roots": (there & (roots.sign < 0)).sum(1),
                "residual": torch.where(none, least, largest),
                "failed_starts": 1.0 - tried[1] / tried[0],
                "starts": tried[0],
                "unsettled": unsettled.double(),
            },
        )

    def _searched(self) -> tuple[_Roots, Tensor, Tensor, Tensor]:
        """Distinct roots; starts tried and solved (2, batch) and the smallest residual of each item; which items'
        roots did not stand still through two doublings of the starts.

        The host waits once a doubling: for how many items go on, and for the most roots that one of them has."""
        run = self.run
        roots = _Roots.none(run)
        tried = torch.zeros(2, run.batch, dtype=torch.float64, device=run.device)
        least = torch.full((run.batch,), math.inf, dtype=torch.float64, device=run.device)
        still = torch.zeros(run.batch, dtype=torch.int64, device=run.device)
        items, count, total = torch.arange(run.batch, device=run.device), self.starts, self.starts
        while len(items):
            z = self.draws.more(items, count)
            if self.first is not None and total == self.starts:
                z = torch.cat((self.first, z), 1)
            found = self._from(z, items)
            tried[0, items] += z.shape[1]
            tried[1, items] += found.count.double()
            least[items] = torch.minimum(least[items], found.residual.nan_to_num(math.inf).amin(1))
            joined = roots.some(items).joined(found, self._reach())
            same = joined.count == roots.count[items]
            still[items] = torch.where(same, still[items] + 1, 0) if total > self.starts else 0
            moving = still[items] < STILL
            most, going = torch.stack((joined.count.max(), moving.sum())).tolist()
            roots = roots.replaced(items, joined, most)
            items = items[_first(moving, going)]
            if 2 * total > self.limit:
                break
            count, total = total, 2 * total
        return roots, tried, least, still < STILL

    def _from(self, z: Tensor, items: Tensor) -> _Roots:
        """Where Newton's steps end from z (k, starts, *event) of some items: roots, repeated ones too, where they are
        ``there``."""
        owner = items.repeat_interleave(z.shape[1])
        newton = _Newton(self, z.flatten(0, 1), owner)
        newton.run()
        numbers = (newton.residual, newton.sign, newton.log_det)
        residual, sign, log_det = (number.view(z.shape[:2]) for number in numbers)
        there = residual <= self.tolerance[items][:, None]
        return _Roots(there, newton.z.view_as(z), residual, sign, log_det)

    def _reach(self) -> float:
        """Two roots are one where they are closer than so much, times 1 + |z|."""
        return SAME_ROOT * TOLERANCES[self.run.dtype]

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

    def _bank(self, most: int) -> tuple[Tensor, Tensor]:
        """Draws (n, *event), and the distances of their images from each x, (batch, n)."""
        run = self.run
        bank = random.gaussian(
            run.key,
            torch.arange(max(BANK, most)),
            run.event_shape,
            stream=BANK_STREAM,
            dtype=run.dtype,
            device=run.device,
        )
        bank[1::2] *= BROAD
        if run.cond is None:
            images = _generated(self.model, bank, run, slice(None)).flatten(1)
        else:  # images depend on the condition
            bank = bank[: max(4 * self.starts, CONDITIONAL_BANK)]
            rows = torch.arange(run.batch, device=run.device).repeat_interleave(len(bank))
            every = bank.repeat(run.batch, *(1 for _ in run.event_shape))
            images = _generated(self.model, every, run, rows).reshape(run.batch, len(bank), -1)
        return bank, _distances(self.x.flatten(1)[:, None], images)[:, 0]


class _Newton:
    """Damped Newton steps of rows z (rows, *event) towards G(z) = x of their owners: ``residual`` |G(z) - x|, ``sign``
    and ``log_det`` of the determinant, (rows,) each.

    In a round some rows get a new direction, others try further halves of their last. The host waits once a round, for
    how many rows do what in the next one.
    """

    def __init__(self, inversion: _Inversion, z: Tensor, owner: Tensor) -> None:
        self.inversion, self.owner, self.x = inversion, owner, inversion.x.flatten(1)
        self.z = z.clone()
        self.tolerance = inversion.tolerance[owner]
        self.residual = torch.full_like(self.tolerance, math.inf)
        self.sign, self.log_det = torch.zeros_like(self.residual), torch.zeros_like(self.residual)
        self.step = torch.zeros_like(z.flatten(1), dtype=torch.float64)
        self.turns, self.halvings = torch.zeros_like(owner), torch.zeros_like(owner)

    def run(self) -> None:
        """All rounds."""
        turning = torch.arange(len(self.z), device=self.z.device)
        last = trying = turning[:0]
        while len(turning) + len(last) + len(trying):
            self._turn(turning, last)
            rows = torch.cat((turning, trying))
            if not len(rows):
                return
            then = self._attempted(rows)
            counts = torch.stack([(then == kind).sum() for kind in (TURN, LAST, TRY)]).tolist()
            order = rows[then.argsort(stable=True)]
            turning, last, trying, _ = torch.split(order, [*counts, len(rows) - sum(counts)])

    def _turn(self, turning: Tensor, last: Tensor) -> None:
        """Determinants where these rows are, and the directions in which those go on that have not arrived."""
        rows, most = torch.cat((turning, last)), len(turning)
        if not len(rows):
            return
        whose = self.owner[rows]
        image, jacobian = _with_jacobian(self.inversion.model, self.z[rows], self.inversion.run, whose)
        gap = (self.x[whose] - image.flatten(1)).double()
        self.residual[rows] = torch.where(self.turns[rows] > 0, self.residual[rows], gap.norm(dim=1))
        self.sign[rows], self.log_det[rows] = torch.linalg.slogdet(jacobian)
        step = torch.linalg.solve_ex(jacobian[:most], gap[:most, :, None])[0][:, :, 0]
        longest = math.sqrt(step.shape[1])  # the latent's own size: beyond it the linear model means nothing
        self.step[turning] = step * (longest / step.norm(dim=1, keepdim=True)).clamp(max=1.0)
        self.turns[turning] += 1
        self.halvings[turning] = 0

    def _attempted(self, rows: Tensor) -> Tensor:
        """Move those of the rows that come closer by a step they try, the longest that does; what each does next.

        Each tries the next half of its step, or where rows are few the next halves."""
        halves = min(HALVINGS, max(1, TOGETHER // len(rows)))
        halving = self.halvings[rows][:, None] + torch.arange(halves, device=rows.device)
        z, before, owner = self.z[rows], self.residual[rows], self.owner[rows].repeat_interleave(halves)
        step = self.step[rows][:, None] * 0.5 ** halving[:, :, None].double()
        tried = z.repeat_interleave(halves, 0) + step.to(z.dtype).view(-1, *z.shape[1:])
        image = _generated(self.inversion.model, tried, self.inversion.run, owner)
        every = (self.x[owner] - image.flatten(1)).double().norm(dim=1).view_as(halving)
        moving = (before > self.tolerance[rows]) & torch.isfinite(before) & (self.log_det[rows] > -math.inf)
        comes = moving[:, None] & (every < before[:, None]) & (halving < HALVINGS)
        first, closer = comes.byte().argmax(1, keepdim=True), comes.any(1)
        chosen = first[:, 0] + halves * torch.arange(len(rows), device=rows.device)
        residual = every.gather(1, first)[:, 0]
        self.z[rows] = torch.where(closer.view(-1, *(1 for _ in z.shape[1:])), tried[chosen], z)
        self.residual[rows] = torch.where(closer, residual, before)
        self.halvings[rows] += halves
        further = torch.where(self.turns[rows] < ITERATIONS, TURN, STOP)
        there = torch.where(residual <= self.tolerance[rows], LAST, further)
        shorter = torch.where(moving & (self.halvings[rows] < HALVINGS), TRY, STOP)
        return torch.where(closer, there, shorter)


@dataclass(frozen=True)
class _Roots:
    """Places for the roots of items, those that are ``there`` (k, width) in the order in which they were found, and for
    each z (k, width, *event), residual, sign and log-modulus of the determinant (k, width)."""

    there: Tensor
    z: Tensor
    residual: Tensor
    sign: Tensor
    log_det: Tensor

    @staticmethod
    def none(run: Run) -> _Roots:
        """One place an item, with nothing there."""
        number = torch.zeros(run.batch, 1, dtype=torch.float64, device=run.device)
        z = torch.zeros(run.batch, 1, *run.event_shape, dtype=run.dtype, device=run.device)
        return _Roots(torch.zeros_like(number, dtype=torch.bool), z, number, number, number)

    @property
    def count(self) -> Tensor:
        """How many each item has, (k,)."""
        return self.there.sum(1)

    def some(self, items: Tensor) -> _Roots:
        """Those of some items."""
        return _Roots(*(part[items] for part in self._parts()))

    def joined(self, found: _Roots, reach: float) -> _Roots:
        """With what was found of the same items; what lies within ``reach (1 + |z|)`` of an earlier one is left out."""
        every = [torch.cat(both, 1) for both in zip(self._parts(), found._parts(), strict=True)]
        there, z = every[0], every[1].flatten(2).double()
        z = torch.where(there[:, :, None], z, math.nan)
        pieces = torch.split(z, max(1, PAIRS // z.shape[1] ** 2))
        there = there & ~torch.cat([_repeated(rows, reach) for rows in pieces])
        order = (~there).byte().argsort(dim=1, stable=True)
        rows = torch.arange(len(z), device=z.device)[:, None]
        return _Roots(*(part[rows, order] for part in (there, *every[1:])))

    def replaced(self, items: Tensor, roots: _Roots, most: int) -> _Roots:
        """With the roots of some items, of which none has more than ``most``, in place of what was known of them."""
        width = max(self.there.shape[1], most)
        return _Roots(
            *(
                _of_width(old, width).index_copy(0, items, _of_width(new, width))
                for old, new in zip(self._parts(), roots._parts(), strict=True)
            )
        )

    def _parts(self) -> tuple[Tensor, ...]:
        return self.there, self.z, self.residual, self.sign, self.log_det


def _of_width(part: Tensor, width: int) -> Tensor:
    """So many places an item, (k, width, ...): the first of them, or all and empty ones."""
    more = max(0, width - part.shape[1])
    return torch.cat((part[:, :width], part.new_zeros(len(part), more, *part.shape[2:])), 1)


def _first(which: Tensor, count: int) -> Tensor:
    """The indices where a mask (n,) is true, of which there are ``count``: the host need not wait for their number."""
    return (~which).byte().argsort(stable=True)[:count]


def _repeated(z: Tensor, reach: float) -> Tensor:
    """Which of the roots (k, n, d) lie where an earlier one of the same row does, (k, n); NaN is no root."""
    same = _distances(z, z) <= reach * (1 + z.norm(dim=2))[:, :, None]
    repeated: Tensor = same.tril(-1).any(2)
    return repeated


class _Draws:
    """The draws of a bank (n, *event) that each item starts from, more with every call, none twice.

    A half of each lot are those with the nearest images, the others as far as any of the next nearest from all that
    were chosen: where G folds, these lie on other branches. ``apart`` (batch, n) are the distances of the images.
    """

    def __init__(self, bank: Tensor, apart: Tensor) -> None:
        self.bank = bank
        self.order = apart.argsort(dim=1, stable=True)
        self.chosen = torch.zeros_like(self.order, dtype=torch.bool)
        self.taken = 0

    def more(self, items: Tensor, count: int) -> Tensor:
        """``count`` further draws for each of the items, (k, count, *event), or as many as there are."""
        count = min(count, len(self.bank) - self.taken)
        among = min(len(self.bank), CANDIDATES * (self.taken + count))
        piece = max(1, PAIRS // (among * max(1, self.taken + count)))
        parts = [self._part(some, count, among) for some in torch.split(items, piece)]
        self.taken += count
        return torch.cat(parts)

    def _part(self, items: Tensor, count: int, among: int) -> Tensor:
        near = self.bank[self.order[items, :among]]
        z, rows = near.flatten(2), torch.arange(len(items), device=items.device)
        used = self.chosen[items, :among]
        place = torch.arange(among, device=items.device)
        nearest = torch.where(used, among, place).topk(-(-count // 2), largest=False, sorted=True).indices
        known = torch.cat(
            (used.byte().argsort(dim=1, descending=True, stable=True)[:, : self.taken], nearest), 1
        )
        apart = _distances(z, z[rows[:, None], known]).amin(2)
        chosen = [nearest]
        for _ in range(count - nearest.shape[1]):
            farthest = apart.argmax(1)
            chosen.append(farthest[:, None])
            apart = torch.minimum(apart, (z - z[rows, farthest][:, None]).norm(dim=2))
        found = torch.cat(chosen, 1)
        self.chosen[items[:, None], found] = True
        return near[rows[:, None], found]


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Distances of rows by differences: products, which torch takes from 26 rows on, lose those between equal roots."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


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
    return _folded(*torch.stack([(sign > 0).sum(), (sign < 0).sum()]).tolist())


def _folded(up: int, down: int) -> str | None:
    return (
        f"the generator folds: determinants are positive at {up} roots, negative at {down}"
        if up and down
        else None
    )


def _rootless(count: int, total: int) -> str:
    return f"no root of G(z) = x found for {count} of {total} rows, whose density counts as 0 and as invalid"


def _unsettled(count: int, total: int) -> str:
    share = f"{100 * count / total:.3g} %"
    return f"the roots of {share} of the rows did not stand still: others are likely, and the density is too small"


def _complaint(missing: int, moving: int, total: int, folds: str | None) -> str | None:
    parts = [_rootless(missing, total)] if missing else []
    parts += [_unsettled(moving, total)] if moving else []
    return "; ".join(parts + ([folds] if folds else [])) or None
