"""Moments of a user's training rows, kept in the cache folder.

The covariance is whole up to `FULL_LIMIT` dimensions where there are more rows than dimensions; else of low rank, since
so few rows leave most directions without variance, and their largest eigenvalues are far too large.

The noise of the dequantisation is added exactly. Where the rows leave directions without variance these get
`LEAST_SHARE` of the mean variance, since estimators that whiten divide by it.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import numpy as np

from flowlik.tasks.own.reading import Rows
from flowlik_models.checkpoints import CheckpointError
from flowlik_models.images import cache_dir
from flowlik_models.interfaces import Moments
from flowlik_models.moments.images import noise_variance
from flowlik_models.moments.moments import FULL_LIMIT, estimate, from_covariance, load, save

RANK, RANK_ROWS = 64, 2048
"""Most eigenpairs of a covariance of low rank, and the first so many rows that they come from: 200 MB at 12,288
dimensions."""

ROWS_A_PAIR = 32
"""Rows to one of these eigenpairs. Of isotropic data the pairs then hold 4 to 6 % of the variance, which they take from
the other directions, at 12,288 dimensions; one pair a row would hold all of it."""

LEAST_SHARE = 1e-6
CACHED_DIMS = 256
"""From here on finding the eigenvectors takes longer than reading them."""


def moments_of_rows(rows: Rows, levels: int | None, data_hash: str) -> Moments:
    """Mean, eigenvalues and eigenvectors of the rows as the models see them, at t = 1.

    Raises:
        ValueError: fewer than two rows, or rows that are all the same.
    """
    if rows.n < 2:
        raise ValueError(f"{rows.name}: {rows.n} row, moments need at least 2")
    dim = math.prod(rows.event_shape)
    if dim < CACHED_DIMS:
        return _found(rows, levels, data_hash, dim)
    file = cache_dir() / "moments" / f"own-{data_hash}.safetensors"
    try:
        return load(file, rows.event_shape, data_hash)
    except CheckpointError:
        pass  # none yet, or a damaged one: made again
    found = _found(rows, levels, data_hash, dim)
    with contextlib.suppress(OSError):  # found again the next time
        save(file, found)
    return found


def _found(rows: Rows, levels: int | None, data_hash: str, dim: int) -> Moments:
    scale, shift = (1.0, 0.0) if levels is None else (2.0 / levels, 1.0 / levels - 1.0)
    noise = 0.0 if levels is None else noise_variance(levels)
    if dim > FULL_LIMIT or rows.n <= dim:
        kept = replace(rows, n=min(rows.n, RANK_ROWS))
        x = np.concatenate([part.reshape(len(part), -1) for _, part in kept.chunks()]).astype(np.float64)
        floor = _floor(float(x.var(0).sum()) * scale**2 + noise * dim, dim, rows.name)
        rank = max(1, min(RANK, kept.n // ROWS_A_PAIR))
        found = estimate(x * scale + shift, data_hash, rank, floor=floor)
        assert found.rest is not None
        return replace(found, eigenvalues=found.eigenvalues + noise, rest=found.rest + noise)
    total, count = np.zeros(dim), rows.n
    for _, part in rows.chunks():
        total += part.reshape(len(part), -1).sum(0, dtype=np.float64)
    mean, square = total / count, np.zeros((dim, dim))
    for _, part in rows.chunks():
        centred = part.reshape(len(part), -1).astype(np.float64) - mean
        square += centred.T @ centred
    covariance = scale**2 * square / count + noise * np.eye(dim)
    floor = _floor(float(np.trace(covariance)), dim, rows.name)
    return from_covariance(scale * mean + shift, covariance, data_hash, floor=floor)


def _floor(trace: float, dim: int, name: str) -> float:
    if not trace > 0.0:
        raise ValueError(f"{name}: all rows are the same, so there is nothing to model")
    return LEAST_SHARE * trace / dim
