"""On-policy imitation distillation of policies (pi-ID of arXiv 2510.14974; docs/math.md section 6).

From an anchor the policy of the present network, held fixed, is followed over its segment; at points on that path the
policy's velocity, now with graph, regresses the teacher's. So the network learns from the places its own policies go
to. With ``divergence`` the policy's divergence regresses the teacher's as well.

Cost of a step: one forward and backward of the network for the batch, ``matches`` evaluations of the teacher a row,
and network-free evaluations of the policy. Data-free anchors cost one forward a segment more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flowlik_models.networks.policy import PolicyHead
from flowlik_models.objectives.batch import TeacherField

# matching times are uniform in logit(t) this far from both ends, as the estimator's substeps
_LOGIT_EPS = 1e-3
_FIRST = 0.05  # before this the field hardly changes
_SMALLEST = 0.02  # weights treat what happens closer to the data than this alike


@dataclass(frozen=True, kw_only=True)
class Imitation:
    """How policies are trained.

    ``head``: what the network answers with. ``segments``: numbers of equal segments, one drawn a row. ``matches``:
    random times M a row at which the policy is matched, ``substeps``: Heun steps before each of them. ``spread``:
    every second match is moved off the path by noise of this many times 1 - t (0: none is, as published); without it
    nothing determines the policy's slope across the path, on which the frozen likelihood rests. ``dropout``:
    probability with which a component is left out, 0.05 to 0.1 as published; the fit then stays a compromise between
    mixtures with and without it (docs/training-ablations.md). ``noise_end``: share of rows anchored at the noise end
    of their segment, for sampling; the others at the data end, for likelihoods. ``data_free``: anchors are where the
    network's own policies lead from the noise, instead of points on the path of the data. ``divergence``: weight of
    the error of the divergence (0: not matched). ``eps``: the data end of the network lies at t = 1 - eps.
    """

    head: PolicyHead = field(default_factory=PolicyHead)
    segments: tuple[int, ...] = (1,)
    matches: int = 6
    substeps: int = 2
    spread: float = 1.0
    dropout: float = 0.0
    noise_end: float = 0.2
    data_free: bool = False
    divergence: float = 0.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        """Raises ValueError for options out of range."""
        if not self.segments or min(self.segments) < 1:
            raise ValueError(f"segments must be numbers from 1 on, got {self.segments}")
        if min(self.matches, self.substeps) < 1:
            raise ValueError("matches and substeps must be at least 1")
        if not 0 <= self.dropout < 1 or not 0 <= self.noise_end <= 1:
            raise ValueError("dropout is a share below 1, noise_end a share")
        if self.divergence < 0 or (self.divergence and self.head.kind != "mixture"):
            raise ValueError("divergence is a weight, and only mixtures have a divergence to match")


def segment_ends(
    n: int, end: float, imitation: Imitation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Anchor time and the other end of a random segment of each row, (n,) each: that of a time uniform in logit(t)
    from 0.05 on, as matching times are, so that the segment next to the data comes most often."""
    end = min(end, 1 - imitation.eps)
    device = generator.device
    counts = torch.tensor(imitation.segments, device=device)[
        torch.randint(len(imitation.segments), (n,), generator=generator, device=device)
    ]
    first, last = (math.log(t / (1 - t)) for t in (_FIRST, 1 - _LOGIT_EPS))
    somewhere = (first + (last - first) * torch.rand(n, generator=generator, device=device)).sigmoid()
    index = (somewhere * counts).long()
    low, high = end * index / counts, end * (index + 1) / counts
    from_noise = torch.rand(n, generator=generator, device=device) < imitation.noise_end
    return torch.where(from_noise, low, high), torch.where(from_noise, high, low)


