"""Ranking models: does the estimator rank ten or forty models as their exact likelihoods do?

They are variants of the cell's model, apart by less than the bias of a few Euler steps on it, so an estimator whose
bias is not the same for all of them gets the order wrong. Two families:

- `rescaled`: what the model generates, scaled about the data's mean by ten factors, as when a model is calibrated;
- `displaced` (a mixture in closed form): means moved and axes widened, ten other fields;
  `rounded` (a network): relative noise on every weight, as rounding leaves it, other fields too: forty of them up to
  `NARROW` dimensions, beyond ten.

Exact is the closed form, or the converged likelihood of each network's own field.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import scipy
import torch
from torch import Tensor, nn

from flowlik.evaluation.batching.batches import evaluate
from flowlik.evaluation.models import load
from flowlik.evaluation.prepare import Prepared
from flowlik.measures.accuracy import bits_per_dim
from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import FEWEST, resample_counts
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError
from flowlik_estimators import parse_spec
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.interfaces import can
from flowlik_models.numerics import random

MODELS, ROUNDED_MODELS = 10, 40
ITEMS, ITEMS_WIDE = 256, 32
NARROW = 8
"""Dimensions up to which the exact likelihood of a network is solved for adaptively, on more items."""

RESCALED = 0.04
"""Unit of the log of the factors, which run from -1 to 1.3 of it: not symmetric, since that would make ties."""

DISPLACED, WIDENED = 0.25, 0.05
"""Largest displacement of a mixture's means, in standard deviations along each axis, and relative change of these."""

ROUNDED = 0.06
"""Largest relative noise on a network's weights."""

EXACT = "ode[solver=dopri5,rtol=1e-5,atol=1e-5,trace=exact]"
EXACT_WIDE = "ode[divergence=quadrature,nodes=17,rtol=1e-4,atol=1e-4,trace=exact]"
RESAMPLES = 200
_KEY = 90_210


@dataclass(frozen=True)
class Variant:
    """A model whose points are scaled by exp(log_scale) about `centre` (*event)."""

    model: Any
    log_scale: float = 0.0
    centre: Tensor | None = None

    def log_prob(self, of: Callable[[Any, Tensor], Array], x: Tensor) -> Array:
        """log p of x (n, *event), (n,) nats, with `of` for the model's own."""
        if self.centre is None:
            return of(self.model, x)
        centre = self.centre.to(x)
        before = centre + (x - centre) * math.exp(-self.log_scale)
        return of(self.model, before) - x[0].numel() * self.log_scale


