r"""Likelihood without an ODE: the bound that diffusion papers report, one forward a draw (docs/math.md section 11).

Source: Kong, Brekelmans, Ver Steeg 2023, arXiv 2302.03792. With ``z = x + s n``, n ~ N(0, I), and the noise that the
field X

    log p(x) = log N(x; m, C) + int E_n [ |n - n_G|^2 - |n - n^|^2 ] d log s

Exact point by point for the true field. Of a trained network it is the density that its diffusion bounds, not that of
its ODE: another number. Where the data end stands at noise s_1 > 0 (``eps``, a model's clean end), the noise s comes
on top of it, ``t = 1/(1 + (s_1^2 + s^2)^(1/2))``, n^ is multiplied by ``s/(s_1^2 + s^2)^(1/2)`` and C becomes
C + s_1^2 I. Where the model knows its field from a time t_0 > 0 only, the integral ends there, and
``E_n [log source - log N]`` of the state at t_0 takes the place of the rest.

Every replicate has a grid of levels, equally spaced in the level law's distribution function and moved by one random
shift: the integrand is smooth and vanishes at both ends, so that the grid costs hardly any error. Each level has its
own noise, both signs of it where ``antithetic``. What remains is the noise of ``|n - n^|^2``, near ``n^T M n`` with
``M = (I - A)^2``, A the Jacobian of n^ in n. Less ``c (n^T S^2 n - tr S^2)``, ``S = C (C + s^2)^{-1}``, the same of
the Gaussian, it is quieter; the best c is ``tr(M S^2)/tr S^4``, which is what ``|S (I - A) n|^2 / |S^2 n|^2`` is on
average. c is smoothed over the levels of the item's other replicates, so that it knows nothing of the noise it
multiplies: the estimate stays unbiased, but for what lies below the smallest level, about ``s^2/2 E|score|^2`` nats.

Cost: ``draws`` forwards, all in one batch; no vjp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, mean_over_probes
from flowlik_estimators.divergence import probes as laws
from flowlik_estimators.registry import register
from flowlik_models.interfaces import ends_of, lacks, source_of
from flowlik_models.numerics import random
from flowlik_models.numerics.device_arrays import device_array
from flowlik_models.numerics.standard_normal import LOG_2PI
from flowlik_models.numerics.streams import LEVEL_STREAM

LARGEST = 100.0
"""The largest noise in units of the data's standard deviation, where the field is the Gaussian's but for 1e-4 nats."""

CENTRE, WIDTH = 0.25, 1.2
"""Median of the level law in units of the data's standard deviation, and its scale in log s: it covers the structure
inside the data as well as the whole; measured on gmm-64d, where WIDTH from 1.0 to 1.4 are alike."""

SMOOTHED = 0.5
"""Width, in log s, of the kernel that smooths the control's coefficient."""


