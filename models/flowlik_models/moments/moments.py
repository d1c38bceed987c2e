"""Mean and covariance of a training split: estimated, checked, kept beside a checkpoint, attached to a model.

Up to `FULL_LIMIT` dimensions the covariance is kept whole, as its eigenvalues and eigenvectors; beyond, or where a
``rank`` is given, as its largest eigenpairs and one variance for all other directions, which keeps the trace
(probabilistic PCA, Tipping and Bishop 1999). Estimators that whiten divide by these variances, so none may be zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import scipy
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik_models.checkpoints import CheckpointError, read_tensors, save_tensors, tensors_digest
from flowlik_models.interfaces import HasMoments, Moments

__all__ = ["FULL_LIMIT", "attach", "check", "estimate", "from_covariance", "load", "save"]
FULL_LIMIT = 3072
"""The largest number of dimensions whose covariance is kept whole: 32 x 32 pixels in three colours."""

Array = NDArray[np.float64]
Model = TypeVar("Model")


def estimate(
    x: Tensor | np.ndarray, data_hash: str, rank: int | None = None, *, floor: float | None = None
) -> Moments:
    """Moments of the rows of x, (n, d) or images (n, *event).

    With ``rank`` the covariance is never formed: its largest eigenpairs come from Lanczos iterations, two products
    with x each.

    Args:
        x: the training split, dequantised where it is discrete.
        data_hash: names the split.
        rank: number of eigenpairs kept; None keeps all.
        floor: smallest variance; smaller ones are raised to it.

    Raises:
        ValueError: fewer than two rows, NaN or infinity in x, a rank that does not fit or that is missing beyond
            `FULL_LIMIT` dimensions, or a singular covariance where no floor is given.

    >>> found = estimate(np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]]), "four points")
    >>> found.mean.tolist(), [round(value, 3) for value in found.eigenvalues.tolist()]
    ([1.0, 2.0], [1.0, 4.0])
    """
    flat = np.asarray(x, dtype=np.float64)
    flat = flat.reshape(len(flat), -1)
    if len(flat) < 2:
        raise ValueError(f"moments need at least 2 rows, got {len(flat)}")
    if not np.isfinite(flat).all():
        raise ValueError("moments of x: x holds NaN or infinity")
    dim = flat.shape[1]
    _check_rank(rank, dim)
    mean = flat.mean(0)
    centred = flat - mean
    if rank is None or rank > dim // 2:  # Lanczos pays for a few pairs only
        return from_covariance(mean, centred.T @ centred / len(flat), data_hash, rank, floor=floor)
    total = float(np.square(centred).sum()) / len(flat)
    return _finished(mean, *_largest(centred, rank), total, data_hash, floor)


def from_covariance(
    mean: Tensor | np.ndarray,
    cov: Tensor | np.ndarray,
    data_hash: str,
    rank: int | None = None,
    *,
    floor: float | None = None,
) -> Moments:
    """Moments with the given mean (d,) and covariance (d, d); ``rank``, ``floor`` and errors as in `estimate`.

    Raises:
        ValueError: shapes that do not fit, a covariance that is not symmetric or has a negative eigenvalue, or as
            `estimate`.

    >>> from_covariance(np.zeros(2), np.diag([1.0, 4.0]), "made up").eigenvalues.tolist()
    [1.0, 4.0]
    """
    mean, cov = np.asarray(mean, dtype=np.float64), np.asarray(cov, dtype=np.float64)
    if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise ValueError(f"mean must be (d,) and cov (d, d); got {mean.shape} and {cov.shape}")
    _check_rank(rank, len(mean))
    scale = float(np.abs(cov).max())
    if not np.isfinite(cov).all() or not np.isfinite(mean).all():
        raise ValueError("mean and covariance must be finite")
    if float(np.abs(cov - cov.T).max()) > 1e-6 * scale:
        raise ValueError("the covariance is not symmetric")
    values, vectors = np.linalg.eigh((cov + cov.T) / 2)
    keep = slice(len(mean) - (rank or len(mean)), None)
    return _finished(mean, values[keep], vectors[:, keep], float(np.trace(cov)), data_hash, floor)


def save(path: Path, moments: Moments) -> None:
    """Write moments to ``path`` as safetensors, whole or not at all."""
    arrays = {"mean": moments.mean, "eigenvalues": moments.eigenvalues, "eigenvectors": moments.eigenvectors}
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    if moments.rest is not None:
        tensors["rest"] = torch.tensor(moments.rest, dtype=torch.float64)
    save_tensors(path, tensors, {"data_hash": moments.data_hash, "digest": tensors_digest(tensors)})


def load(path: Path, event_shape: Sequence[int] | None = None, data_hash: str | None = None) -> Moments:
    """Moments read from ``path``, of that event shape and that split where they are given.

    Raises:
        CheckpointError: the file is missing, damaged, altered, no file of moments, or not the moments asked for; the
            message names it.
    """
    tensors, metadata = read_tensors(path)
    missing = {"mean", "eigenvalues", "eigenvectors"} - set(tensors)
    found = metadata.get("data_hash")
    if missing or found is None:
        what = f"tensor {min(missing)!r}" if missing else "data hash"
        raise CheckpointError(f"{path}: expected a file of moments, found no {what}")
    if metadata.get("digest") != tensors_digest(tensors):
        raise CheckpointError(f"{path}: altered since it was written")
    arrays = {name: tensor.double().numpy() for name, tensor in tensors.items()}
    rest = float(arrays["rest"]) if "rest" in arrays else None
    moments = Moments(arrays["mean"], arrays["eigenvalues"], arrays["eigenvectors"], found, rest)
    try:
        check(moments, event_shape, data_hash)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return moments


def check(moments: Moments, event_shape: Sequence[int] | None = None, data_hash: str | None = None) -> None:
    """Raise ValueError unless these are moments: of that event shape and of that split, where they are given.

    Eigenvectors are tested for orthonormality on one vector, which costs two products instead of d.
    """
    mean, values, vectors = moments.mean, moments.eigenvalues, moments.eigenvectors
    if data_hash is not None and moments.data_hash != data_hash:
        raise ValueError(f"moments of data {moments.data_hash}, expected those of data {data_hash}")
    if mean.ndim != 1 or values.ndim != 1 or vectors.shape != (len(mean), len(values)):
        shapes = f"{mean.shape}, {values.shape} and {vectors.shape}"
        raise ValueError(f"moments must be mean (d,), eigenvalues (k,) and eigenvectors (d, k); got {shapes}")
    dim = len(mean)
    if event_shape is not None and math.prod(event_shape) != dim:
        raise ValueError(
            f"moments of {dim} dimensions, expected {math.prod(event_shape)} {tuple(event_shape)}"
        )
    if (moments.rest is None) != (len(values) == dim):
        kept = f"{len(values)} of {dim} eigenvectors"
        raise ValueError(f"moments with {kept} {'need' if moments.rest is None else 'have no'} rest variance")
    if not all(np.isfinite(array).all() for array in (mean, values, vectors)):
        raise ValueError("moments hold NaN or infinity")
    smallest = min([*values.tolist(), math.inf if moments.rest is None else moments.rest])
    if not smallest > 0.0:
        raise ValueError(f"singular covariance: its smallest eigenvalue is {smallest:.3g}")
    probe = np.ones(len(values))
    if float(np.abs(vectors.T @ (vectors @ probe) - probe).max()) > 1e-4:
        raise ValueError("the eigenvectors of the moments are not orthonormal")


def attach(model: Model, moments: Moments) -> Model:
    """The same model with ``moments`` as its attribute.

    Raises:
        ValueError: the moments are not of the model's event shape.

    >>> from flowlik_models.synthetic import closed_form
    >>> model = attach(closed_form("gmm-2d"), from_covariance(np.zeros(2), np.eye(2), "made up"))
    >>> model.moments.data_hash
    'made up'
    """
    check(moments, getattr(model, "event_shape", None))
    held = cast(HasMoments, model)
    held.moments = moments
    return model


def _check_rank(rank: int | None, dim: int) -> None:
    if rank is None and dim > FULL_LIMIT:
        raise ValueError(f"a full covariance is kept up to {FULL_LIMIT} dimensions, got {dim}: give a rank")
    if rank is not None and not 1 <= rank <= dim:
        raise ValueError(f"rank must be between 1 and {dim}, got {rank}")


def _largest(centred: Array, rank: int) -> tuple[Array, Array]:
    """The largest eigenvalues, ascending, and eigenvectors of the covariance of centred rows."""
    count, dim = centred.shape
    operator = scipy.sparse.linalg.LinearOperator(
        (dim, dim), matvec=lambda v: centred.T @ (centred @ v) / count, dtype=np.float64
    )
    start = np.random.default_rng(0).standard_normal(dim)  # any start but an unlucky one gives the same pairs
    values, vectors = scipy.sparse.linalg.eigsh(operator, k=rank, which="LA", v0=start)
    order = np.argsort(values)
    return values[order], vectors[:, order]


def _finished(
    mean: Array, values: Array, vectors: Array, total: float, data_hash: str, floor: float | None
) -> Moments:
    """Moments with the variance left for the other directions, floored, refused where singular."""
    dim, rank = len(mean), len(values)
    rest = None if rank == dim else (total - float(values.sum())) / (dim - rank)
    held = np.append(values, [] if rest is None else rest)
    rounding = dim * float(np.finfo(np.float64).eps) * max(float(held.max()), 0.0)
    smallest = float(held.min())
    if smallest < -rounding:
        raise ValueError(f"no covariance: its smallest eigenvalue is {smallest:.3g}")
    if floor is not None and not floor > 0.0:
        raise ValueError(f"floor must be positive, got {floor}")
    if floor is None and smallest <= rounding:
        raise ValueError(
            f"singular covariance: its smallest eigenvalue is {smallest:.3g}, the largest {held.max():.3g}; "
            "give a floor, the smallest variance to use"
        )
    moments = Moments(mean, values, vectors, data_hash, rest)
    if floor is None:
        return moments
    return replace(moments, eigenvalues=values.clip(floor), rest=None if rest is None else max(rest, floor))
