"""`flowlik.reweigh`: a model's own samples weighed towards a law known up to its constant, as Boltzmann generators are.

Sources: importance weights of a flow's samples, Noe et al. 2019 (Science 365, eaaw1147), section "reweighting"; the
effective sample size, Kish 1965.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.uses.importance import effective_share
from flowlik.measures.arrays import Array
from flowlik.scoring.classes import one_estimator
from flowlik_estimators import Estimator
from flowlik_estimators.call import Condition

HEAVY = 0.1
"""Share of a set's weight from which one sample alone makes its mean worthless."""

Energy = Callable[[Tensor], Tensor]
Region = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over independent sets of samples and its standard error; ``values`` (sets,)."""

    mean: float
    se: float
    values: Array

    def __str__(self) -> str:
        """Mean and standard error."""
        return f"{self.mean:.4g} +- {self.se:.2g}"


@dataclass(frozen=True, kw_only=True)
class Reweighed:
    """Samples of a model, sets of n, with the weights that turn them towards exp(-energy)/Z.

    ``x`` (sets, n, *event); ``log_weights`` (sets, n): -energy(x) - log q(x) in nats, -inf where there is none;
    ``nfe``: evaluations a sample.
    """

    x: Tensor
    log_weights: Array
    nfe: float

    @cached_property
    def weights(self) -> Array:
        """Shares of a set's weight, (sets, n)."""
        return np.exp(self.log_weights - _log_sums(self.log_weights)[:, None])

    @property
    def share(self) -> Mean:
        """Effective sample size as a share of n."""
        return _over_sets(np.array([effective_share(row) for row in self.log_weights]))

    @property
    def log_z(self) -> Mean:
        """log Z in nats."""
        return _over_sets(_log_sums(self.log_weights) - math.log(self.log_weights.shape[1]))

    @property
    def heaviest(self) -> float:
        """The largest share of a set's weight that one sample has."""
        return float(self.weights.max())

    def expectation(self, values: Callable[[Tensor], Tensor]) -> Mean:
        """The mean of ``values(x)`` (batch,) under exp(-energy)/Z.

        Its error is over the sets; heavy weights make it too small.
        """
        weighed = self.weights * np.where(self.weights > 0, self._each(values), 0.0)
        return _over_sets(weighed.sum(1))

    def free_energy(self, first: Region, second: Region) -> Mean:
        """F(first) - F(second) = -log(Z_first/Z_second) in nats; a region says which x (batch,) it holds.

        A set with nothing in a region has no finite value, and neither has the mean.
        """
        held = (np.where(self._each(region) != 0, self.log_weights, -np.inf) for region in (first, second))
        log_first, log_second = map(_log_sums, held)
        with np.errstate(invalid="ignore"):
            return _over_sets(log_second - log_first)

    def __str__(self) -> str:
        """One line."""
        heavy = f"; one sample has {self.heaviest:.0%} of a set's weight" if self.heaviest > HEAVY else ""
        return (
            f"effective share {self.share}, log Z {self.log_z} ({len(self.x)} sets of {self.x.shape[1]}, "
            f"{self.nfe:g} evaluations a sample){heavy}"
        )

    def _each(self, values: Callable[[Tensor], Tensor]) -> Array:
        found = _rows(values(self.x.flatten(0, 1)), self.log_weights.size, "the value of each sample")
        return found.reshape(self.log_weights.shape)


def reweigh(
    model: object,
    energy: Energy,
    n: int = 1000,
    *,
    sets: int = 5,
    estimator: str | Estimator = "ode",
    cond: Condition = None,
    seed: int = 0,
) -> Reweighed:
    """Draw samples with their log-density from a model and weigh them with exp(-energy).

    The weights are exact where the log-density is. That of few steps is as wrong as the map, and that of probes has
    noise, whose exponential is biased: take an exact trace for a log Z.

    Args:
        model: a field, a joint map or an exact flow.
        energy: x (batch, *event) -> (batch,) nats, of the law exp(-energy)/Z.
        n: samples a set.
        sets: independent sets, over which errors are taken; 2 at least.
        estimator: that samples with a density, as it is spelled on the command line or from `flowlik_estimators.get`.
        cond: of every sample, (n, ...).
        seed: of the first set.

    Raises:
        ValueError: fewer than two sets or samples, an estimator that does not fit or finds no density on the way, an
            energy of another shape or no finite value; one line.

    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gaussian-2d")
    >>> found = reweigh(model, lambda x: 2.0 - model.log_prob(x), 100, estimator="f2d2[steps=1]")
    >>> round(found.share.mean, 3), round(found.log_z.mean, 3)
    (1.0, -2.0)
    """
    if n < 2 or sets < 2:
        raise ValueError(f"reweigh: n={n}, sets={sets}: expected two or more of each")
    chosen = one_estimator(estimator, "reweigh")
    drawn, weights, forwards = [], [], 0.0
    for number in range(sets):
        generator = torch.Generator().manual_seed(seed + number)
        out = chosen.sample(model, n, cond=cond, generator=generator)
        if out.status == "refused" or out.log_prob is None:
            why = out.reason or "finds no density on the way"
            raise ValueError(f"reweigh: {chosen.label}: {why}")
        log_q = torch.where(out.valid, out.log_prob, math.nan).cpu().double().numpy()
        weights.append(-_rows(energy(out.x), n, "energy") - log_q)
        drawn.append(out.x)
        forwards += float(torch.as_tensor(out.cost.forwards, dtype=torch.float64).mean()) / sets
    log_weights = np.stack(weights)
    log_weights[~np.isfinite(log_weights)] = -np.inf
    if np.isneginf(log_weights).all(1).any():
        raise ValueError(f"reweigh: {chosen.label}: no sample of a set has a finite weight")
    return Reweighed(x=torch.stack(drawn), log_weights=log_weights, nfe=forwards)


def _rows(values: Tensor, n: int, what: str) -> Array:
    if not isinstance(values, Tensor) or values.shape != (n,):
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"reweigh: {what} must be a tensor ({n},), got {found}")
    return np.asarray(values.detach().cpu().double().numpy())


def _log_sums(log_weights: Array) -> Array:
    """Log of the sum of each set's weights (sets, n), (sets,)."""
    return np.asarray(np.logaddexp.reduce(log_weights, axis=1))


def _over_sets(values: Array) -> Mean:
    spread = float(values.std(ddof=1)) if np.isfinite(values).all() else math.nan
    return Mean(mean=float(values.mean()), se=spread / math.sqrt(len(values)), values=values)
