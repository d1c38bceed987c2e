"""Rare events by likelihood-weighted importance sampling: what the estimator's density says of the tails.

Two half-spaces far out along the mixture's widest axis, of probability 1e-3 and 1e-4, whose probabilities under the
mixture are known exactly. Points come from a proposal with an exact density q: half of it the mixture itself, a quarter
each the mixture tilted to the edge of one event (every component moved to its most likely point on the edge). Weights
are p/q with p the estimator's density, so what is wrong with the estimate is the density alone; weights with the exact
p are taken at the same points, so the noise of the draw is known too. docs/uses.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor

from flowlik.evaluation.batching.batches import DivergedError, evaluate, sample_with_log_prob
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.arrays import Array
from flowlik.tasks.task import UnavailableError
from flowlik_models.closed_forms.mixture import GaussianMixture

POINTS = 2000
PROBABILITIES = (1e-3, 1e-4)
_SEED = 1_066


@dataclass(frozen=True)
class Event:
    """The half-space {x: axis . x > level}; `axis` (d,) float64 of length 1."""

    axis: Tensor
    level: float

    def holds(self, x: Tensor) -> Array:
        """Whether each of x (n, d) lies in it, (n,) as 0 and 1."""
        return np.asarray((x.double() @ self.axis > self.level).double().numpy())


@dataclass(frozen=True)
class Design:
    """The two events and the proposal for one mixture."""

    truth: GaussianMixture
    events: tuple[Event, Event]

    @cached_property
    def proposal(self) -> GaussianMixture:
        """The defensive mixture: itself and its two tilts."""
        tilts = [_tilted(self.truth, event) for event in self.events]
        truth = self.truth
        return GaussianMixture(
            torch.cat([truth.weights / 2, *(weights / 4 for weights, _ in tilts)]),
            torch.cat([truth.means, *(means for _, means in tilts)]),
            truth.stds.repeat(3, 1),
            truth.rotations.repeat(3, 1, 1),
        )

    def exact(self) -> tuple[float, float]:
        """The exact probabilities of the events."""
        return tail(self.truth, self.events[0]), tail(self.truth, self.events[1])


def rare_events(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """Effective sample size, mass, probabilities of two rare events and their odds ratio, beside the exact ones.

    Measures: `ess` and `ess_exact` as shares of the points; `mass`, the mean weight; `odds`, `odds_exact` of the first
    event against the second; `log_odds_error` = log(odds/odds_exact), `log_odds_se` the standard error that the exact
    weights have at these points; `log_p_error`, that of the first event's probability. `mass_se` and `p_se` are the
    estimator's own standard errors over the points; heavy weights make them too small, so that only several seeds
    (each has points of its own) tell what a mass is worth. Where the family samples with a
    density: `sample_ess` and `sample_log_mass` (0 for an exact density) of the mixture's density over the one that
    came with the sample.
    """
    cell, truth = prepared.cell, getattr(prepared.task, "truth", None)
    if not isinstance(truth, GaussianMixture):
        raise UnavailableError(
            f"importance needs a mixture in closed form, and {prepared.task.id} is none; choose -t gmm-2d"
        )
    design = design_of(prepared.cell.task, truth)
    drawn = torch.Generator().manual_seed(_SEED + cell.options.seed)
    x = design.proposal.sample(POINTS, generator=drawn, dtype=torch.float64)
    base = design.proposal.log_prob(x).numpy()
    points = x.to(getattr(torch, cell.options.dtype))
    found = evaluate(cell, prepared.model, points, torch.arange(POINTS)).log_prob
    log_weights, exact = found - base, truth.log_prob(x).numpy() - base
    hits = np.stack([event.holds(x) for event in design.events])
    measured = weighed(log_weights, exact, hits, design.exact())
    return measured | _reweighed(prepared, truth), {"log_weights": log_weights, "exact_log_weights": exact}


def weighed(
    log_weights: Array, exact: Array, hits: Array, probabilities: tuple[float, float]
) -> dict[str, Any]:
    """The measures of `rare_events` from log-weights (n,), exact ones (n,), events (2, n) and their probabilities."""
    weights, true_weights = _weights(log_weights), _weights(exact)
    rare, rarer = (float((weights * hit).mean()) for hit in hits)
    parts = true_weights * hits
    relative = parts[0] / parts[0].mean() - parts[1] / parts[1].mean()
    log_odds = math.log(rare / rarer) if rare > 0 and rarer > 0 else math.nan
    odds = probabilities[0] / probabilities[1]
    return {
        "ess": effective_share(log_weights),
        "ess_exact": effective_share(exact),
        "mass": float(weights.mean()),
        "mass_se": _standard_error(weights),
        "p": rare,
        "p_se": _standard_error(weights * hits[0]),
        "p_exact": probabilities[0],
        "log_p_error": math.log(rare / probabilities[0]) if rare > 0 else math.nan,
        "odds": math.exp(log_odds),
        "odds_exact": odds,
        "log_odds_error": log_odds - math.log(odds),
        "log_odds_se": float(relative.std(ddof=1) / math.sqrt(len(relative))),
        "points": len(weights),
    }


def _standard_error(values: Array) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _weights(log_weights: Array) -> Array:
    """Weights; no value is no weight, and what would overflow is the largest that does not."""
    return np.exp(np.minimum(np.where(np.isnan(log_weights), -np.inf, log_weights), 300.0))


def effective_share(log_weights: Array) -> float:
    """Kish's effective sample size (sum w)^2 / sum w^2 as a share of the n points; 1 for equal weights."""
    known = log_weights[np.isfinite(log_weights)]
    if not len(known):
        return math.nan
    weights = np.exp(known - known.max())
    return float(weights.sum() ** 2 / np.square(weights).sum() / len(log_weights))


