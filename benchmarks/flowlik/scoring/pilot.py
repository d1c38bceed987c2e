"""The pilot: a few items by more and more steps until they converge, and what is chosen from what was seen.

In the pilot a probe is kept along the path and keyed by item, so that values of one item by different steps share it
and their difference is the solver's alone. The bias of a choice is its mean distance to the converged values; it does
not shrink with the number of items scored, the probes' noise does. The score itself draws probes anew at every
evaluation, of the same mean and far less noise; two of them on the pilot's items say how much.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.measures.ranks import student_quantile
from flowlik.scoring.evaluating import Subject, Values, evaluate
from flowlik_estimators import Estimator, get
from flowlik_models.interfaces import Ability, can

SHARE, FEWEST, MOST = 32, 8, 32
"""Items of a pilot: one in `SHARE`, within these."""

NUMBERS, MOST_OF_FEW = 512, 128
"""So many numbers at least, up to so many items: errors of few dimensions do not average out within an item."""

PROBES = 2
"""Of the call that measures their noise."""

FEW_DIMENSIONS = 4
"""Up to here an exact trace is about as cheap as probes are, and it has no noise."""

LEVELS = (1, 2, 4, 8, 16, 32, 64)
FASTEST, SLOWEST = 1 / 16, 3 / 4
"""By what doubling the steps may seem to lower the error: a fourth-order solver, and what hardly converges."""

SMALL = 1e-3
"""Bits/dim; with a budget alone nothing smaller is looked for."""

CONVERGED = 0.1
"""Share of the accuracy, or of the best error within the budget, at which what is left of the finest is small."""

TWICE = 2
"""Levels in a row at which it is to be small below `FEWEST` items, where one gap may be small by chance."""

PLANNED = 0.95
"""Share of the accuracy that is planned with: what the scoring finds is never just what the pilot said."""

SINGLE = 1.4
"""Up to so many probes needed the first round takes one: a second one for the items that want it is cheaper."""

CONVERGE: tuple[Ability, ...] = ("velocity", "joint flow map", "policy flow")
"""What more and more steps converge on."""

Make = Callable[[int], Estimator]
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Tried:
    """An estimator and what it gave on the pilot's items."""

    estimator: Estimator
    values: Values

    @property
    def forwards(self) -> float:
        """Evaluations an item."""
        return float(self.values.forwards.mean())

    @property
    def per_probe(self) -> float:
        """Products an item and probe; all of them where the trace is none of probes."""
        return float(self.values.products.mean()) / (probes_of(self.estimator) or 1)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A tried one: ``bias``, its ``bar`` and what is left of the ``finest``, the ``noise`` (variance) of one probe.

    All in bits/dim. Errors of the mean over all items.
    """

    tried: Tried
    bias: float
    bar: float
    rest: float
    noise: float

    @property
    def error(self) -> float:
        """Half the 95 % width of what is not the probes'."""
        return abs(self.bias) + self.bar + self.rest


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is scored with, and why; ``probes`` of the first round, 0 for a trace without noise.

    Errors as in `Judged`, seen on so many ``items``; ``work`` of the pilot, in all. ``known``: its values that the
    score need not compute again, of ``known_probes`` each.
    """

    estimator: Estimator
    probes: int
    bias: float
    bar: float
    rest: float
    noise: float
    items: int
    why: str
    work: float = 0.0
    known: dict[str, list[float]] = field(default_factory=dict)
    known_probes: int = 0


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What was asked for: an accuracy in bits/dim, or evaluations and products an item."""

    accuracy: float | None
    budget: float | None
    noiseless: bool = False


def probes_of(estimator: Estimator) -> int:
    """Probes of an estimator; 0 where its trace is none of probes."""
    options = estimator.params()
    return int(options.get("probes") or 0) if options.get("trace") == "hutchinson" else 0


