"""A field's converged log-likelihood without its exact trace: probes at the nodes of the fixed rule, pooled.

The path is that of `flowlik.references.fixed_rk4`, so with enough probes the value is that of the rule with the exact
trace. The divergence never feeds back into the path, so fresh probes are drawn at every node, in rounds, until the
standard error of an item is as small as asked for. Which probes (basis, control variate) and how many at which node
follows from a pilot on draws of the field itself: see docs/math.md section 2 and
`flowlik_estimators.divergence.probe_variance`. For one item with n_j probes of variance s_j^2 at the node of weight w_j
the squared standard error is sum_j w_j^2 s_j^2/n_j, s_j^2 estimated from the item's own probes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.references.conditions import of_rows
from flowlik.references.fixed_rk4 import log_source, states, weights_of
from flowlik_estimators.divergence import probe_variance
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.divergence.probes import Basis, GaussianControl, Rotation
from flowlik_estimators.divergence.products import hutchinson, vector_jacobian_products
from flowlik_estimators.integration.clenshaw_curtis import allocate
from flowlik_models.numerics.streams import ROUND_STREAMS

PILOT_KEY = 60_013
PILOT_PROBES = 2
SMALLEST = 2  # probes a node and round: fewer have no variance
ROUNDS = 64
TINY = 1e-300
EXPECTED_ROUNDS = 2.0  # of an item with the pilot's variance


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The probes of one round at every node: basis, coefficient of the Gaussian control (0: none), and number."""

    bases: tuple[Basis, ...]
    controls: tuple[float, ...]
    probes: tuple[int, ...]

    def words(self) -> str:
        """What a card says of it."""
        nodes = Counter(self.bases)
        held = ", ".join(f"{name} at {n}" for name, n in nodes.most_common())
        return f"bases by pilot: {held} of {len(self.bases)} nodes; {sum(self.probes)} probes a round"


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """log p in nats and its standard error from the probes, (batch,) each, and the probes each item took."""

    log_prob: Array
    stderr: Array
    probes: Array


class _Probes:
    """The probes that a model's events and moments allow."""

    def __init__(self, model: Any, x: Tensor) -> None:
        self.shape, self.dtype, self.device = tuple(x.shape[1:]), x.dtype, x.device
        moments = getattr(model, "moments", None)
        whole = moments is not None and moments.eigenvectors.shape[1] == x[0].numel()
        self.control = GaussianControl(moments, self.shape, x.dtype, x.device) if whole else None
        bases: list[Basis] = ["pixel", *(["dct"] if laws.is_image(self.shape) else [])]  # type: ignore[list-item]
        bases += ["pca"] if whole else []
        self.rotations: dict[Basis, Rotation] = {
            basis: laws.rotation(basis, self.shape, moments, x.dtype, x.device) for basis in bases
        }

    def signs(self, basis: Basis, key: int, items: Tensor, number: int, stream: int) -> Tensor:
        """Signs in the rows of a basis, (batch, number, size)."""
        options: dict[str, Any] = {"stream": stream, "dtype": self.dtype, "device": self.device}
        return laws.coordinates("rademacher", key, items, number, self.rotations[basis].size, **options)

    def draw(self, basis: Basis, key: int, items: Tensor, number: int, stream: int) -> Tensor:
        """Probes (batch, number, *event), keyed by item and stream."""
        signs = self.signs(basis, key, items, number, stream)
        return self.rotations[basis].apply(signs).reshape(len(items), number, *self.shape)