def model_comparison(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """Agreement of estimated and exact mean likelihoods on the order of the variants, per family.

    Measures: `kendall` (tau) with a 95 % interval over the items (`kendall_lo`, `kendall_hi`), `spearman`, `regret`
    (exact bits/dim lost by taking the model that the estimator puts first), `spread` and `least_gap` of the exact
    values, `bias` of the estimates and `bias_spread`, how much it differs between models; all in bits/dim.
    """
    cell, task, items = prepared.cell, prepared.task, prepared.items
    assert items is not None
    n = min(items.n, ITEMS if task.dim <= NARROW else ITEMS_WIDE)
    end = float(cell.estimator.data_end(prepared.model))
    known = _known(cell.task, cell.model, cell.device, cell.options.dtype, cell.options.split, n, end)
    x, ids = whole(items.x[:n]), items.ids[:n]
    measured: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    for family, (variants, exact) in known.items():
        found = np.stack(
            [
                v.log_prob(lambda model, points: evaluate(cell, model, points, ids).log_prob, x)
                for v in variants
            ]
        )
        measured[family] = ranked(bits_per_dim(found, task.dim), bits_per_dim(exact, task.dim))
        arrays |= {family: found, f"{family}_exact": exact}
    return measured, arrays


@lru_cache(maxsize=2)
def _known(
    task: str, model: str, device: str, dtype: str, split: str, n: int, end: float
) -> dict[str, tuple[list[Variant], Array]]:
    """The variants of a model and their exact log-densities, (models, n), kept for the cells that follow."""
    x = whole(get_task(task).items(split, n).x).to(device=device, dtype=getattr(torch, dtype))
    found = {}
    for family, variants in families(load(task, model, device, dtype)[0]).items():
        exact = [v.log_prob(lambda model, points: exact_log_prob(model, points, end), x) for v in variants]
        found[family] = (variants, np.stack(exact))
    return found


def ranked(estimated: Array, exact: Array) -> dict[str, float]:
    """Agreement of two tables of bits/dim (models, items) on the order of the models' means; below `FEWEST` items
    without an interval."""
    guess, truth = estimated.mean(1), exact.mean(1)
    n = exact.shape[1]
    draws = resample_counts(n, RESAMPLES if n >= FEWEST else 0)
    taus = [
        float(scipy.stats.kendalltau(a, b).statistic)
        for a, b in zip(draws @ estimated.T, draws @ exact.T, strict=True)
        if np.isfinite(a).all()
    ]
    low, high = np.quantile(taus, (0.025, 0.975)) if taus else (math.nan, math.nan)
    bias = guess - truth
    return {
        "kendall": float(scipy.stats.kendalltau(guess, truth).statistic),
        "kendall_lo": float(low),
        "kendall_hi": float(high),
        "spearman": float(scipy.stats.spearmanr(guess, truth).statistic),
        "regret": float(truth[int(np.argmin(guess))] - truth.min()) if np.isfinite(guess).all() else math.nan,
        "spread": float(np.ptp(truth)),
        "least_gap": float(np.diff(np.sort(truth)).min()),
        "bias": float(bias.mean()),
        "bias_spread": float(np.ptp(bias)),
        "models": float(len(truth)),
    }


def families(model: Any) -> dict[str, list[Variant]]:
    """Models near this one, in two families.

    Raises:
        UnavailableError: neither a mixture in closed form nor a network, or one without moments.
    """
    levels = np.linspace(0.0, 1.0, MODELS)
    dims = math.prod(getattr(model, "event_shape", ()))
    if isinstance(model, GaussianMixture):
        others = {"displaced": [Variant(_displaced(model, k, float(s))) for k, s in enumerate(levels)]}
    elif isinstance(model, nn.Module) and any(True for _ in model.parameters()):
        copies = ROUNDED_MODELS if dims <= NARROW else MODELS
        noises = np.linspace(0.0, 1.0, copies)
        others = {"rounded": [Variant(_rounded(model, k, float(s))) for k, s in enumerate(noises)]}
    else:
        raise UnavailableError("comparison needs a mixture in closed form or a network; name one with -m")
    if not can(model, "moments"):
        raise UnavailableError("comparison needs the moments of the data; attach them to the model")
    centre = torch.from_numpy(model.moments.mean).reshape(model.event_shape)
    scales = RESCALED * np.linspace(-1.0, 1.3, MODELS)
    return {"rescaled": [Variant(model, float(scale), centre) for scale in scales]} | others


def _displaced(model: GaussianMixture, index: int, level: float) -> GaussianMixture:
    """The mixture with means moved along every axis and axes widened by keyed normal amounts."""
    k, d = model.means.shape
    draw = random.gaussian(_KEY, torch.tensor([index]), (2, k, d), dtype=torch.float64)[0].to(model.means)
    moves = level * DISPLACED * model.stds * draw[0]
    means = model.means + torch.einsum("kde,ke->kd", model.rotations, moves)
    stds = model.stds * (level * WIDENED * draw[1]).exp()
    other: Any = GaussianMixture(model.weights, means, stds, model.rotations).to(model.means.device)
    if can(model, "moments"):
        other.moments = model.moments
    found: GaussianMixture = other
    return found


def _rounded(model: nn.Module, index: int, level: float) -> nn.Module:
    """A copy with every weight multiplied by 1 + level * ROUNDED times a keyed normal draw."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for place, weight in enumerate(other.parameters()):
            draw = random.gaussian(
                _KEY, torch.tensor([index]), tuple(weight.shape), stream=place, dtype=torch.float64
            )
            weight.mul_(1 + level * ROUNDED * draw[0].to(weight))
    return other


def exact_log_prob(model: Any, x: Tensor, end: float) -> Array:
    """log p_end of x (n, *event) under the model's own field, (n,) nats: closed form, or a converged solve."""
    if can(model, "log-density"):
        with torch.no_grad():
            return np.asarray(model.log_prob(x.double(), end).cpu().numpy(), dtype=np.float64)
    (estimator,) = parse_spec(EXACT if x[0].numel() <= NARROW else EXACT_WIDE)
    out = estimator.log_prob(model, x)
    return np.asarray(out.log_prob.cpu().numpy(), dtype=np.float64)
