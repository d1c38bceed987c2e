"""Accuracy: what the columns of that group say of a cell's items (`flowlik.records.columns`).

All functions work on arrays over items. Errors are `e_i = bpd_i - bpd_ref_i` in bits/dim; items whose estimate or
reference is not finite are left out of the means and counted in `invalid_share`.
Intervals are studentised bootstrap intervals at 95 %, NaN below 20 items; the resampled items depend on the number of
items alone, so every estimator judged on the same items is resampled in the same way (paired).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from flowlik.measures.arrays import Array
from flowlik.measures.bootstrap import bootstrap_intervals
from flowlik.measures.judged_items import JudgedItems
from flowlik.measures.ranks import ranks, student_quantile


def bits_per_dim(log_prob: Array, dim: int, levels: int | None = None) -> Array:
    """Bits/dim of log-densities in nats: `-log p/(d ln 2)`, plus `log2(L/2)` for L levels scaled to [-1, 1].

    >>> [round(value, 4) for value in bits_per_dim(np.array([-math.log(16.0)]), dim=2).tolist()]
    [2.0]
    """
    bits = -np.asarray(log_prob, dtype=np.float64) / (dim * math.log(2.0))
    return bits if levels is None else bits + math.log2(levels / 2)


def spearman(estimate: Array, truth: Array) -> float:
    """Rank correlation of two arrays; NaN where the truth is constant or fewer than three items are known.

    The truth counts as constant where nine tenths of it lie within 1e-6 of each other, so a uniform density whose
    edges are blurred is constant too.

    >>> round(spearman(np.array([1.0, 2.0, 4.0, 3.0]), np.array([1.0, 2.0, 3.0, 4.0])), 3)
    0.8
    """
    known = np.isfinite(estimate) & np.isfinite(truth)
    estimate, truth = estimate[known], truth[known]
    if len(truth) < 3 or is_constant(truth) or np.ptp(estimate) == 0:
        return math.nan
    return float(np.corrcoef(ranks(estimate), ranks(truth))[0, 1])


def is_constant(values: Array) -> bool:
    """True where nine tenths of the values lie within 1e-6 of each other."""
    low, high = np.quantile(values, (0.05, 0.95))
    return bool(high - low <= 1e-6)


def coverage95(estimate: Array, truth: Array, stderr: Array, degrees: Array | float) -> float:
    """Share of items whose truth lies in the 95 % interval of their own error bar.

    Args:
        estimate: (n,) values. truth: (n,) values. stderr: (n,) standard errors, in the same unit.
        degrees: degrees of freedom of Student's t, one or (n,); infinity is the normal distribution. Items with none
            are left out; NaN where no item is left.

    >>> estimate, truth = np.array([0.0, 0.0, 0.0, 5.0]), np.zeros(4)
    >>> coverage95(estimate, truth, np.ones(4), math.inf)
    0.75
    """
    degrees = np.broadcast_to(np.asarray(degrees, dtype=np.float64), stderr.shape)
    known = np.isfinite(estimate) & np.isfinite(truth) & np.isfinite(stderr) & (degrees > 0)
    if not known.any():
        return math.nan
    width = student_quantile(0.975, degrees[known])
    return float(np.mean(np.abs(estimate - truth)[known] <= width * stderr[known]))


def mass(log_density: Array, cell_area: float) -> float:
    """Midpoint rule for `int exp(log p)` on a grid of equal cells; values that are not a number count as nothing.

    >>> round(mass(np.log(np.full((10, 10), 0.25)), cell_area=0.04), 6)
    1.0
    """
    known = log_density[~np.isnan(log_density)]
    if known.size == 0:
        return math.nan
    log_mass = float(scipy.special.logsumexp(known)) + math.log(cell_area)
    return math.exp(log_mass) if log_mass < 700 else math.inf


def judged(
    log_prob: Array,
    ref: Array,
    valid: NDArray[np.bool_],
    *,
    dim: int,
    levels: int | None = None,
    stderr: Array | None = None,
) -> JudgedItems:
    """The items of a cell, means over their draws; arguments as of `summarise`."""
    usable = valid & np.isfinite(log_prob)
    bits = np.where(usable, bits_per_dim(log_prob, dim, levels), np.nan)
    errors = bits - np.where(np.isfinite(ref), bits_per_dim(ref, dim, levels), np.nan)
    own = None if stderr is None else _mean(np.where(usable, stderr, np.nan)) / (dim * math.log(2.0))
    return JudgedItems(
        bpd=_mean(bits),
        ref=_mean(np.where(np.isfinite(errors), bits - errors, np.nan)),
        errors=_mean(errors),
        stderr=own,
        dim=dim,
    )


def summarise(
    log_prob: Array,
    ref: Array,
    valid: NDArray[np.bool_],
    *,
    dim: int,
    levels: int | None = None,
    stderr: Array | None = None,
    degrees: Array | float | None = None,
    unanswered: Callable[[], float] | None = None,
) -> dict[str, Any]:
    """The accuracy columns of one cell.

    Args:
        log_prob: (draws, n) nats: several dequantisation draws of the same n items; one draw for continuous data.
        ref: (draws, n) nats; NaN where the reference does not know the draw. Errors are taken where it does.
        valid: (draws, n); False where the estimator itself gave up on the item.
        dim: dimensions of one item. levels: grey levels of discrete data, or None.
        stderr: (draws, n) the estimator's own standard errors in nats, or None.
        degrees: of Student's t for them, one or (draws, n); None is the normal distribution.
        unanswered: gives the |error| in bits/dim at which an item without an answer counts in `bpd_mae_all`; without
            it there is no such column where an item has none.

    Returns:
        The columns `bpd` ... `invalid_share`, and under `extra` the errors in nats that the gates use.

    >>> ref = -np.arange(1.0, 9.0)[None]
    >>> row = summarise(ref - math.log(2.0), ref, np.full((1, 8), True), dim=1)
    >>> round(row["bpd_error"], 4), round(row["bpd_mae"], 4), row["spearman"], row["invalid_share"]
    (1.0, 1.0, 1.0, 0.0)
    """
    items = judged(log_prob, ref, valid, dim=dim, levels=levels, stderr=stderr)
    usable = valid & np.isfinite(log_prob)
    invalid = ~usable.all(axis=0)
    if levels is not None and len(log_prob) >= 8:
        invalid |= items.bpd < 0
    row: dict[str, Any] = {
        "bpd": _nanmean(items.bpd),
        "bpd_se": _standard_error(items.bpd),
        "bpd_ref": _nanmean(items.ref),
        "invalid_share": float(np.mean(invalid)),
    }
    if np.isfinite(items.errors).any():
        # the estimate of the same draws: that of the others knows other noise than the reference
        row |= _error_columns(items.errors, dim) | {
            "spearman": spearman(-(items.ref + items.errors), -items.ref)
        }
        row |= _of_all(items.errors, np.asarray(np.isfinite(ref).any(axis=0)), unanswered)
    if stderr is not None and np.isfinite(stderr).any():
        row["stderr_mean"] = float(np.nanmean(np.where(usable, stderr, np.nan))) / (dim * math.log(2.0))
        row["coverage95"] = coverage95(
            np.where(usable, log_prob, np.nan).ravel(),
            ref.ravel(),
            stderr.ravel(),
            np.broadcast_to(math.inf if degrees is None else degrees, stderr.shape).ravel(),
        )
    return row


def _error_columns(errors: Array, dim: int) -> dict[str, Any]:
    """The columns of the items' errors (n,) in bits/dim, NaN where none is known."""
    absolute = np.abs(errors)
    known = absolute[np.isfinite(absolute)]
    (low, high), (mae_low, mae_high) = bootstrap_intervals(np.stack([errors, absolute]))
    nats = known * dim * math.log(2.0)
    return {
        "bpd_error": _nanmean(errors),
        "bpd_error_lo": low,
        "bpd_error_hi": high,
        "bpd_mae": _nanmean(absolute),
        "bpd_mae_lo": max(mae_low, 0.0) if math.isfinite(mae_low) else mae_low,
        "bpd_mae_hi": mae_high,
        "bpd_rmse": math.sqrt(_nanmean(errors**2)),
        "bpd_err_p95": float(np.quantile(known, 0.95)),
        "extra": {
            "abs_nats_median": float(np.median(nats)),
            "abs_nats_mean": float(nats.mean()),
            "abs_nats_max": float(nats.max()),
        },
    }


def _of_all(
    errors: Array, judged: NDArray[np.bool_], unanswered: Callable[[], float] | None
) -> dict[str, float]:
    """Mean |error| of all items with a reference (n,), those without an answer counted at what `unanswered` gives."""
    absolute = np.abs(errors[judged])
    missing = ~np.isfinite(absolute)
    if missing.any():
        if unanswered is None:
            return {}
        absolute[missing] = unanswered()
    ((low, high),) = bootstrap_intervals(absolute)
    return {
        "bpd_mae_all": _nanmean(absolute),
        "bpd_mae_all_lo": max(low, 0.0) if math.isfinite(low) else low,
        "bpd_mae_all_hi": high,
    }


def _mean(values: Array) -> Array:
    """Mean over the draws that are known, (n,)."""
    known = np.isfinite(values)
    size = known.sum(axis=0)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.asarray(np.where(size > 0, total / np.maximum(size, 1), np.nan))


def _nanmean(values: Array) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else math.nan


def _standard_error(values: Array) -> float:
    values = values[np.isfinite(values)]
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