def _reweighed(prepared: Prepared, truth: GaussianMixture) -> dict[str, float]:
    """The estimator's own samples weighed with truth over the density they came with."""
    try:
        x, found = sample_with_log_prob(prepared.cell, prepared.model, POINTS)
    except DivergedError:
        return {}
    if found is None or not bool(torch.isfinite(x).any()):
        return {}
    log_weights = truth.log_prob(x.double().cpu()).numpy() - found
    known = log_weights[np.isfinite(log_weights)]
    if not len(known):
        return {}
    top = float(known.max())
    log_mass = top + math.log(float(np.exp(known - top).sum()) / len(log_weights))
    return {"sample_ess": effective_share(log_weights), "sample_log_mass": log_mass}


@lru_cache(maxsize=4)
def design_of(task: str, truth: GaussianMixture) -> Design:
    """The design on a task's mixture: its widest axis, both ways."""
    _, covariance = truth.mean_and_covariance()
    axis = torch.linalg.eigh(covariance)[1][:, -1]
    axis = axis * torch.sign(axis[axis.abs().argmax()])
    events = [
        Event(way * axis, _level(truth, way * axis, p)) for way, p in zip((1, -1), PROBABILITIES, strict=True)
    ]
    return Design(truth, (events[0], events[1]))


def _along(truth: GaussianMixture, axis: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every component along the axis, (K,) each."""
    loads = torch.einsum("kde,d->ke", truth.rotations, axis) * truth.stds
    return truth.means @ axis, loads.square().sum(1).sqrt()


def tail(truth: GaussianMixture, event: Event) -> float:
    """The exact probability of the event."""
    return math.exp(_log_tail(truth, event))


def _log_tail(truth: GaussianMixture, event: Event) -> float:
    centre, width = _along(truth, event.axis)
    logs: Tensor = truth.weights.log() + torch.special.log_ndtr((centre - event.level) / width)
    return float(logs.logsumexp(0))


def _level(truth: GaussianMixture, axis: Tensor, probability: float) -> float:
    centre, width = _along(truth, axis)
    high = float((centre + 40 * width).max())
    return float(
        scipy.optimize.brentq(
            lambda c: _log_tail(truth, Event(axis, c)) - math.log(probability), float(centre.min()), high
        )
    )


def _tilted(truth: GaussianMixture, event: Event) -> tuple[Tensor, Tensor]:
    """Weights (K,) and means (K, d) of the mixture moved to the event's edge: components by their share of the tail,
    each moved to its most likely point on the edge (no further than the edge where it lies beyond).
    """
    centre, width = _along(truth, event.axis)
    share = truth.weights * torch.special.ndtr((centre - event.level) / width)
    share = (share / share.sum()).clamp_min(1e-12)
    covariance_axis = torch.einsum(
        "kde,ke->kd",
        truth.rotations,
        truth.stds.square() * torch.einsum("kde,d->ke", truth.rotations, event.axis),
    )
    lift = (event.level - centre).clamp_min(0.0) / width.square()
    return share / share.sum(), truth.means + lift[:, None] * covariance_axis
