r"""Gaussian paths ``z_u = a(u) x + s(u) n`` in clocks of their own, and where our time t = a/(a + s) is on them.

docs/math.md section 10. u runs between the two ends of ``clock``, the noisiest first; either may be the larger. Scales
are functions of u (batch,) float64. Named paths: straight flow matching and its reverse, the variance-preserving
diffusion (linear or cosine beta, arXiv 2011.13456 and 2102.09672), the cosine angle, DDPM's integer steps (arXiv
2006.11239), EDM's sigma (arXiv 2206.00364) and the variance-exploding diffusion, whose networks are asked at sigma.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowlik_models.names import unknown

Scale = Callable[[Tensor], Tensor]

MOST = 45.0
"""|log(a/s)| beyond which an end counts as pure noise or pure data."""

NODES = 2048
"""Of the table on each half of the clock; they are graded towards both ends, where scales may vanish as roots do."""

NEAREST = 1e-12

ROUNDING = 1e-6
"""Of log(a/s): between nodes that are all but one, scales that hardly change may seem to fall by less."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Path:
    """Scales ``alpha`` and ``sigma``, and the ``clock`` (u at the noisiest end, u at the cleanest).

    ``label`` turns u into what the network is asked at; ``steps``, u at which scales were given, with log(a/s) linear
    between them; ``inverse``, u of t where a formula says it. ``velocity_is_w``: what is called velocity is ``n - x``
    whatever the clock is.
    """

    alpha: Scale
    sigma: Scale
    clock: tuple[float, float]
    label: Scale | None = None
    steps: Tensor | None = None
    inverse: Scale | None = None
    velocity_is_w: bool = False

    def scales(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma, (batch,) float64."""
        a, s = self.alpha(u), self.sigma(u)
        for name, value in (("alpha", a), ("sigma", s)):
            if not isinstance(value, Tensor) or value.shape != u.shape:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"path: {name} of u {tuple(u.shape)} must be a tensor of that shape, got {got}"
                )
        return a.double(), s.double()

    def log_ratio(self, u: Tensor) -> Tensor:
        """log(a/s), within `MOST`."""
        a, s = self.scales(u)
        return (a.log() - s.log()).clamp(-MOST, MOST)


class Clock:
    """u at our times t, and both ends on our clock: a table of log(a/s) and one Newton step in float64.

    Raises:
        ValueError: scales that are negative or not finite, or log(a/s) that does not rise from the noisy end to the
            clean one.
    """

    def __init__(self, path: Path, noisy: float = 0.0, clean: float = 1.0) -> None:
        """``noisy`` and ``clean``: no end lies beyond these times."""
        self.path = path
        first, last = (float(u) for u in path.clock)
        if not (math.isfinite(first) and math.isfinite(last)) or first == last:
            raise ValueError(
                f"path: clock must be two different times (noisiest, cleanest), got {path.clock}"
            )
        self._u = _graded(first, last) if path.steps is None else path.steps.double()
        if self._u[0] != first:
            self._u = self._u.flip(0)
        a, s = path.scales(self._u)
        if not bool((torch.isfinite(a) & torch.isfinite(s) & (a >= 0) & (s >= 0) & (a + s > 0)).all()):
            raise ValueError(
                f"path: alpha and sigma must be finite and not negative on the clock {path.clock}"
            )
        ratio = path.log_ratio(self._u)
        highest = torch.cummax(ratio, 0).values
        falls = ratio < highest - ROUNDING
        if bool(falls.any()) or not ratio[-1] > ratio[0]:
            where = float(self._u[falls][0]) if bool(falls.any()) else last
            raise ValueError(
                f"path: alpha/sigma must rise from the noisy end u = {first:g} to the clean one u = {last:g}, and does "
                f"not near u = {where:g}; give clock=(u at the noisiest end, u at the cleanest)"
            )
        rises = torch.cat([torch.ones(1, dtype=torch.bool), ratio[1:] > highest[:-1]])
        self._u, self._ratio = self._u[rises], ratio[rises]
        ends = (a / (a + s))[[0, -1]].tolist()
        self.noisy_end, self.clean_end = max(ends[0], noisy), min(ends[1], clean)

    def at(self, t: Tensor) -> Tensor:
        """u at t (batch,) float64, t being clamped between the ends; differentiable in t."""
        t = t.double().clamp(self.noisy_end, self.clean_end)
        if self.path.inverse is not None:
            return self.path.inverse(t)
        wanted = (t.log() - torch.log1p(-t)).clamp(-MOST, MOST)
        with torch.no_grad():
            u, slope = self._tabled(wanted.detach())
            if self.path.steps is None:
                found = self.path.log_ratio(u)
                return_to = self._inside(u - (found - wanted.detach()) / slope)
            else:
                return_to = u
        return return_to + (wanted - wanted.detach()) / slope

    def _tabled(self, ratio: Tensor) -> tuple[Tensor, Tensor]:
        """u by the table and d log(a/s)/du there."""
        table, nodes = (values.to(ratio.device, non_blocking=True) for values in (self._ratio, self._u))
        right = torch.searchsorted(table, ratio.contiguous()).clamp(1, len(table) - 1)
        low, high = table[right - 1], table[right]
        share = ((ratio - low) / (high - low)).nan_to_num(0.0).clamp(0.0, 1.0)
        width = nodes[right] - nodes[right - 1]
        u = nodes[right - 1] + share * width
        slope = (high - low) / width
        if self.path.steps is None:
            nudge = 1e-3 * width
            ahead, behind = self._inside(u + nudge), self._inside(u - nudge)
            own = (self.path.log_ratio(ahead) - self.path.log_ratio(behind)) / (ahead - behind)
            slope = torch.where(torch.isfinite(own) & (own * slope > 0), own, slope)
        return u, torch.where(slope == 0, torch.full_like(slope, math.inf), slope)

    def _inside(self, u: Tensor) -> Tensor:
        return u.clamp(*sorted((float(self._u[0]), float(self._u[-1]))))


def _graded(first: float, last: float) -> Tensor:
    """Nodes from first to last whose distances to the nearer end grow by one factor."""
    half = torch.logspace(math.log10(NEAREST), math.log10(0.5), NODES, dtype=torch.float64)
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    share = torch.cat([zero, half, (1.0 - half[:-1]).flip(0), one])
    nodes = first + (last - first) * share
    nodes[0], nodes[-1] = first, last
    return nodes[torch.cat([torch.ones(1, dtype=torch.bool), nodes.diff() != 0])]


# --- by name ---


def straight() -> Path:
    """``z = u x + (1 - u) n``: flow matching with noise at u = 0."""
    return Path(alpha=lambda u: u, sigma=lambda u: 1.0 - u, clock=(0.0, 1.0), inverse=lambda t: t)


def reverse(scale: float = 1.0) -> Path:
    """``z = (1 - u) x + u n``: flow matching with data at u = 0; networks are asked at ``scale * u``."""
    label: Scale | None = None if scale == 1.0 else (lambda u: scale * u)
    return Path(
        alpha=lambda u: 1.0 - u,
        sigma=lambda u: u,
        clock=(1.0, 0.0),
        inverse=lambda t: 1.0 - t,
        label=label,
        velocity_is_w=True,
    )


def vp(
    beta: Literal["linear", "cosine"] = "linear",
    beta_min: float = 0.1,
    beta_max: float = 20.0,
    first: float = 1e-5,
) -> Path:
    """The variance-preserving diffusion in u from 1 (noise) to ``first``; the network is asked at u itself."""
    if beta not in ("linear", "cosine"):
        raise ValueError(unknown("beta", beta, ("linear", "cosine")))

    def angle(u: Tensor) -> Tensor:
        return (u + 0.008) / 1.008 * math.pi / 2

    def log_alpha(u: Tensor) -> Tensor:
        if beta == "linear":
            return -0.25 * (beta_max - beta_min) * u.square() - 0.5 * beta_min * u
        start = math.log(math.cos(0.008 / 1.008 * math.pi / 2))
        return angle(u).cos().clamp(min=0.0).log() - start

    return Path(
        alpha=lambda u: log_alpha(u).exp(),
        sigma=lambda u: (-torch.expm1(2.0 * log_alpha(u))).clamp(min=0.0).sqrt(),
        clock=(1.0, first),
    )


def cosine() -> Path:
    """``z = cos(pi u/2) x + sin(pi u/2) n``, data at u = 0."""
    return Path(
        alpha=lambda u: torch.sin(math.pi / 2 * (1.0 - u)),
        sigma=lambda u: torch.sin(math.pi / 2 * u),
        clock=(1.0, 0.0),
    )


def edm(sigma_min: float = 0.002, sigma_max: float = 80.0) -> Path:
    """``z = x + u n``; the network is asked at u, which is sigma."""
    if not 0.0 < sigma_min < sigma_max:
        raise ValueError(
            f"sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}"
        )
    return Path(
        alpha=torch.ones_like,
        sigma=lambda u: u,
        clock=(sigma_max, sigma_min),
        inverse=lambda t: (1.0 - t) / t,
    )


def ve(sigma_min: float = 0.01, sigma_max: float = 50.0) -> Path:
    """As `edm`, with the ends of the variance-exploding diffusion."""
    return edm(sigma_min, sigma_max)


def ddpm(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Path:
    """DDPM's steps 0 .. ``steps`` - 1 with linear betas; the network is asked at fractional steps between them."""
    betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
    return from_steps(torch.cumprod(1.0 - betas, 0))


def from_steps(alphas_cumprod: Tensor | Sequence[float]) -> Path:
    """Integer steps with ``a^2`` given at each, ``s^2 = 1 - a^2``, and log(a/s) linear between them.

    Raises:
        ValueError: fewer than two steps, or values outside [0, 1].
    """
    squares = torch.as_tensor(alphas_cumprod).detach().cpu().double().flatten()
    if len(squares) < 2 or not bool(((squares >= 0) & (squares <= 1)).all()):
        raise ValueError(f"steps need at least 2 values of alphas_cumprod in [0, 1], got {len(squares)}")
    ratio = (0.5 * (squares.log() - torch.log1p(-squares))).clamp(-MOST, MOST)

    def twice(u: Tensor) -> Tensor:
        table = ratio.to(u.device, non_blocking=True)
        low = u.detach().floor().long().clamp(0, len(table) - 2)
        return 2.0 * (table[low] + (u - low) * (table[low + 1] - table[low]))

    return Path(
        alpha=lambda u: torch.sigmoid(twice(u)).sqrt(),
        sigma=lambda u: torch.sigmoid(-twice(u)).sqrt(),
        clock=(float(len(squares) - 1), 0.0),
        steps=torch.arange(len(squares), dtype=torch.float64),
    )


NAMED: dict[str, Callable[..., Path]] = {
    "straight": straight,
    "reversed": reverse,
    "vp": vp,
    "cosine": cosine,
    "ddpm": ddpm,
    "edm": edm,
    "ve": ve,
}


def as_path(path: Any) -> Path:
    """A path from its name, from ``(alpha, sigma, clock)``, or from a scheduler of diffusers or flow_matching.

    Raises:
        ValueError: an unknown name, or anything else.

    >>> as_path("edm").clock
    (80.0, 0.002)
    >>> Clock(as_path("ddpm")).clean_end > 0.99
    True
    """
    if isinstance(path, Path):
        return path
    if isinstance(path, str):
        if path not in NAMED:
            raise ValueError(unknown("path", path, NAMED))
        return NAMED[path]()
    if isinstance(path, (tuple, list)) and len(path) == 3 and callable(path[0]) and callable(path[1]):
        first, last = path[2]
        return Path(alpha=path[0], sigma=path[1], clock=(float(first), float(last)))
    if (found := _scheduler(path)) is not None:
        return found
    raise ValueError(
        f"path must be one of {', '.join(NAMED)}, (alpha, sigma, clock) or a scheduler, got {type(path).__name__}"
    )


def prediction_of(scheduler: Any) -> str | None:
    """What a diffusers scheduler says that its network predicts; None where it says nothing known.

    >>> prediction_of("ddpm") is None
    True
    """
    names = {"epsilon": "noise", "sample": "data", "v_prediction": "v", "flow_prediction": "velocity"}
    said = getattr(getattr(scheduler, "config", None), "prediction_type", None)
    return names.get(said) if isinstance(said, str) else None


def _scheduler(scheduler: Any) -> Path | None:
    if hasattr(scheduler, "alphas_cumprod"):
        return from_steps(scheduler.alphas_cumprod)
    config = getattr(scheduler, "config", None)
    if config is not None and "FlowMatch" in type(scheduler).__name__:
        return reverse(float(getattr(config, "num_train_timesteps", 1000)))
    if callable(scheduler):  # of flow_matching: t = 0 noise, t = 1 data
        there = scheduler(torch.tensor([0.5], dtype=torch.float64))
        if hasattr(there, "alpha_t") and hasattr(there, "sigma_t"):
            return Path(
                alpha=lambda u: scheduler(u).alpha_t, sigma=lambda u: scheduler(u).sigma_t, clock=(0.0, 1.0)
            )
    return None
