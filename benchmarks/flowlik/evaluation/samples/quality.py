"""How good samples are, whatever drew them: distances to real items, and their likelihood under the reference.

Where a task has a feature network: the Frechet distance with an interval, precision, recall and the kernel distance
in its features; images of 8 bits are judged by the standard Inception where its weights are at hand. Where it has a
closed form: the energy distance in data space, in few dimensions precision and recall there, and for a mixture whether
a mode is missing. Where its reference is known: the samples' bits/dim under it, exact or by the converged teacher. See
docs/math.md section 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.samples.extractors import extractor_of, further_extractors
from flowlik.evaluation.samples.real_features import KEPT, RealFeatures, real_features
from flowlik.measures.accuracy import bits_per_dim
from flowlik.measures.arrays import Array
from flowlik.measures.energy_distance import energy_distance_and_error
from flowlik.measures.frechet import features_of, frechet
from flowlik.measures.precision_recall import NEIGHBOURS, kernel_distance, precision_recall
from flowlik.tasks.points import whole
from flowlik.tasks.task import Task, UnavailableError
from flowlik_estimators import parse_spec
from flowlik_models.closed_forms.mixture import GaussianMixture

SCORED = 128
ENERGY_POINTS = 5000
FEW_DIMENSIONS = 64
"""Up to so many, nearest neighbours in data space tell something."""

SCORE = "whitened-ode[solver=rk4,steps=8,clock=stretched,trace=hutchinson]"
"""32 evaluations in reparametrised time: on the digits the solve is within 0.001 bits/dim of the converged value."""


def judge(
    task: Task, x: Tensor, teacher: Callable[[], Any] | None, features: tuple[str, ...] = ()
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of group `samples` for finite x (n, *event), and what goes into `extra`.

    `teacher` loads the task's reference model where there is no closed form; None leaves out the samples' likelihood.
    `features` names networks that judge them besides: `in_features` of `extra` has their columns, by name.
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
        if task.dim <= FEW_DIMENSIONS and min(len(x), ENERGY_POINTS) > NEIGHBOURS:
            overlap, errors = _overlap(_real(task, len(x)), x[:ENERGY_POINTS].double().flatten(1).cpu())
            columns |= overlap
            extra |= errors
        extra |= _modes(task, x)
    others = {name: _further(task, x, net) for name, net in further_extractors(task, features).items()}
    return columns, extra | ({"in_features": others} if others else {}) | _scored(task, x, teacher)


def _further(task: Task, x: Tensor, extractor: Any) -> dict[str, Any]:
    """The same columns by another network. Raises UnavailableError where the task has no real items."""
    real = real_features(task, extractor, x.device)
    if real is None:
        raise UnavailableError(f"{task.id} has no real images that features are held against")
    columns, _ = _in_features(real, features_of(extractor.to(x.device), x))
    return {"extractor": str(extractor.name), **columns}


def _in_features(real: RealFeatures, ours: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Columns and `extra` of features (n, f) of samples; the overlap is that of the first `KEPT` on each side."""
    found = frechet(real.normal, ours)
    theirs, some = real.features.to(ours.device), ours[:KEPT]
    overlap, errors = _overlap(theirs, some, real_radii=real.radii.to(ours.device))
    kid = kernel_distance(theirs, some, within_real=real.kernel)
    half = 1.96 * float(found.resampled.std(ddof=1))
    return {
        "frechet": found.frechet,
        "frechet_se": found.frechet_se,
        "kid": kid,
    } | overlap, errors | {
        "frechet_lo": max(found.frechet - half, 0.0),
        "frechet_hi": found.frechet + half,
        "frechet_resampled": [round(float(value), 4) for value in found.resampled],
        "real_images": real.count,
    }


def _overlap(
    real: Tensor, samples: Tensor, real_radii: Tensor | None = None
) -> tuple[dict[str, float], dict[str, float]]:
    """Precision and recall, and the standard errors that shares of so many samples and real items have."""
    precision, recall = precision_recall(real, samples, real_radii=real_radii)
    errors = {
        f"{name}_se": math.sqrt(share * (1 - share) / n)
        for name, share, n in (("precision", precision, len(samples)), ("recall", recall, len(real)))
    }
    return {"precision": precision, "recall": recall}, errors


def _real(task: Task, n: int) -> Tensor:
    """Training points in data space, as many as samples, (n, d) float64."""
    return whole(task.items("train", min(n, ENERGY_POINTS)).x).double().flatten(1)


def _modes(task: Task, x: Tensor) -> dict[str, float]:
    """`least_mode`: the samples that fall to a mixture's worst covered component, over what is its due: 0 is a lost
    mode, and even exact samples stay somewhat below 1."""
    truth = getattr(task, "truth", None)
    if not isinstance(truth, GaussianMixture):
        return {}
    with torch.no_grad():
        nearest = truth.responsibilities(x.double().cpu(), 1.0 - task.eps).argmax(1)
    shares = torch.bincount(nearest, minlength=len(truth.weights)) / len(x)
    return {"least_mode": float((shares / truth.weights).min())}


def _energy(task: Task, x: Tensor) -> dict[str, float]:
    """Energy distance of the samples, and its standard error."""
    n = min(len(x), ENERGY_POINTS)
    distance, error = energy_distance_and_error(_real(task, n), x[:n].double().flatten(1).cpu())
    return {"energy_distance": distance, "energy_distance_se": error}


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
    (estimator,) = parse_spec(spec)
    parts = [
        estimator.log_prob(model, part, items=torch.arange(len(part)) + k * len(part)).log_prob
        for k, part in enumerate(torch.split(x, 256))
    ]
    return np.asarray(torch.cat(parts).cpu().numpy(), dtype=np.float64)