def pilot_items(n: int, dim: int, seed: int) -> NDArray[np.int64]:
    """A random few of n items, the same for the same seed: data may be sorted."""
    count = max(FEWEST, min(MOST, n // SHARE), min(MOST_OF_FEW, NUMBERS // dim))
    return np.sort(np.random.default_rng([seed, 15]).permutation(n)[:count]).astype(np.int64)


def field_solver(trace: str, probes: int | None, *, whitened: bool) -> Make:
    """RK4 in moment-whitened coordinates on the clock that resolves the data's end, by its number of steps."""
    options: dict[str, object] = {"solver": "rk4", "trace": trace, "probes": probes}
    if whitened:
        return lambda steps: get("whitened-ode", steps=steps, clock="stretched", **options)
    return lambda steps: get("ode", steps=steps, grid="logsnr", **options)


def ladder(subject: Subject, *, noiseless: bool) -> Make:
    """What takes more and more steps on this model.

    Raises:
        ValueError: no estimator here converges on such a model.
    """
    model = subject.model
    if can(model, "velocity"):
        whitened = getattr(model, "moments", None) is not None
        if can(model, "divergence"):
            return field_solver("closed", None, whitened=whitened)
        if noiseless or subject.dim <= FEW_DIMENSIONS:
            return field_solver("exact", None, whitened=whitened)
        return field_solver("hutchinson", 1, whitened=whitened)
    if can(model, "joint flow map"):
        return lambda steps: get("f2d2", steps=steps)
    if can(model, "policy flow"):
        return lambda steps: get("pi-flow", segments=steps)
    raise ValueError(
        f"{subject.name}: nothing to converge on: a model of type {type(model).__name__} is neither a velocity field "
        "nor a joint map nor a policy flow nor an exact flow; `flowlik run -t mine.py` tries every estimator that fits"
    )


class Pilot:
    """The pilot's items through one estimator after another."""

    def __init__(self, subject: Subject, wish: Wish, say: Say) -> None:
        self.subject, self.wish, self.say, self.work = subject, wish, say, 0.0
        self.which = pilot_items(subject.items.n, subject.dim, subject.seed)
        self.nats = subject.dim * math.log(2.0)
        self.tried: list[Tried] = []
        self.rest = math.inf

    def evaluate(self, estimator: Estimator) -> Tried:
        """The estimator on the pilot's items."""
        values = evaluate(self.subject, estimator, self.which)
        self.work += float((values.forwards + values.products).sum())
        self.say(f"pilot: {estimator.label} on {len(self.which)} items")
        return Tried(estimator=estimator, values=values)

    def climb(self, make: Make) -> None:
        """Twice as many steps until what is left is small beside what was asked for."""
        size, small, wanted = math.inf, 0, 1 if len(self.which) >= FEWEST else TWICE
        for level in LEVELS:
            self.tried.append(self.evaluate(make(level)))
            if level == 1:
                continue
            gap, width, now = self.apart(self.tried[-2], self.tried[-1])
            ratio = 0.5 if math.isinf(size) else min(max(now / max(size, 1e-300), FASTEST), SLOWEST)
            self.rest, size = (abs(gap) + width) * ratio / (1.0 - ratio), now
            small = small + 1 if self.rest <= CONVERGED * self._aim() else 0
            if small == wanted:
                break

    def apart(self, one: Tried, other: Tried) -> tuple[float, float, float]:
        """Mean difference in bits/dim of the mean over all items, half its 95 % width, and its root mean square."""
        gap = (other.values.log_prob - one.values.log_prob) / self.nats
        gap = gap[np.isfinite(gap)]
        if len(gap) == 0:
            return math.inf, 0.0, math.inf
        mean, size = float(gap.mean()), float(np.sqrt(np.square(gap).mean()))
        left = max(0.0, 1.0 - len(gap) / self.subject.items.n)
        if len(gap) == 1:
            return mean, abs(mean) * left, size
        width = (
            float(student_quantile(0.975, len(gap) - 1)) * float(gap.std(ddof=1)) * math.sqrt(left / len(gap))
        )
        return mean, width, size

    def judged(self, tried: Tried, finest: Tried, noise: float) -> Judged:
        """A tried one against the converged values; ``noise``: variance of a probe times evaluations."""
        bias, bar = (0.0, 0.0) if tried is finest else self.apart(tried, finest)[:2]
        own = noise / tried.forwards if probes_of(tried.estimator) else 0.0
        return Judged(tried=tried, bias=bias, bar=bar, rest=self.rest, noise=own)

    def between(self, make: Make, noise: float) -> None:
        """Half as many steps again as the largest number that is too few, where that is likely to be enough."""
        accuracy, finest = self.wish.accuracy, self.tried[-1]
        if accuracy is None:
            return
        every = [self.judged(each, finest, noise) for each in self.tried]
        enough = [math.isfinite(needed_probes(each, self.wish, self.subject.items.n)) for each in every]
        if True not in enough or (first := enough.index(True)) < 2:
            return
        if every[first - 1].error * (2 / 3) ** 4 <= accuracy / 2:
            self.tried.append(self.evaluate(make(3 * LEVELS[first] // 4)))

    def noise(self) -> tuple[float, Tried | None]:
        """Variance of a fresh probe times evaluations, bits/dim squared, and the call that says it."""
        near = self.tried[max(0, len(self.tried) - 2)]
        if not probes_of(near.estimator):
            return 0.0, None
        found = self.evaluate(replace(near.estimator, redraw=True, probes=PROBES))  # type: ignore[call-arg]
        return float(np.nanmean(found.values.stderr**2)) * PROBES / self.nats**2 * found.forwards, found

    def _aim(self) -> float:
        """The error that the converged values are to be small beside."""
        if self.wish.accuracy is not None:
            return self.wish.accuracy
        assert self.wish.budget is not None
        within = [each for each in self.tried if _cost(each, 1, self.subject.dim) <= self.wish.budget]
        if not within or within[-1] is self.tried[-1]:
            return 0.0
        return max(SMALL, abs(self.apart(within[-1], self.tried[-1])[0]))


def plan(subject: Subject, wish: Wish, say: Say) -> Plan:
    """Try, choose, and say why; of a model that only has an exact inverse there is nothing to choose."""
    if can(subject.model, "exact inverse") and not any(can(subject.model, name) for name in CONVERGE):
        why = "exact-flow: exact by the model's own inverse, in one evaluation"
        return Plan(
            estimator=get("exact-flow"), probes=0, bias=0.0, bar=0.0, rest=0.0, noise=0.0, items=0, why=why
        )
    pilot, make = Pilot(subject, wish, say), ladder(subject, noiseless=wish.noiseless)
    pilot.climb(make)
    finest = pilot.tried[-1]
    noise, measured = pilot.noise()
    if can(subject.model, "velocity"):
        pilot.between(make, noise)
        if can(subject.model, "joint flow map"):
            pilot.tried += [pilot.evaluate(get("f2d2", steps=steps)) for steps in LEVELS[:4]]
    every = [pilot.judged(each, finest, noise) for each in pilot.tried]
    chosen = _chosen(every, wish, subject)
    estimator = _estimator(chosen, wish, subject)
    return Plan(
        estimator=estimator,
        probes=probes_of(estimator),
        bias=chosen.bias,
        bar=chosen.bar,
        rest=chosen.rest,
        noise=chosen.noise,
        items=len(pilot.which),
        why=_why(chosen, every, wish, subject, len(pilot.which), estimator),
        **{"work": pilot.work, **_known(chosen, estimator, measured, pilot)},
    )


def _known(chosen: Judged, estimator: Estimator, measured: Tried | None, pilot: Pilot) -> dict[str, Any]:
    """Values of the pilot that are just what the score would evaluate again: its items need no other."""
    same = chosen.tried if chosen.tried.estimator == estimator else None
    if measured is not None and probes_of(estimator):
        plain = replace(measured.estimator, redraw=False, probes=1)  # type: ignore[call-arg]
        same = measured if plain == chosen.tried.estimator else None
    if same is None or pilot.wish.budget is not None:
        return {}
    values = {name: getattr(same.values, name).tolist() for name in Values.__annotations__}
    pilot.work -= float((same.values.forwards + same.values.products).sum())
    return {
        "known": {"rows": pilot.which.tolist(), **values},
        "known_probes": max(probes_of(same.estimator), 1),
        "work": pilot.work,
    }


def _cost(tried: Tried, probes: float, dim: int) -> float:
    """Evaluations and products an item with so many probes, or with what the estimator has."""
    if probes_of(tried.estimator):
        return tried.forwards + tried.per_probe * min(probes, dim)
    return tried.forwards + tried.per_probe


def needed_probes(judged: Judged, wish: Wish, n: int) -> float:
    """Probes an item that bring the stated error down to the accuracy; infinite where no number does."""
    assert wish.accuracy is not None
    left = PLANNED * wish.accuracy - abs(judged.bias) - judged.rest
    if left <= judged.bar:
        return math.inf
    return judged.noise / n * 1.96**2 / (left**2 - judged.bar**2)


def _chosen(every: Sequence[Judged], wish: Wish, subject: Subject) -> Judged:
    """The cheapest that reaches the accuracy within the budget; else the one of the smallest error."""
    dim, n = subject.dim, subject.items.n
    budget = math.inf if wish.budget is None else wish.budget

    def cost(each: Judged) -> float:
        return _cost(
            each.tried, 1.0 if wish.accuracy is None else max(1.0, needed_probes(each, wish, n)), dim
        )

    def error(each: Judged) -> float:
        probes = _within(each, wish, dim)
        return each.error + 1.96 * math.sqrt(0.0 if probes >= dim else each.noise / n / probes)

    affordable = [each for each in every if _cost(each.tried, 1, dim) <= budget]
    if not affordable:
        least = min(_cost(each.tried, 1, dim) for each in every)
        raise ValueError(
            f"{subject.name}: budget={budget:g}: the cheapest here takes {least:g} evaluations and products an item"
        )
    if wish.accuracy is not None:
        reaching = [e for e in affordable if math.isfinite(needed_probes(e, wish, n)) and cost(e) <= budget]
        if reaching:
            return min(reaching, key=cost)
    return min(affordable, key=error)


def _within(judged: Judged, wish: Wish, dim: int) -> int:
    """Probes that the budget allows, at most all."""
    if wish.budget is None or not probes_of(judged.tried.estimator):
        return dim
    tried = judged.tried
    return max(1, min(dim, int((wish.budget - tried.forwards) / tried.per_probe)))


def _estimator(chosen: Judged, wish: Wish, subject: Subject) -> Estimator:
    """The chosen one as it scores: with fresh probes, or with the exact trace where that is no dearer."""
    estimator = chosen.tried.estimator
    if not probes_of(estimator):
        return estimator
    probes = first_probes(chosen, wish, subject)
    if probes < subject.dim:
        return replace(estimator, redraw=True, probes=probes)  # type: ignore[call-arg]
    plain: dict[str, Any] = {"probes": None, "noise": None, "basis": None, "control": None}
    return replace(estimator, **{"trace": "exact"} | plain)


def first_probes(chosen: Judged, wish: Wish, subject: Subject) -> int:
    """Probes of the first round: fewer than the pilot's few items say, since more items in a further round are cheap
    and a probe too many is lost."""
    most = _within(chosen, wish, subject.dim)
    if wish.accuracy is None:
        return most
    needed = needed_probes(chosen, wish, subject.items.n)
    if not math.isfinite(
        needed
    ):  # more probes do not reach it: as many as make their noise small beside the rest
        needed = chosen.noise / subject.items.n * (1.96 / max(0.5 * chosen.error, 1e-12)) ** 2
    if needed >= subject.dim:
        return most
    return min(most, 1 if needed < SINGLE else max(2, int(0.75 * needed)))


def _why(
    chosen: Judged, every: Sequence[Judged], wish: Wish, subject: Subject, count: int, estimator: Estimator
) -> str:
    asked = [] if wish.accuracy is None else [f"accuracy {wish.accuracy:g}"]
    asked += [] if wish.budget is None else [f"budget {wish.budget:g}"]
    others = ", ".join(
        f"{_short(each.tried.estimator)} {each.error:.2g}" for each in every if each is not chosen
    )
    spread = math.sqrt(chosen.noise)
    noise = f"; a probe's noise {spread:.2g} an item, {spread / math.sqrt(subject.items.n):.2g} of the mean"
    return (
        f"{estimator.label} for {' and '.join(asked)}: off by at most {chosen.error:.2g} bits/dim, as {count} items "
        f"against their converged values say ({others}){noise if chosen.noise else ''}"
    )


def _short(estimator: Estimator) -> str:
    options = estimator.params()
    steps = options.get("steps") or options.get("segments")
    return f"{estimator.name} {steps} step{'' if steps == 1 else 's'}" if steps else str(estimator.name)