@register("elbo")
@dataclass(frozen=True, kw_only=True)
class ELBO(Estimator):
    """The simulation-free likelihood from ``draws`` forwards in ``replicates`` independent parts.

    ``levels`` of the noise: importance (logistic in log s about a quarter of the data's standard deviation) or uniform
    in log s, from ``lowest`` up. ``antithetic``: every noise with both signs, two draws. ``control``: gaussian, which
    needs the data's moments, or none, with which ``|n|^2`` stays in as noise. ``stderr`` is that over the replicates,
    with ``dof`` degrees of freedom in ``extra``.

    >>> from flowlik_estimators import get
    >>> from flowlik_models.moments import attach, estimate
    >>> from flowlik_models.synthetic import closed_form
    >>> model = closed_form("gmm-64d")
    >>> x = model.sample(2_100, generator=torch.Generator().manual_seed(0))
    >>> out = get("elbo").log_prob(attach(model, estimate(x[100:], "training points")), x[:100])
    >>> error = (out.log_prob - model.log_prob(x[:100])).abs().mean() / (64 * math.log(2))
    >>> out.cost.forwards, bool(error < 0.05)
    (64.0, True)
    """

    family = "bound"
    differentiates = False

    draws: int = 64
    replicates: int = 4
    levels: Literal["importance", "uniform"] = "importance"
    antithetic: bool = True
    control: Literal["gaussian", "none"] = "gaussian"
    lowest: float = 1e-3

    def _check(self) -> None:
        if self.replicates < 2:
            raise ValueError(f"{self.name}: replicates must be at least 2, got {self.replicates}")
        whole = self.replicates * self._signs
        if self.draws < whole or self.draws % whole:
            pairs = " x 2 signs" if self.antithetic else ""
            raise ValueError(
                f"{self.name}: draws must be a multiple of {self.replicates} replicates{pairs}, got {self.draws}"
            )
        if not self.lowest > 0.0:
            raise ValueError(f"{self.name}: lowest must be positive, got {self.lowest}")

    @property
    def _signs(self) -> int:
        return 2 if self.antithetic else 1

    def supports(self, model: object) -> str | None:
        """Needs a field whose paths start from Gaussian noise and, for control=gaussian, the data's moments."""
        if why := lacks(model, "velocity"):
            return why
        ends = ends_of(model)
        if ends is not None and ends.noisy_end == 0.0 and source_of(model) is not None:
            return "needs a field that starts from N(0, I) at t = 0; the model has another source there"
        if self.control == "gaussian" and (why := laws.refusal(None, None, "gaussian", None, model)):
            return f"{why}; control=none goes without"
        return None

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        first = (1.0 - run.data_end) / run.data_end
        gaussian = _Gaussian(model if self.control == "gaussian" else None, run, first**2)
        points = x.double().flatten(1) / run.data_end
        highest = self._highest(run, gaussian, first)
        level, density = self._levels(run, gaussian.spread, highest)
        noise = self._noise(run)
        error = self._errors(model, run, points, level.exp(), noise, first)
        value = gaussian.integrand(points, level, noise, error, controlled=self.control == "gaussian")
        replicates = (value / density).mean(1).T
        if run.noise_end > 0.0:
            replicates = replicates + self._at_the_source(run, gaussian, points, noise[0], highest)
        replicates = (
            replicates + (gaussian.log_prob(points) - points.shape[1] * math.log(run.data_end))[:, None]
        )
        mean, stderr = mean_over_probes(replicates)
        dof = torch.full_like(mean, self.replicates - 1.0).detach()
        return Estimate(log_prob=mean, stderr=stderr, extra={"dof": dof})

    def _highest(self, run: Run, gaussian: _Gaussian, first: float) -> float:
        """The largest noise on top of that at the data end."""
        if run.noise_end == 0.0:
            return LARGEST * gaussian.spread
        return math.sqrt(max(((1.0 - run.noise_end) / run.noise_end) ** 2 - first**2, 0.0))

    def _levels(self, run: Run, spread: float, highest: float) -> tuple[Tensor, Tensor]:
        """log s of every draw and its density, (replicates, levels, batch) float64."""
        count = self.draws // (self.replicates * self._signs)
        shift = random.uniform(
            run.key,
            run.items,
            (self.replicates,),
            stream=LEVEL_STREAM,
            dtype=torch.float64,
            device=run.device,
        )
        part = torch.arange(count, dtype=torch.float64, device=run.device)[:, None]
        unit = (part + shift.T[:, None]) / count
        low, high = math.log(min(self.lowest, 0.5 * highest)), math.log(highest)
        if self.levels == "uniform":
            return low + (high - low) * unit, torch.full_like(unit, 1.0 / (high - low))
        centre = math.log(CENTRE * spread)
        below, above = torch.sigmoid(
            (torch.tensor([low, high], dtype=torch.float64) - centre) / WIDTH
        ).tolist()
        share = below + (above - below) * unit
        return centre + WIDTH * share.logit(), share * (1.0 - share) / (WIDTH * (above - below))

    def _noise(self, run: Run) -> Tensor:
        """Noise (signs, replicates, levels, batch, d) float64, keyed by item."""
        count = self.draws // self._signs
        drawn = run.probes(count, "gaussian").double().flatten(2).transpose(0, 1)
        drawn = _orthogonal(drawn.reshape(self.replicates, -1, *drawn.shape[1:]))
        return torch.stack((drawn, -drawn)) if self.antithetic else drawn[None]

    def _errors(self, model: Any, run: Run, x: Tensor, level: Tensor, noise: Tensor, first: float) -> Tensor:
        """n - n^ of every draw, shaped as the noise: one call of the model."""
        whole = (level.square() + first**2).sqrt()
        t = (1.0 / (1.0 + whole)).expand(noise.shape[:-1]).to(run.dtype)
        y = t.double()[..., None] * (x + level[..., None] * noise)
        rows = run.repeated(self.draws)
        velocity = rows.velocity(model, y.reshape(-1, *run.event_shape).to(run.dtype), t.reshape(-1))
        found = y - t.double()[..., None] * velocity.double().reshape(y.shape)
        return noise - (level / whole)[..., None] * found

    def _at_the_source(
        self, run: Run, gaussian: _Gaussian, x: Tensor, noise: Tensor, highest: float
    ) -> Tensor:
        """Mean over the draws of the source's log-density less the Gaussian's, (batch, replicates)."""
        z = x + highest * noise
        states = (run.noise_end * z).reshape(-1, *run.event_shape).to(run.dtype)
        source = run.source_log_prob(states).reshape(z.shape[:-1])
        there = gaussian.log_prob(z, highest**2) - x.shape[1] * math.log(run.noise_end)
        return (source - there).mean(1).T


