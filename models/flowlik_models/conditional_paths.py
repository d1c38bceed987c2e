"""Conditional paths and what a field regresses on them: all that differs between frameworks (docs/math.md section 7).

A path mixes a data point x_1, noise n and, for paired couplings, the point x_0 that the data point belongs to,

    x_t = a x_1 + c x_0 + g n,        f_cond = alpha x_1 + beta x_0 + gamma n,

and a model of the framework is ``f(x_t, t) = E[f_cond | x_t]``, given x_0 too where there is one. Time runs from noise
(or x_0) at t = 0 to data at t = 1. Nothing else of flow matching (arXiv 2210.02747), variance-preserving diffusion
(arXiv 2011.13456), bridge matching (arXiv 2303.16852, conditioned on x_0 as in 2311.06978) or stochastic interpolants
(arXiv 2303.08797) enters training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

PathName = Literal["flow-matching", "noise", "data", "bridge", "interpolant"]
Three = tuple[Tensor, Tensor, Tensor]
_END = 5e-3  # paths whose target is singular at an end are trained and asked this far from it


class ConditionalPath(Protocol):
    """A framework: coefficients of the path and of its target, (batch,) each, at times t (batch,).

    ``paired``: x_0 is given, and the model is conditioned on it.
    """

    @property
    def paired(self) -> bool:
        """Whether there is an x_0."""
        ...

    def point(self, t: Tensor) -> Three:
        """a, c, g."""
        ...

    def target(self, t: Tensor) -> Three:
        """alpha, beta, gamma."""
        ...

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor] | None:
        """da/dt and dg/dt, where an ODE carries N(0, I) along the path; None where it starts from a point x_0."""
        ...


@dataclass(frozen=True)
class FlowMatching:
    """The straight path; the target is its velocity ``x_1 - n``."""

    paired = False

    def point(self, t: Tensor) -> Three:
        """``x_t = t x_1 + (1 - t) n``."""
        return t, torch.zeros_like(t), 1 - t

    def target(self, t: Tensor) -> Three:
        """``x_1 - n``."""
        return torch.ones_like(t), torch.zeros_like(t), -torch.ones_like(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """1 and -1."""
        return torch.ones_like(t), -torch.ones_like(t)


@dataclass(frozen=True)
class VariancePreserving:
    """Diffusion with ``a^2 + g^2 = 1``, the angle linear in t; the target is the noise or the data point."""

    predicts: Literal["noise", "data"] = "noise"
    paired = False

    def point(self, t: Tensor) -> Three:
        """``x_t = sin(pi t/2) x_1 + cos(pi t/2) n``."""
        angle = math.pi / 2 * t.clamp(_END, 1 - _END)
        return angle.sin(), torch.zeros_like(t), angle.cos()

    def target(self, t: Tensor) -> Three:
        """``n`` or ``x_1``."""
        nothing, one = torch.zeros_like(t), torch.ones_like(t)
        return (nothing, nothing, one) if self.predicts == "noise" else (one, nothing, nothing)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``pi/2 cos(pi t/2)`` and ``-pi/2 sin(pi t/2)``."""
        a, _, g = self.point(t)
        return math.pi / 2 * g, -math.pi / 2 * a


@dataclass(frozen=True)
class BridgeMatching:
    """A Brownian bridge from x_0 to x_1; the target is its drift ``(x_1 - x_t)/(1 - t)``."""

    noise: float = 1.0
    paired = True

    def point(self, t: Tensor) -> Three:
        """``x_t = t x_1 + (1 - t) x_0 + noise sqrt(t (1 - t)) n``."""
        t = t.clamp(_END, 1 - _END)
        return t, 1 - t, self.noise * (t * (1 - t)).sqrt()

    def target(self, t: Tensor) -> Three:
        """``x_1 - x_0 - noise sqrt(t/(1 - t)) n``."""
        t = t.clamp(_END, 1 - _END)
        return torch.ones_like(t), -torch.ones_like(t), -self.noise * (t / (1 - t)).sqrt()

    def rates(self, t: Tensor) -> None:
        """The bridge is a diffusion that starts from a point."""


@dataclass(frozen=True)
class Interpolant:
    """A stochastic interpolant with ``g = sqrt(2 t (1 - t))``; the target is its velocity."""

    paired = True

    def point(self, t: Tensor) -> Three:
        """``x_t = t x_1 + (1 - t) x_0 + sqrt(2 t (1 - t)) n``."""
        t = t.clamp(_END, 1 - _END)
        return t, 1 - t, (2 * t * (1 - t)).sqrt()

    def target(self, t: Tensor) -> Three:
        """``x_1 - x_0 + (1 - 2 t)/g n``."""
        t = t.clamp(_END, 1 - _END)
        return torch.ones_like(t), -torch.ones_like(t), (1 - 2 * t) / (2 * t * (1 - t)).sqrt()

    def rates(self, t: Tensor) -> None:
        """Its ODE would start from a point."""


PATHS: dict[PathName, ConditionalPath] = {
    "flow-matching": FlowMatching(),
    "noise": VariancePreserving("noise"),
    "data": VariancePreserving("data"),
    "bridge": BridgeMatching(),
    "interpolant": Interpolant(),
}


def column(values: Tensor, like: Tensor) -> Tensor:
    """(batch,) values that broadcast against ``like`` (batch, *event)."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def mixed(coefficients: Three, x1: Tensor, x0: Tensor | None, noise: Tensor) -> Tensor:
    """The combination of x_1, x_0 (None: there is none) and noise, (batch, *event)."""
    at_data, at_start, at_noise = (column(part, x1) for part in coefficients)
    made = at_data * x1 + at_noise * noise
    return made if x0 is None else made + at_start * x0


def weight(path: ConditionalPath, t: Tensor) -> Tensor:
    """``(a^2 + g^2)/(a gamma - g alpha)^2``, (batch,): weighs errors of the data point alike in every framework."""
    (a, _, g), (alpha, _, gamma) = path.point(t), path.target(t)
    return (a.square() + g.square()) / (a * gamma - g * alpha).square()


def ends(
    path: ConditionalPath, x: Tensor, t: Tensor, prediction: Tensor, x0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The data point and the noise that x_t = x and the predicted target imply, (batch, *event) each."""
    (a, c, g), (alpha, beta, gamma) = path.point(t), path.target(t)
    if x0 is not None:
        x, prediction = x - column(c, x) * x0, prediction - column(beta, x) * x0
    determinant = a * gamma - g * alpha
    data = column(gamma / determinant, x) * x - column(g / determinant, x) * prediction
    return data, column(a / determinant, x) * prediction - column(alpha / determinant, x) * x
