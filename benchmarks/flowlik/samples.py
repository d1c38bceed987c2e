"""How good samples are, whatever drew them: distances to real items, and their likelihood under the reference.

Where a task has a feature network: the Frechet distance with an interval, precision, recall and the kernel distance
in its features; images of 8 bits are judged by the standard Inception where its weights are at hand. Where it has a
closed form: the energy distance in data space. Where its reference is known: the samples' bits/dim under it, exact or
by the converged teacher. See docs/math.md section 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.extractors import extractor_of
from flowlik.frechet import PARTS, features_of, frechet
from flowlik.measures import bits_per_dim
from flowlik.points import whole
from flowlik.precision_recall import kernel_distance, precision_recall
from flowlik.real_features import KEPT, RealFeatures, real_features
from flowlik.tasks import Array, Task

SCORED = 128
ENERGY_POINTS = 2048
SCORE = "whitened-ode[solver=rk4,steps=8,clock=stretched,trace=hutchinson]"
"""32 evaluations in the stretched clock: on the digits the solve is within 0.001 bits/dim of the converged value."""


def judge(task: Task, x: Tensor, teacher: Callable[[], Any] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of group `samples` for finite x (n, *event), and what goes into `extra`.

    `teacher` loads the task's reference model where there is no closed form; None leaves out the samples' likelihood.
    """
    columns: dict[str, Any] = {"n_samples": len(x)}
    extra: dict[str, Any] = {}
    extractor = extractor_of(task)
    real = None if extractor is None else real_features(task, extractor, x.device)
    if extractor is not None and real is not None:
        in_features, more = _in_features(real, features_of(extractor.to(x.device), x))
        columns |= in_features | {"extractor": str(extractor.name)}
        extra |= more
    elif task.log_density(x[:1], 1.0 - task.eps) is not None:
        extra |= _energy(task, x)
    return columns, extra | _scored(task, x, teacher)


def _in_features(real: RealFeatures, ours: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and `extra` of features (n, f) of samples; the overlap is that of the first `KEPT` on each side."""
    found = frechet(real.normal, ours)
    theirs, some = real.features.to(ours.device), ours[:KEPT]
    precision, recall = precision_recall(theirs, some, real_radii=real.radii.to(ours.device))
    kid = kernel_distance(theirs, some, within_real=real.kernel)
    half = 1.96 * float(found.resampled.std(ddof=1))
    return {
        "frechet": found.frechet,
        "frechet_se": found.frechet_se,
        "kid": kid,
        "precision": precision,
        "recall": recall,
    }, {
        "frechet_lo": max(found.frechet - half, 0.0),
        "frechet_hi": found.frechet + half,
        "frechet_resampled": [round(float(value), 4) for value in found.resampled],
        "real_images": real.count,
    }


def _energy(task: Task, x: Tensor) -> dict[str, float]:
    """Energy distance of the samples, and a standard error from disjoint parts of them."""
    n = min(len(x), ENERGY_POINTS)
    real = whole(task.items("train", n).x).double().flatten(1)
    x = x[:n].double().flatten(1).cpu()
    size = n // PARTS
    error = math.nan
    if size >= 2:
        values = [energy_distance(real, part) for part in torch.split(x[: size * PARTS], size)]
        error = float(np.std(values, ddof=1) / math.sqrt(PARTS))
    return {"energy_distance": energy_distance(real, x), "energy_distance_se": error}


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|A - B| - E|A - A'| - E|B - B'| of two sets of points (n, d) and (m, d), unbiased; 0 where the laws agree.

    Raises:
        ValueError: fewer than two points on a side.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"an energy distance needs at least two points on each side, got {len(a)}, {len(b)}")
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return float(2 * torch.cdist(a, b).mean() - within[0] - within[1])


def _scored(task: Task, x: Tensor, teacher: Callable[[], Any] | None) -> dict[str, float]:
    values = task.log_density(x, 1.0 - task.eps)
    if values is None and teacher is not None:
        values = converged(teacher(), x[:SCORED])
    if values is None:
        return {}
    bits = bits_per_dim(values, task.dim)
    bits = bits[np.isfinite(bits)]
    if len(bits) < 2:
        return {}
    return {
        "samples_bpd": float(bits.mean()),
        "samples_bpd_se": float(bits.std(ddof=1) / math.sqrt(len(bits))),
    }


def converged(model: Any, x: Tensor, spec: str = SCORE) -> Array:
    """log p of x (n, *event) under a field, (n,) nats, by a solve that is converged up to its probes' noise."""
    from flowlik_estimators import parse_spec

    (estimator,) = parse_spec(spec)
    parts = [
        estimator.log_prob(model, part, items=torch.arange(len(part)) + k * len(part)).log_prob
        for k, part in enumerate(torch.split(x, 256))
    ]
    return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.float64)
