r"""Nested Clenshaw-Curtis rules for the divergence along a path, their error, and where to spend probes.

The integral over t, from the noise end to the data end, is taken in the angle a with ``t = sin a/(sin a + cos a)``:
in it the divergence of a Gaussian part has its poles a distance of about sigma from the data end and the nodes gather
there.
The rules of 3, 5, 9, ..., 129 nodes are nested, each the even nodes of the next (Clenshaw and Curtis 1960).

Where the field is stiff, a part of the data being thinner than about 0.003, the poles are too near. In the time
``u = log((t + 1/2)/(1 - t + `WIDTH`))`` they lie about pi/2 away whatever the thickness, down to `WIDTH`: 33 nodes are
off by less than 1e-4 nats from a thickness of 1e-5 to 4. With fewer nodes the angle is better, so it comes first.

Error of one item: the rule differs from the one of half the intervals by E (not below a tenth of the difference
before it), which is the error of the coarser rule and so far too pessimistic. The Chebyshev coefficients of
the integrand say how fast the expansion decays; continued geometrically, they give the aliasing error L of
the rule itself (Trefethen 2008), too optimistic where the decay slows down. The estimate is ``sqrt(E L)``, at
most E: on Gaussian mixtures several times the error, and rarely below it.

Probes: with n_j fresh probes at node j of weight w_j the variance is ``sum_j w_j^2 s_j^2/n_j``, least for
``n_j`` proportional to ``|w_j| s_j`` (Neyman 1934).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from flowlik_models.numerics.reparametrised_time import ReparametrisedTime

LEVELS = (3, 5, 9, 17, 33, 65, 129)
FINEST = LEVELS[-1]
FIRST_JUDGED = 17
"""The fewest nodes whose error estimate is trusted to stop at: below, the decay is seen in too few modes."""

WIDTH, NEAR_NOISE = 1e-5, 0.5
"""Of the time for stiff fields; the second as in `whitened-ode`, docs/math.md section 5."""

Rule = Callable[[int, float, float], tuple[Tensor, Tensor]]
"""Number of nodes, data end and noise end -> times and weights."""

ACCIDENT = 0.1
"""Two rules may agree by accident; their difference is taken for no less than this share of the one before."""


@lru_cache(maxsize=32)
def angle_rule(nodes: int, end: float, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """Times (nodes,) rising from ``start`` to ``end`` and weights (nodes,), float64: sum w f(t) is about int f dt."""
    first, last = math.atan2(start, 1.0 - start), math.atan2(end, 1.0 - end)
    angle = first + (last - first) * _unit_nodes(nodes)
    stretch = torch.sin(angle) + torch.cos(angle)
    times = torch.sin(angle) / stretch
    times[0], times[-1] = start, end
    return times, _clenshaw_curtis(nodes) * ((last - first) / 2.0) / stretch.square()


@lru_cache(maxsize=32)
def stretched_rule(nodes: int, end: float, start: float = 0.0) -> tuple[Tensor, Tensor]:
    """The same in the reparametrised time, for stiff fields."""
    time = ReparametrisedTime(WIDTH, NEAR_NOISE)
    first, rate = time.at(start), time.at(end) - time.at(start)
    times, slope = time.time_and_slope(first + rate * _unit_nodes(nodes), rate)
    times[0], times[-1] = start, end
    return times, _clenshaw_curtis(nodes) / 2.0 * slope


def _unit_nodes(nodes: int) -> Tensor:
    """The nodes of [0, 1], rising."""
    theta = math.pi * torch.arange(nodes, dtype=torch.float64) / (nodes - 1)
    return (1.0 - torch.cos(theta)) / 2.0


def stride(nodes: int, of: int = FINEST) -> int:
    """Every which node of the rule with ``of`` nodes belongs to the rule with ``nodes``."""
    return (of - 1) // (nodes - 1)


def integral(values: Tensor, end: float, rule: Rule = angle_rule, start: float = 0.0) -> Tensor:
    """The rule over values (batch, nodes) at its nodes, (batch,).

    >>> times, _ = angle_rule(9, 1.0)
    >>> round(float(integral(times[None] ** 2, 1.0)), 4)  # of t^2 from 0 to 1
    0.3333
    """
    return values @ _weights(rule, values.shape[1], end, start, values.dtype, values.device)


def error_estimate(values: Tensor, end: float, rule: Rule = angle_rule, start: float = 0.0) -> Tensor:
    """Estimated error of `integral` of each row, from values (batch, nodes) at its nodes alone, (batch,)."""
    nodes = values.shape[1]
    values = values.detach()
    rules = [integral(values[:, :: 2**k], end, rule, start) for k in range(3) if (nodes - 1) >> k >= 2]
    apart = [(fine - coarse).abs() for fine, coarse in pairwise(rules)]
    if len(apart) < 2:
        return apart[0] if apart else rules[0].abs()
    difference = torch.maximum(apart[0], ACCIDENT * apart[1])
    jacobian, modes = _expansion(rule, nodes, end, start, values.dtype, values.device)
    coefficients = (values * jacobian) @ modes
    return torch.minimum(difference, (difference * _aliased(coefficients.abs())).sqrt())


def allocate(weights: Sequence[float], budget: int, most: int | None = None) -> list[int]:
    """Whole numbers of probes of sum ``budget``, at least 1 each, nearly proportional to ``weights``.

    ``most`` limits each (orthogonal systems have d); what is left over then is not spent.

    >>> allocate([1.0, 3.0], 8)
    [2, 6]
    """
    limit = budget if most is None else most
    counts = [1] * len(weights)
    for _ in range(budget - len(weights)):
        # the probe that lowers sum w^2/n most (w: weight): exact for whole numbers, unlike rounding
        gains = [w * w / (n * (n + 1)) if n < limit else -1.0 for w, n in zip(weights, counts, strict=True)]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] < 0.0:
            break
        counts[best] += 1
    return counts


def _aliased(coefficients: Tensor) -> Tensor:
    """Integral of the modes beyond the rule, if |coefficients| (batch, nodes) went on as in the upper half."""
    intervals = coefficients.shape[1] - 1
    quarter = intervals // 4
    third = coefficients[:, 2 * quarter + 1 : 3 * quarter + 1].square().mean(1).sqrt()
    fourth = coefficients[:, 3 * quarter + 1 :].square().mean(1).sqrt()
    decay = torch.where(third > 0, fourth / third, 0.0).clamp(max=1.0)
    mode = torch.arange(intervals + 2, 2 * intervals + 1, 2, device=coefficients.device).to(coefficients)
    seen_as = (_mode_integral(mode) - _mode_integral(2 * intervals - mode)).abs()
    ahead = (mode - (intervals - quarter / 2)) / quarter
    return fourth * (decay[:, None] ** ahead * seen_as).square().sum(1).sqrt()


def _mode_integral(mode: Tensor) -> Tensor:
    """int_{-1}^{1} T_k of even k."""
    return 2.0 / (1.0 - mode.square())


@lru_cache(maxsize=64)
def _weights(
    rule: Rule, nodes: int, end: float, start: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """A rule's weights where they are wanted; kept, since a copy makes the host wait for the device."""
    return rule(nodes, end, start)[1].to(device, dtype)