def imitation_loss(
    network: Any,
    x: Tensor,
    t: Tensor,
    s: Tensor,
    teacher: TeacherField,
    imitation: Imitation,
    generator: torch.Generator,
    *,
    relative: float | None = None,
) -> Tensor:
    """The loss of anchors x (batch, *event) at times t for segments to s, (batch,) each: a scalar.

    ``teacher`` gives velocity and, where divergences are matched, divergence at points (x, t), without graph.
    ``relative``: targets whose root mean square exceeds it count relative to their size.
    """
    if imitation.data_free:
        x = _own_points(
            network, torch.randn(x.shape, generator=generator, device=generator.device).to(x), t, imitation
        )
    policy = network.policy(x, t, s).thinned(imitation.dropout, generator)
    times = _matching_times(t, s, imitation.matches, generator)
    with torch.no_grad():
        points = _states(policy.detached(), x, t, times, imitation.substeps)
        points = _moved_off_path(points.flatten(0, 1), times.flatten(), imitation.spread, generator)
    again = torch.arange(len(x), device=x.device).repeat(len(times))
    time = times.flatten()
    velocity, divergence = policy.rows(again).velocity_and_divergence(points, time)
    taught = tuple(part.detach() for part in teacher(points, time))
    assert velocity.shape == taught[0].shape
    scale = time * (1 - time)  # of steps in logit(t)
    error = (velocity - taught[0]).flatten(1).square().mean(1) * (scale / (1 - time + _SMALLEST)).square()
    if imitation.divergence:
        assert divergence.shape == taught[1].shape == time.shape
        wrong = ((divergence - taught[1]) / x[0].numel() * scale).square()
        error = error + imitation.divergence * wrong
    if relative is not None:
        error = error / (1 + taught[0].flatten(1).square().mean(1) / relative**2)
    loss: Tensor = error.mean()
    return loss


def _logits(t: Tensor) -> Tensor:
    return t.clamp(_LOGIT_EPS, 1 - _LOGIT_EPS).logit()


def _matching_times(t: Tensor, s: Tensor, matches: int, generator: torch.Generator) -> Tensor:
    """Times (matches, batch) from t towards s, one in each of equal parts in logit(t)."""
    unit = torch.rand(matches, len(t), generator=generator, device=generator.device).to(t)
    share = (torch.arange(matches, device=t.device)[:, None] + unit) / matches
    first, last = _logits(t), _logits(s)
    return (first + share * (last - first)).sigmoid()


def _states(policy: Any, x: Tensor, t: Tensor, times: Tensor, substeps: int) -> Tensor:
    """The policy's path at the times (M, batch), (M, batch, *event), by Heun steps in logit(t) between them."""
    states, before = [], _logits(t)
    for time in times:
        now = _logits(time)
        h = (now - before) / substeps
        for j in range(substeps):
            x = _heun(policy, x, before + j * h, h)
        states.append(x)
        before = now
    return torch.stack(states)


def _moved_off_path(x: Tensor, t: Tensor, spread: float, generator: torch.Generator) -> Tensor:
    """Every second point moved by noise of standard deviation ``spread (1 - t)``, the scale on which p_t is smooth."""
    noise = torch.randn(x.shape, generator=generator, device=generator.device).to(x)
    moved = spread * (1 - t) * (torch.arange(len(x), device=x.device) % 2)
    return x + _column(moved, x) * noise


def _heun(policy: Any, x: Tensor, logit: Tensor, h: Tensor) -> Tensor:
    """One Heun step of length h (batch,) in logit(t)."""

    def slope(y: Tensor, logit: Tensor) -> Tensor:
        time = logit.sigmoid()
        velocity: Tensor = policy.velocity(y, time)
        return _column(time * (1 - time), y) * velocity

    k1 = slope(x, logit)
    k2 = slope(x + _column(h, x) * k1, logit + h)
    return x + 0.5 * _column(h, x) * (k1 + k2)


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *([1] * (like.ndim - 1)))


@torch.no_grad()
def _own_points(network: Any, x: Tensor, t: Tensor, imitation: Imitation) -> Tensor:
    """Where the network's own policies lead from noise x at t = 0 by the time t of each row."""
    count = max(imitation.segments)
    edges = (1 - imitation.eps) * torch.arange(count + 1, device=x.device, dtype=x.dtype) / count
    points = x
    for low, high in pairwise(edges):
        start, end = low.expand(len(x)), high.expand(len(x))
        policy = network.policy(x, start, end)
        x = _states(policy, x, start, end[None], imitation.substeps * imitation.matches)[0]
        points = torch.where(_column(t >= high - 1e-6, x), x, points)
    return points
