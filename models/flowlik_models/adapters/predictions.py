r"""From what a network predicts to the velocity on our clock: ``v = x^ - n^ = c z + k f``, f the network's output.

docs/math.md section 10, with ``z = a x + s n``:

- noise: ``n^ = f``, ``x^ = (z - s f)/a``; data: ``x^ = f``, ``n^ = (z - a f)/s``; score of p_u(z): ``n^ = -s f``;
- v: ``f = a n - s x``;
- velocity: ``f = dz/du = a' x + s' n``: ``x - n`` on the straight path, ``w = n - x`` on its reverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from flowlik_models.adapters.paths import Path

Prediction = Literal["velocity", "noise", "data", "v", "score"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
Two = tuple[Tensor, Tensor]

NEAREST_END = 1e-3
"""How near to t = 0 or 1 a prediction is asked that says nothing of the velocity there."""

LIMITS: dict[str, tuple[float, float]] = {
    "noise": (NEAREST_END, 1.0),
    "score": (NEAREST_END, 1.0 - NEAREST_END),
    "data": (0.0, 1.0 - NEAREST_END),
}
"""Prediction -> the times between which it says what the velocity is: noise nothing at a = 0, data nothing at s = 0."""


STILL_ENDS = 1e-8, 1e-5
"""How near to t = 0 and 1 a velocity is asked whose clock stands still there, or runs infinitely fast."""


def limits(predicts: str, path: Path) -> tuple[float, float]:
    """The times between which the prediction says what the velocity on our clock is.

    >>> from flowlik_models.adapters.paths import as_path
    >>> limits("velocity", as_path("straight"))
    (0.0, 1.0)
    >>> limits("velocity", Path(alpha=lambda u: u**2, sigma=lambda u: 1 - u**2, clock=(0.0, 1.0)))
    (1e-08, 1.0)
    """
    if predicts != "velocity":
        return LIMITS.get(predicts, (0.0, 1.0))
    u = torch.tensor(path.clock, dtype=torch.float64)
    c, k = coefficients(predicts, path, u, *path.scales(u))
    noisy, clean = torch.isfinite(c + k).tolist()
    return 0.0 if noisy else STILL_ENDS[0], 1.0 if clean else 1.0 - STILL_ENDS[1]


def coefficients(predicts: str, path: Path, u: Tensor, a: Tensor, s: Tensor) -> Two:
    """c and k of ``v = c z + k f``, (batch,) float64 each."""
    if predicts == "velocity":
        return _velocity(path, u, a, s)
    return _OF[predicts](a, s)


def _noise(a: Tensor, s: Tensor) -> Two:
    return 1.0 / a, -s / a - 1.0


def _data(a: Tensor, s: Tensor) -> Two:
    return -1.0 / s, 1.0 + a / s


def _score(a: Tensor, s: Tensor) -> Two:
    return 1.0 / a, s * (s / a + 1.0)


def _v(a: Tensor, s: Tensor) -> Two:
    size = a.square() + s.square()
    return (a - s) / size, -(a + s) / size


_OF: dict[str, Callable[[Tensor, Tensor], Two]] = {"noise": _noise, "data": _data, "score": _score, "v": _v}


def _velocity(path: Path, u: Tensor, a: Tensor, s: Tensor) -> Two:
    if path.velocity_is_w:
        return torch.zeros_like(a), -torch.ones_like(a)
    rate_a, rate_s = _rates(path, u)
    area = a * rate_s - rate_a * s
    return (rate_a + rate_s) / area, -(a + s) / area


def _rates(path: Path, u: Tensor) -> Two:
    """da/du and ds/du, (batch,)."""
    with torch.enable_grad():
        at = u.detach().requires_grad_()
        rates = []
        for scale in (path.alpha, path.sigma):
            value = scale(at)
            if value.requires_grad:
                (rate,) = torch.autograd.grad(value.sum(), at)
            else:  # constant
                rate = torch.zeros_like(u)
            rates.append(rate)
    return rates[0], rates[1]