@lru_cache(maxsize=64)
def _expansion(
    rule: Rule, nodes: int, end: float, start: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What turns an integrand into one of the rule's variable, (nodes,), and that into Chebyshev coefficients."""
    jacobian = rule(nodes, end, start)[1] / _clenshaw_curtis(nodes)
    return jacobian.to(device, dtype), _chebyshev(nodes).to(device, dtype)


@lru_cache(maxsize=8)
def _clenshaw_curtis(nodes: int) -> Tensor:
    """Weights of the rule on [-1, 1], (nodes,) float64."""
    intervals = nodes - 1
    theta = math.pi * torch.arange(nodes, dtype=torch.float64) / intervals
    k = torch.arange(1, intervals // 2 + 1, dtype=torch.float64)
    half = torch.where(k == intervals // 2, 1.0, 2.0)
    weights = 1.0 - (half / (4.0 * k.square() - 1.0) * torch.cos(2.0 * theta[:, None] * k)).sum(1)
    weights *= 2.0 / intervals
    weights[0] /= 2.0
    weights[-1] /= 2.0
    return weights


@lru_cache(maxsize=8)
def _chebyshev(nodes: int) -> Tensor:
    """Values at the nodes -> Chebyshev coefficients, (nodes, nodes) float64; the signs of odd modes are lost."""
    j = torch.arange(nodes, dtype=torch.float64)
    matrix = torch.cos(math.pi * torch.outer(j, j) / (nodes - 1)) * (2.0 / (nodes - 1))
    for edge in (0, -1):
        matrix[edge] /= 2.0
        matrix[:, edge] /= 2.0
    return matrix
