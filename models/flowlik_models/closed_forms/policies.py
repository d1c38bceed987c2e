r"""Closed-form fields that one network call leaves behind for a whole segment of time (pi-Flow, arXiv 2510.14974).

A policy is evaluated without the network: `velocity`, `divergence`, or both from one evaluation. Three kinds:

- `MixturePolicy` (GMFlow): the field of a mixture of isotropic Gaussians over the data point, one per position or one
  over the whole vector, in un-anchored form (a prior, valid in both directions) or anchored at the point where the
  network was asked (a posterior there). Its divergence is a closed form (docs/math.md section 6).
- `PredictionPolicy` (DX): predictions of the data point on a grid of times. Its divergence is ``-d/(1 - t)`` whatever
  x is, so on its own it says nothing about a density.
- `FieldPolicy`: a closed form's own field, the exact policy.

Cost: one evaluation is O(d K) arithmetic a sample and no network evaluation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

Layout = Literal["whole", "position"]
_CLOSEST = 1e-6  # 1 - t is never taken smaller: the mixture's field has a limit at t = 1

_CENTRED = (
    1e-2  # anchored form: differences of (t/(1 - t))^2 well above this are centred on the point they imply
)


class _Tensors:
    """What policies that hold tensors share."""

    def detached(self) -> Self:
        """The same policy without graph."""
        return self._mapped(lambda tensor: tensor.detach())

    def rows(self, index: Tensor | slice) -> Self:
        """The policy of some of the samples; ``index`` selects along the batch."""
        return self._mapped(lambda tensor: tensor[index])

    def _mapped(self, change: Any) -> Self:
        found = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        tensors = {name: change(value) for name, value in found.items() if isinstance(value, Tensor)}
        return replace(self, **tensors)  # type: ignore[type-var]


@dataclass(frozen=True)
class Positions:
    """How an event splits into positions of ``channels`` coordinates each.

    ``whole``: one position that holds all d coordinates. ``position``: vectors have d positions of one coordinate,
    images (channels, height, width) one for every pixel. ``basis`` (d, d; orthonormal columns) turns vectors into
    other coordinates first; a rotation changes no divergence.
    """

    event_shape: tuple[int, ...]
    layout: Layout
    basis: Tensor | None = None

    @property
    def channels(self) -> int:
        """Coordinates of one position, C."""
        if self.layout == "whole":
            return math.prod(self.event_shape)
        return self.event_shape[0] if len(self.event_shape) > 1 else 1

    @property
    def count(self) -> int:
        """Number of positions, P."""
        return math.prod(self.event_shape) // self.channels

    def split(self, x: Tensor) -> Tensor:
        """(batch, *event) as (batch, P, C)."""
        flat = x.flatten(1)
        if self.basis is not None:
            flat = flat @ self.basis.to(flat)
        if self.layout == "position" and len(self.event_shape) > 1:
            return flat.view(len(x), self.channels, self.count).transpose(1, 2)
        return flat.view(len(x), self.count, self.channels)

    def join(self, y: Tensor) -> Tensor:
        """(batch, P, C) as (batch, *event)."""
        if self.layout == "position" and len(self.event_shape) > 1:
            y = y.transpose(1, 2)
        flat = y.reshape(len(y), -1)
        if self.basis is not None:
            flat = flat @ self.basis.to(flat).T
        return flat.view(len(y), *self.event_shape)


@dataclass(frozen=True)
class MixturePolicy(_Tensors):
    """A mixture of K isotropic Gaussians over the data point, at every position.

    ``log_weights`` (batch, P, K), any constant apart; ``means`` (batch, P, K, C); ``variances`` (batch, P, K), or
    (batch, P, 1) where components share one. Un-anchored they are those of the data point itself. With ``anchor``
    (batch, *event) and ``anchor_time`` (batch,) they are those of the data point given the anchor, and change with t
    by what the path between tells.
    """

    positions: Positions
    log_weights: Tensor
    means: Tensor
    variances: Tensor
    anchor: Tensor | None = None
    anchor_time: Tensor | None = None

    def __post_init__(self) -> None:
        """Raises ValueError where shapes do not fit."""
        batch, count, components = self.log_weights.shape
        expected = (batch, count, components, self.positions.channels)
        if count != self.positions.count or self.means.shape != expected:
            raise ValueError(
                f"log_weights {tuple(self.log_weights.shape)} and means {tuple(self.means.shape)}"
            )
        if self.variances.shape not in ((batch, count, components), (batch, count, 1)):
            raise ValueError(f"variances have shape {tuple(self.variances.shape)}")
        if (self.anchor is None) != (self.anchor_time is None):
            raise ValueError("an anchor needs its time, and a time its anchor")

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(E[x_1 | x_t = x] - x)/(1 - t), (batch, *event)."""
        return self.positions.join(self._terms(x, t)[0])

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """Divergence of the velocity at fixed policy, (batch,)."""
        return self.velocity_and_divergence(x, t)[1]

    def velocity_and_divergence(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The pair from one evaluation: (batch, *event) and (batch,)."""
        velocity, each, r, rates = self._terms(x, t)
        spread = (each - velocity[:, :, None]).square().sum(3)
        growth = (t / (1 - t).clamp_min(_CLOSEST))[:, None, None]
        local = self.positions.channels * rates + growth * spread
        return self.positions.join(velocity), (r * local).sum((1, 2))

    def _terms(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Velocity (batch, P, C); that of each component (batch, P, K, C), its probability (batch, P, K) and slope."""
        y, time = self.positions.split(x)[:, :, None], t[:, None, None]
        logits, each, rates = self._prior(y, time) if self.anchor is None else self._posterior(y, time)
        r = (self.log_weights + logits).softmax(2)
        return (r[..., None] * each).sum(2), each, r, rates

    def _prior(self, y: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log N(x_t; t mu, (1 - t)^2 + t^2 s^2) up to a constant, and each component's velocity and its slope."""
        noise = 1 - time
        width = noise.square() + time.square() * self.variances
        offset = y - time[..., None] * self.means
        distance = offset.square().sum(3) / width
        rates = (time * self.variances - noise) / width
        return (
            -0.5 * (distance + self.positions.channels * width.log()),
            self.means + rates[..., None] * offset,
            rates,
        )

    def _posterior(self, y: Tensor, time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same from the anchored parameters, by what (x, t) adds to (anchor, anchor time) in natural parameters.

        Everything is counted from the point that the difference implies, where the sums of squares do not cancel.
        """
        assert self.anchor is not None
        assert self.anchor_time is not None
        past = self.anchor_time[:, None, None]
        noise, was = (1 - time).clamp_min(_CLOSEST), (1 - past).clamp_min(_CLOSEST)
        zeta = (time / noise).square() - (past / was).square()
        nu = (time / noise.square())[..., None] * y
        nu = nu - (past / was.square())[..., None] * self.positions.split(self.anchor)[:, :, None]
        centre = nu * (zeta / (zeta.square() + _CENTRED**2))[..., None]
        means, nu = self.means - centre, nu - zeta[..., None] * centre
        grown = 1 + self.variances * zeta
        inner = (means * nu).sum(3) + 0.5 * (
            self.variances * nu.square().sum(3) - zeta * means.square().sum(3)
        )
        found = centre + (means + self.variances[..., None] * nu) / grown[..., None]
        rates = (time / noise.square() * self.variances / grown - 1) / noise
        logits = inner / grown - 0.5 * self.positions.channels * grown.log()
        return logits, (found - y) / noise[..., None], rates

    def usable(self, s: Tensor) -> Tensor:
        """(batch,) True where every parameter is finite and every variance positive, at the policy's start and at the
        end s (batch,) of its segment."""
        fine = torch.isfinite(self.log_weights).all(2) & torch.isfinite(self.means).all(3).all(2)
        widths = self.variances
        if self.anchor_time is not None:
            zeta = (s / (1 - s).clamp_min(_CLOSEST)).square()
            past = (self.anchor_time / (1 - self.anchor_time).clamp_min(_CLOSEST)).square()
            fine = fine & (1 + widths * (zeta - past)[:, None, None] > 0).all(2)
        return (fine & (torch.isfinite(widths) & (widths > 0)).all(2)).all(1)

    def thinned(self, share: float, generator: torch.Generator) -> MixturePolicy:
        """Every component of a sample left out with probability ``share``, the same at all positions; never all."""
        if share == 0:
            return self
        batch, _, components = self.log_weights.shape
        score = torch.rand(batch, components, generator=generator, device=generator.device)
        out = (score < share) & (score < score.amax(1, keepdim=True))
        gone = out.to(self.log_weights.device)[:, None].expand_as(self.log_weights)
        return replace(self, log_weights=self.log_weights.masked_fill(gone, -math.inf))


@dataclass(frozen=True)
class PredictionPolicy(_Tensors):
    """Predictions of the data point at N equally spaced times from ``start`` to ``end``, linear in t between.

    ``predictions`` (batch, N, *event); ``start`` and ``end`` (batch,). Velocity ``(x_1(t) - x)/(1 - t)``.
    """

    predictions: Tensor
    start: Tensor
    end: Tensor

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """(x_1(t) - x)/(1 - t), (batch, *event)."""
        return self.velocity_and_divergence(x, t)[0]

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """-d/(1 - t), (batch,), whatever x is."""
        return -x[0].numel() / (1 - t).clamp_min(_CLOSEST)

    def velocity_and_divergence(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The pair, (batch, *event) and (batch,)."""
        last = self.predictions.shape[1] - 1
        place = ((t - self.start) / (self.end - self.start)).clamp(0, 1) * last
        nodes = torch.arange(last + 1, dtype=t.dtype, device=t.device)
        weights = (1 - (place[:, None] - nodes).abs()).clamp_min(0)
        x1 = (weights[:, None] @ self.predictions.flatten(2))[:, 0].view_as(x)
        noise = (1 - t).clamp_min(_CLOSEST).reshape(-1, *([1] * (x.ndim - 1)))
        return (x1 - x) / noise, self.divergence(x, t)

    def usable(self, s: Tensor) -> Tensor:
        """(batch,) True where every prediction is finite."""
        return torch.isfinite(self.predictions).flatten(1).all(1)

    def thinned(self, share: float, generator: torch.Generator) -> PredictionPolicy:
        """The policy itself: it has no components."""
        return self


@dataclass(frozen=True)
class FieldPolicy:
    """A field with a closed-form divergence as a policy valid everywhere, whatever point it was asked at."""

    field: Any

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """The field's velocity, (batch, *event)."""
        velocity: Tensor = self.field.velocity(x, t)
        return velocity

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """The field's divergence, (batch,)."""
        divergence: Tensor = self.field.divergence(x, t)
        return divergence

    def velocity_and_divergence(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The pair."""
        pair: tuple[Tensor, Tensor] = self.field.velocity_and_divergence(x, t)
        return pair