# --- the plan -----------------------------------------------------------------------------------------------
def pilot(model: Any, x: Tensor, steps: int, end: float, target_stderr: float) -> Plan:
    """The plan for items like x, (batch, *event), draws of the field: a few are enough.

    Args:
        model: the field; its `moments`, where it has them, give the principal axes and the control.
        x: draws of the field.
        steps: steps of the rule.
        end: where the likelihood is taken.
        target_stderr: standard error of an item in nats that `EXPECTED_ROUNDS` rounds should reach.
    """
    kit, items = _Probes(model, x), torch.arange(len(x))
    signs = [kit.signs(basis, PILOT_KEY, items, PILOT_PROBES, 0) for basis in kit.rotations]
    probes = [rotation.apply(s) for rotation, s in zip(kit.rotations.values(), signs, strict=True)]
    times, found = _products(model, x, torch.cat(probes, 1).reshape(len(x), -1, *kit.shape), steps, end)
    judged = [
        _judged(
            kit, rotation, signs[k], probes[k], found[:, :, PILOT_PROBES * k : PILOT_PROBES * (k + 1)], times
        )
        for k, rotation in enumerate(kit.rotations.values())
    ]
    variances, coefficients = (torch.stack(part) for part in zip(*judged, strict=True))
    chosen, coefficient, variance = probe_variance.choose(variances, coefficients)
    noisy = np.abs(weights_of(steps, end)) * variance.sqrt().cpu().numpy()
    budget = int(np.ceil((noisy.sum() / target_stderr) ** 2 / EXPECTED_ROUNDS))
    numbers = allocate(noisy.tolist(), max(budget, len(noisy)))
    names = tuple(kit.rotations)
    return Plan(
        bases=tuple(names[k] for k in chosen.tolist()),
        controls=tuple(float(c) for c in coefficient.tolist()),
        probes=tuple(max(SMALLEST, number) for number in numbers),
    )


def _velocity(model: Any, t: Tensor, x: Tensor) -> Tensor:
    v: Tensor = model.velocity(x, t)
    return v


def _products(model: Any, x: Tensor, probes: Tensor, steps: int, end: float) -> tuple[list[float], Tensor]:
    """Times of the nodes and J^T e of every probe there, (nodes, batch, probes, d)."""
    times, found = [], []
    for time, y in states(model, x, steps, end):
        now = x.new_full((len(x),), time)
        field = partial(_velocity, model, now)
        found.append(vector_jacobian_products(field, y.to(x.dtype), probes))
        times.append(time)
    return times, torch.stack(found)


def _judged(
    kit: _Probes, rotation: Rotation, signs: Tensor, probes: Tensor, found: Tensor, times: list[float]
) -> tuple[Tensor, Tensor]:
    """Variance of one probe in a basis and the control's coefficient, (nodes,) each."""
    pairs = (found[:, :, 0] * probes[:, 1]).sum(2) - (found[:, :, 1] * probes[:, 0]).sum(2)
    forms = probe_variance.Forms(signs, rotation.back(probes), rotation.back(found), pairs, diagonal=True)
    if kit.control is None:
        return probe_variance.variance(forms), torch.zeros(
            len(times), dtype=torch.float64, device=found.device
        )
    spectrum = torch.stack([kit.control.spectrum(torch.tensor([t])) for t in times])
    known = probe_variance.Known(rotation.back(kit.control.vectors.T), spectrum)
    coefficient = probe_variance.coefficient(forms, known)
    return probe_variance.variance(probe_variance.less(forms, known, coefficient)), coefficient


# --- the estimate -------------------------------------------------------------------------------------------
def pooled_log_prob(
    model: Any,
    x: Tensor,
    items: Tensor,
    plan: Plan,
    *,
    steps: int,
    end: float,
    target_stderr: float,
    key: int,
    rounds: int = ROUNDS,
) -> Pooled:
    """log p at t = `end` of every row of x, (batch, *event), with a standard error of at most `target_stderr` nats.

    Held in memory are the states of all nodes in x's dtype. An item whose error is small enough takes no further round;
    after `rounds` of them it keeps the error it has.

    Args:
        model: the field.
        x: points.
        items: ids of the points, which their probes are keyed by, (batch,).
        plan: probes of a round, for the same steps.
        steps: steps of the rule.
        end: where the likelihood is taken.
        target_stderr: standard error of an item in nats.
        key: names the probes.
        rounds: the most that are taken.

    Raises:
        ValueError: a plan for another number of steps.
    """
    if len(plan.probes) != steps + 1:
        raise ValueError(f"a plan of {len(plan.probes)} nodes does not fit a rule of {steps} steps")
    times, path = _kept(model, x, steps, end)
    pool = _Pool(len(x), plan.probes, weights_of(steps, end))
    kit, active = _Probes(model, x), np.arange(len(x))
    for number in range(rounds):
        if len(active) == 0:
            break
        chosen = torch.from_numpy(active)
        for j, time in enumerate(times):
            stream = 1 + number * ROUND_STREAMS + j
            y = path[j] if len(active) == len(x) else path[j][chosen.to(x.device)]
            field = model if len(active) == len(x) else of_rows(model, chosen)
            columns = _columns(field, kit, y, time, plan, j, key, items[chosen], stream)
            pool.add(active, j, columns)
        active = active[pool.surely()[active] > target_stderr]
    return Pooled(
        log_prob=log_source(path[-1].double()) - pool.integral(), stderr=pool.stderr(), probes=pool.taken()
    )


