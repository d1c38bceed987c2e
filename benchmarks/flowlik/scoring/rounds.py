"""Rounds of probes over the items, until the mean's error is what was asked for.

The first round scores every item. Where its own standard errors say that the noise of the mean is still too large,
further rounds with fresh probes score as many items again as are missing, a random choice of them; an item's value is
the mean over its probes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.measures.arrays import Array
from flowlik.measures.ranks import student_quantile
from flowlik.scoring.evaluating import Subject, Values, batches, evaluate
from flowlik.scoring.pilot import Plan, Wish
from flowlik.scoring.result import EstimatorError
from flowlik_estimators import Estimator

MOST_ROUNDS = 24
PAIRED, PAIRED_SHARE = 16, 16
"""A single probe does not say how noisy it is: at least so many items, or one in sixteen, get a second one."""

SPARE = 1.05
"""Of the items in a further round, since its own probes change what is known of the noise."""

STORE_EVERY = 5.0
"""Seconds between two times that values are written in the middle of a round."""

Say = Callable[[str], None]
Store = Callable[[dict[str, Array]], None]


class Table:
    """Values by round and row: log-densities in nats, standard errors, evaluations, products; NaN where none yet."""

    def __init__(self, rows: int, held: dict[str, Array] | None = None) -> None:
        self.rows = rows
        self.arrays: dict[str, Array] = held or {name: np.empty((0, rows)) for name in Values.__annotations__}
        self.probes: Array = self.arrays.pop("probes", np.empty(0))

    def open(self, number: int, probes: int) -> None:
        """Make room for a round, where there is none yet."""
        if number >= len(self.probes):
            self.probes = np.append(self.probes, float(max(probes, 1)))
            self.arrays = {
                name: np.vstack([array, np.full((1, self.rows), math.nan)])
                for name, array in self.arrays.items()
            }

    def before(self, number: int) -> Table:
        """The rounds before one, by which it is planned: the same where it was interrupted and goes on."""
        arrays = {name: array[:number] for name, array in self.arrays.items()}
        return Table(self.rows, {**arrays, "probes": self.probes[:number]})

    def put(self, number: int, which: NDArray[np.int64], values: Values) -> None:
        """Note the values of some rows."""
        for name in self.arrays:
            self.arrays[name][number, which] = getattr(values, name)

    def missing(self, number: int, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Those of the rows that the round has not evaluated."""
        found: NDArray[np.int64] = which[np.isnan(self.arrays["forwards"][number, which])]
        return found

    def stored(self) -> dict[str, Array]:
        """As arrays for a file."""
        return {**self.arrays, "probes": self.probes}

    @property
    def counts(self) -> Array:
        """Probes that each row's value is the mean of, (rows,)."""
        return np.asarray((np.isfinite(self.arrays["log_prob"]) * self.probes[:, None]).sum(0))

    @property
    def log_prob(self) -> Array:
        """Mean over the probes of each row, NaN where there is none."""
        values = np.nan_to_num(self.arrays["log_prob"]) * np.isfinite(self.arrays["log_prob"])
        with np.errstate(invalid="ignore"):
            return np.asarray((values * self.probes[:, None]).sum(0) / self.counts)

    def of_one_probe(self) -> Array:
        """Unbiased variances of one probe, one an item that tells it, nats squared."""
        probes, values = self.probes[:, None], self.arrays["log_prob"]
        counts = (np.isfinite(values) * probes).sum(0)
        between = np.nansum(probes * (values - self.log_prob) ** 2, axis=0)
        within = np.nansum(self.arrays["stderr"] ** 2 * probes * (probes - 1.0), axis=0)
        dof = np.isfinite(values).sum(0) - 1 + (np.isfinite(self.arrays["stderr"]) * (probes - 1.0)).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(((between + within) / dof)[(dof > 0) & (counts > 1)])

    def per_item(self, name: str) -> float:
        """Evaluations or products of all rounds, mean over the rows."""
        return float(np.nansum(self.arrays[name]) / self.rows)


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Of the probes: ``variance`` of one, bits/dim squared, its degrees of freedom, the sum of 1/probes over n^2."""

    variance: float
    dof: float
    per_variance: float

    @property
    def quantile(self) -> float:
        """Half the 95 % width in standard errors."""
        return float(student_quantile(0.975, max(self.dof, 1.0)))

    @property
    def bar(self) -> float:
        """Half the 95 % width of the mean."""
        return self.quantile * math.sqrt(self.variance * self.per_variance)


def noise(table: Table, plan: Plan, nats: float) -> Noise:
    """What the rounds so far say; where no item has two probes, what the pilot's said."""
    counts = table.counts
    counts = counts[counts > 0]
    share = float((1.0 / counts).sum()) / max(len(counts), 1) ** 2
    if not plan.probes:
        return Noise(variance=0.0, dof=math.inf, per_variance=share)
    seen = table.of_one_probe() / nats**2
    if len(seen) < 2:
        return Noise(variance=plan.noise, dof=float(plan.items), per_variance=share)
    mean, spread = float(seen.mean()), float(seen.var(ddof=1)) / len(seen)
    dof = 2.0 * mean**2 / spread if spread > 0.0 else math.inf
    return Noise(variance=mean, dof=dof, per_variance=share)


