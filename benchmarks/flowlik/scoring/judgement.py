"""A student's few-step likelihood against its teacher's converged one, per item."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.accuracy import bits_per_dim, spearman
from flowlik.measures.arrays import Array
from flowlik_estimators import Estimator, get
from flowlik_models.distillation.pool import Pool
from flowlik_models.distillation.teacher import Teacher

STEPS = (1, 2, 4, 8)
EXACT_DIMS, PROBES = 128, 16
"""Up to here the teacher's divergence is exact; beyond, so many probes a node."""

NUMBERS = 2**17
"""Of items judged, at least `FEWEST`; and so many of a batch, or one item."""

FEWEST, BATCH_NUMBERS = 32, 2**16
CHECKED_PATHS = 64


def converged(dim: int) -> Estimator:
    """The estimator whose answers are the teacher's likelihood."""
    options: dict[str, Any] = {"solver": "dopri5", "rtol": 1e-6, "atol": 1e-6}
    if dim > EXACT_DIMS:
        options |= {"divergence": "quadrature", "trace": "hutchinson", "probes": PROBES, "nodes": 33}
    return get("ode", **options)


def judged(teacher: Any, student: Any, x: Tensor, levels: int | None, device: str) -> dict[str, Any]:
    """What the card says of a student on held-out x (n, *event): errors in bits/dim by number of steps, the teacher's
    mean with what its reference leaves open, and `control-mean`, the mean of the reference in place of every item."""
    dim = math.prod(teacher.event_shape)
    x = x[: max(FEWEST, NUMBERS // dim)].to(device)
    reference = converged(dim)
    truth, stderr = _bpd(reference, teacher, x, levels)
    report: dict[str, Any] = {"n": len(x), "reference": reference.label, "bpd": _mean(truth)}
    report["reference_error"] = (
        float(stderr.mean()) if stderr.any() else _reference_error(teacher, x, truth, levels)
    )
    report["control-mean"] = _errors(np.full_like(truth, truth.mean()), truth)
    report["steps"] = {}
    for steps in STEPS:
        found, _ = _bpd(get("f2d2", steps=steps), student, x, levels)
        report["steps"][str(steps)] = {**_errors(found, truth), "spearman": _rounded(spearman(found, truth))}
    return report


def lines_of(card: dict[str, Any]) -> list[str]:
    """The card of a student in lines."""
    found = card["accuracy"]
    lines = [
        f"teacher: {found['bpd'][0]:.4f} +- {found['bpd'][1]:.4f} bits/dim on {found['n']} held-out items "
        f"({found['reference']}, its error {found['reference_error']:.1g})"
    ]
    for steps, row in found["steps"].items():
        lines.append(
            f"f2d2, {steps} step{'s' if steps != '1' else ''}: {_said(row)}, rank correlation {row['spearman']:.3f}"
        )
    return [*lines, f"control-mean: {_said(found['control-mean'])}"]


def pool_error(teacher: Teacher, pool: Pool, device: str) -> float:
    """Mean |error| in bits/dim of the log-densities that the last trajectories of a pool give their data ends."""
    dim = math.prod(teacher.model.event_shape)
    last = slice(-max(4, min(CHECKED_PATHS, NUMBERS // (8 * dim))), None)
    x = pool.states[0, last].to(device)
    got = (pool.log_source[last] + pool.log_dets[-1, last].double()).numpy()
    with torch.no_grad():
        scale = dim * math.log(teacher.scale)  # estimates are of x, trajectories of scale x
        out = converged(dim).log_prob(teacher.model, x / teacher.scale)
    return float(np.abs(out.log_prob.cpu().numpy() - scale - got).mean() / (dim * math.log(2)))


def _said(row: dict[str, Any]) -> str:
    (mae, mae_se), (bias, bias_se) = row["mae"], row["bias"]
    return f"mean |error| {mae:.4f} +- {mae_se:.4f} bits/dim, bias {bias:+.4f} +- {bias_se:.4f}"


def _bpd(estimator: Estimator, model: Any, x: Tensor, levels: int | None) -> tuple[Array, Array]:
    """Bits/dim of every item and their standard errors, 0 where the estimator has none."""
    dim = x[0].numel()
    values, errors = [], []
    for k, part in enumerate(torch.split(x, max(1, BATCH_NUMBERS // dim))):
        out = estimator.log_prob(model, part, generator=torch.Generator().manual_seed(k))
        values.append(out.log_prob.cpu().numpy())
        errors.append(np.zeros(len(part)) if out.stderr is None else out.stderr.cpu().numpy())
    return bits_per_dim(np.concatenate(values), dim, levels), np.concatenate(errors) / (dim * math.log(2))


def _reference_error(teacher: Any, x: Tensor, truth: Array, levels: int | None) -> float:
    """Mean distance to the same solve at ten times the tolerance, on the first items."""
    first = x[:CHECKED_PATHS]
    coarse, _ = _bpd(get("ode", solver="dopri5", rtol=1e-5, atol=1e-5), teacher, first, levels)
    return float(np.abs(coarse - truth[: len(first)]).mean())


def _errors(found: Array, truth: Array) -> dict[str, Any]:
    error = found - truth
    return {
        "mae": _mean(np.abs(error)),
        "bias": _mean(error),
        "rmse": _rounded(float(np.sqrt((error**2).mean()))),
    }


def _mean(values: Array) -> list[float]:
    """Mean and standard error."""
    return [_rounded(float(values.mean())), _rounded(float(values.std(ddof=1) / math.sqrt(len(values))))]


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")