def _kept(model: Any, x: Tensor, steps: int, end: float) -> tuple[list[float], list[Tensor]]:
    times, path = [], []
    for time, y in states(model, x, steps, end):
        times.append(time)
        path.append(y.to(x.dtype))
    return times, path


def _columns(
    model: Any,
    kit: _Probes,
    y: Tensor,
    time: float,
    plan: Plan,
    j: int,
    key: int,
    items: Tensor,
    stream: int,
) -> Array:
    """Fresh estimates of the divergence at one node, (batch, probes)."""
    now = y.new_full((len(y),), time)
    probes = kit.draw(plan.bases[j], key, items, plan.probes[j], stream)
    _, columns = hutchinson(lambda z: model.velocity(z, now), y, probes)
    columns = columns.double()
    if kit.control is not None and plan.controls[j]:
        columns = (
            columns - plan.controls[j] * kit.control.excess(kit.control.squares(probes), now[:1]).double()
        )
    return np.asarray(columns.cpu().numpy())


class _Pool:
    """Sums over the probes of every item and node, and what follows from them."""

    def __init__(self, batch: int, probes: Sequence[int], weights: Array) -> None:
        self._weights = weights
        self._probes = np.asarray(probes, dtype=np.float64)
        self._rounds = np.zeros(batch)
        self._first = np.zeros((batch, len(probes)))  # taken off, so that squares do not cancel
        self._sum, self._square = np.zeros_like(self._first), np.zeros_like(self._first)

    def add(self, items: Any, node: int, columns: Array) -> None:
        """Take in the probes (items, probes) of one round at a node."""
        if node == 0:
            self._rounds[items] += 1
        fresh = self._rounds[items] == 1
        self._first[items, node] = np.where(fresh, columns.mean(1), self._first[items, node])
        apart = columns - self._first[items, node][:, None]
        self._sum[items, node] += apart.sum(1)
        self._square[items, node] += np.square(apart).sum(1)

    def integral(self) -> Array:
        """The integral of the divergence, (batch,)."""
        return np.asarray((self._first + self._sum / self._numbers()) @ self._weights)

    def stderr(self) -> Array:
        """Its standard error from the probes, (batch,)."""
        return np.asarray(np.sqrt(self._shares().sum(1)))

    def _shares(self) -> Array:
        """What every node adds to the squared standard error, (batch, nodes)."""
        numbers = self._numbers()
        variance = np.maximum(self._square - np.square(self._sum) / numbers, 0.0) / (numbers - 1)
        return np.asarray(variance / numbers * np.square(self._weights))

    def surely(self) -> Array:
        """The standard error and what is unsure of it, so that few items stop because theirs came out too small."""
        numbers = self._numbers()
        shares = self._shares()
        degrees = np.square(shares.sum(1)) / np.maximum((np.square(shares) / (numbers - 1)).sum(1), TINY)
        return np.asarray(self.stderr() * (1.0 + 1.0 / np.sqrt(2.0 * np.maximum(degrees, 1.0))))

    def taken(self) -> Array:
        """Probes of each item, over all nodes, (batch,)."""
        return np.asarray(self._rounds * self._probes.sum())

    def _numbers(self) -> Array:
        return np.asarray(np.maximum(self._rounds, 1)[:, None] * self._probes)