def stated(found: Noise, plan: Plan) -> EstimatorError:
    """The estimator's error of the mean."""
    return EstimatorError(bias=plan.bias, bar=math.hypot(plan.bar, found.bar) + plan.rest)


@dataclass
class Rounds:
    """The rounds of one score; what is known is stored as it comes."""

    subject: Subject
    plan: Plan
    wish: Wish
    table: Table
    store: Store
    say: Say

    def run(self) -> None:
        """All rounds, until the error is reached or no further one is allowed."""
        rows = np.arange(len(self.subject.items.x))
        first = 0
        if self.plan.known:
            first, known = 1, dict(self.plan.known)
            of_pilot = np.array(known.pop("rows"), dtype=np.int64)
            self.table.open(0, self.plan.known_probes)
            self.table.put(0, of_pilot, Values(**{name: np.array(each) for name, each in known.items()}))
            rows = np.setdiff1d(rows, of_pilot)
        self._round(first, self.plan.estimator, rows)
        for number in range(first + 1, MOST_ROUNDS):
            following = self._next(number)
            if following is None:
                return
            estimator, which = following
            self._round(number, estimator, which)

    @property
    def error(self) -> EstimatorError:
        """What is known of the error now."""
        return stated(self.noise, self.plan)

    @property
    def noise(self) -> Noise:
        """The probes' noise, as far as the rounds tell it."""
        return self._noise(self.table)

    def _noise(self, table: Table) -> Noise:
        return noise(table, self.plan, self.subject.dim * math.log(2.0))

    def _next(self, number: int) -> tuple[Estimator, NDArray[np.int64]] | None:
        """Estimator and rows of one more round; None: there is none."""
        plan, wish, n = self.plan, self.wish, self.subject.items.n
        table = self.table.before(number)
        if not plan.probes or wish.accuracy is None or self._spent(table):
            return None
        order = np.random.default_rng([self.subject.seed, number]).permutation(n)
        if plan.probes == 1 and number == 1 + bool(plan.known) and n > 1:
            return plan.estimator, np.sort(order[: max(PAIRED, n // PAIRED_SHARE)])
        found = self._noise(table)
        if stated(found, plan).stated <= wish.accuracy:
            return None
        left = wish.accuracy - abs(plan.bias) - plan.rest
        if left <= plan.bar or found.variance == 0.0:
            return None
        aim = (left**2 - plan.bar**2) / found.quantile**2 / found.variance
        probes, counts = plan.probes, table.counts
        gain = (1.0 / np.maximum(counts, 1) - 1.0 / (counts + probes))[counts > 0].mean() / n**2
        wanted = math.ceil(SPARE * (found.per_variance - aim) / gain)
        if wanted <= n:
            order = order[np.argsort(counts[order], kind="stable")]
            return plan.estimator, np.sort(order[:wanted])
        more = math.ceil(1.0 / (aim * n) - float(counts.mean()))
        if more >= self.subject.dim:
            return None
        return replace(plan.estimator, probes=max(probes, more)), np.arange(n)  # type: ignore[call-arg]

    def _spent(self, table: Table) -> bool:
        """Whether a further round would take an item beyond the budget."""
        if self.wish.budget is None:
            return False
        work = table.arrays["forwards"] + table.arrays["products"]
        used, once = np.nansum(work, axis=0).max(), np.nanmax(work[-1])
        return bool(used + once > self.wish.budget)

    def _round(self, number: int, estimator: Estimator, which: NDArray[np.int64]) -> None:
        options: dict[str, Any] = estimator.params()
        self.table.open(number, options.get("probes") or 1)
        missing, last = self.table.missing(number, which), time.monotonic()
        done = len(which) - len(missing)
        try:
            for part in batches(missing, self.subject.batch):
                self.table.put(number, part, evaluate(self.subject, estimator, part, number))
                done += len(part)
                if done == len(which) or time.monotonic() - last > STORE_EVERY:
                    self.say(f"{estimator.label}: {done} of {len(which)} items")
                if done < len(which) and time.monotonic() - last > STORE_EVERY:
                    self.store(self.table.stored())
                    last = time.monotonic()
        finally:
            self.store(self.table.stored())