def _orthogonal(noise: Tensor) -> Tensor:
    """Normal vectors (replicates, levels, batch, d) turned so that neighbouring levels, up to d, are orthogonal.

    Lengths stay, directions are uniform, so that each alone is normal as before.
    """
    d = noise.shape[-1]
    blocks = []
    for block in torch.split(noise, d, 1):
        q, r = torch.linalg.qr(block.permute(0, 2, 3, 1))
        turned = q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        blocks.append(turned.permute(0, 3, 1, 2) * block.norm(dim=-1, keepdim=True))
    return torch.cat(blocks, 1)


class _Gaussian:
    """N(m, C) with the data's moments, or N(0, I) for want of them, blurred by a variance; float64.

    Along the eigenvectors, and all that they leave over taken together: ``values`` and ``count`` (k + 1,).
    """

    def __init__(self, model: Any | None, run: Run, blur: float) -> None:
        d = math.prod(run.event_shape)
        moments = None if model is None else model.moments
        if moments is None:
            mean, vectors, along, rest = np.zeros(d), np.zeros((d, 0)), np.zeros(0), 1.0
        else:
            mean, vectors, along = moments.mean, moments.eigenvectors, moments.eigenvalues
            rest = 1.0 if moments.rest is None else moments.rest
        values = torch.as_tensor(np.append(along, rest), dtype=torch.float64) + blur
        count = torch.ones_like(values)
        count[-1] = d - len(values) + 1
        self.spread = math.sqrt(float((count * values).sum()) / d)  # here, where no device is waited for
        self.values, self.count = (part.to(run.device, non_blocking=True) for part in (values, count))
        self.mean, self.vectors = (device_array(part, torch.float64, run.device) for part in (mean, vectors))

    def products(self, u: Tensor, v: Tensor) -> Tensor:
        """Products of the coordinates of two vectors (..., d), (..., k + 1); the last is that of what is left over."""
        along = (u @ self.vectors) * (v @ self.vectors)
        left = (u * v).sum(-1, keepdim=True) - along.sum(-1, keepdim=True)
        return torch.cat((along, left * (self.count[-1] > 0)), -1)

    def log_prob(self, z: Tensor, blur: float = 0.0) -> Tensor:
        """Log-density of z (..., d) with a further variance, (...)."""
        off, values = z - self.mean, self.values + blur
        logs = (self.count * (values.log() + LOG_2PI)).sum()
        return -0.5 * ((self.products(off, off) / values).sum(-1) + logs)

    def integrand(
        self, x: Tensor, level: Tensor, noise: Tensor, error: Tensor, *, controlled: bool
    ) -> Tensor:
        """``E|n - n_G|^2 - |n - n^|^2``, with the control, of every noise: (replicates, levels, batch)."""
        variance = level.exp().square()[..., None]
        shrunk = self.values / (self.values + variance)
        off = x - self.mean
        drift = level.exp()[..., None] / (self.values + variance)
        expected = (self.count * shrunk.square()).sum(-1) + (drift.square() * self.products(off, off)).sum(-1)
        value = expected - error.square().sum(-1).mean(0)
        if not controlled:
            return value
        squares = self.products(noise[0], noise[0])
        odd = (shrunk * drift * self.products(noise.mean(0), off.expand_as(noise[0]))).sum(-1)
        control = (shrunk.square() * (squares - self.count)).sum(-1) - 2.0 * odd
        change = 0.5 * (error[0] - error[1]) if len(noise) == 2 else error[0]
        ratio = (shrunk.square() * self.products(change, change)).sum(-1)
        ratio = ratio / (shrunk.square().square() * squares).sum(-1)
        return value + _of_the_others(ratio.detach(), level) * control


def _of_the_others(ratio: Tensor, level: Tensor) -> Tensor:
    """Means of ratios (replicates, levels, batch) over an item's other replicates, those at near levels above all."""
    replicates, levels, batch = ratio.shape
    place = level.reshape(-1, batch).T
    weights = torch.exp(-0.5 * ((place[:, :, None] - place[:, None, :]) / SMOOTHED).square()) + 1e-12
    own = torch.arange(replicates, device=ratio.device).repeat_interleave(levels)
    weights = weights * (own[:, None] != own[None, :])
    smooth = (weights @ ratio.reshape(-1, batch).T[..., None]).squeeze(-1) / weights.sum(-1)
    return smooth.T.reshape(ratio.shape)
