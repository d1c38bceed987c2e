"""Mean and covariance of the training images of a data set, with the noise of the dequantisation added exactly.

The covariance is summed over whole numbers, so its rounding depends on neither threads nor libraries, and eigenvectors
are turned so that their largest entry is positive. What was found is kept in the cache folder, by the images' hash.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik_models.checkpoints import CheckpointError
from flowlik_models.files import no_room
from flowlik_models.images import cache_dir, open_images
from flowlik_models.interfaces import Moments
from flowlik_models.moments.moments import FULL_LIMIT, load, save

EXACT = 2**24  # whole numbers up to here have exact sums in float32
ROWS = 1024
Say = Callable[[str], None]
Chunks = Callable[[], Iterable[NDArray[np.uint8]]]


@dataclass(frozen=True)
class Voice:
    """Where lines about the progress go: no part of what a cache is keyed by."""

    say: Say = field(compare=False)


def image_moments(data_set: str, *, say: Say = lambda _: None) -> Moments:
    """Moments of the training images of a data set of the catalogue, eigenvalues ascending.

    Args:
        data_set: "mnist", "fashion-mnist" or "cifar10".
        say: called with lines about the progress, where they are not known already.

    Raises:
        MissingDataError, DataError: the images are not there, or not as published. ValueError: too many dimensions for
            a whole covariance.
    """
    images = open_images(data_set, "train")
    dim = int(np.prod(images.event_shape))
    if dim > FULL_LIMIT:
        raise ValueError(
            f"moments of {data_set}: {dim} dimensions, whole covariances are kept up to {FULL_LIMIT}"
        )
    return _moments(data_set, images.identity, Voice(say))


@lru_cache(maxsize=2)
def _moments(data_set: str, identity: str, voice: Voice) -> Moments:
    file = cache_dir() / "moments" / f"{data_set}-{identity}.safetensors"
    images = open_images(data_set, "train")
    try:
        return load(file, images.event_shape, identity)
    except CheckpointError:
        pass  # none yet, or a damaged one: made again
    found = moments_of(lambda: images.chunks(ROWS), images.data_set.levels, identity, say=voice.say)
    try:
        save(file, found)
    except OSError as error:
        warnings.warn(f"the moments of {data_set} are not kept: {no_room(file, error)}", stacklevel=2)
    return found


def moments_of(chunks: Chunks, n_levels: int, data_hash: str, *, say: Say = lambda _: None) -> Moments:
    """Moments of images that ``chunks`` yields as arrays (n, ...) of levels 0..n_levels - 1, scaled to [-1, 1]."""
    say("covariance of the training images")
    mean, covariance = _sums(chunks, n_levels)
    say(f"its eigenvectors, in {len(mean)} dimensions")
    values, vectors = torch.linalg.eigh(covariance)
    peak = vectors.abs().argmax(0)
    vectors = vectors * vectors.gather(0, peak[None]).sign()
    values = values.clamp(min=noise_variance(n_levels))  # only rounding brings one below
    return Moments(mean.numpy(), values.numpy(), vectors.numpy(), data_hash)


def noise_variance(n_levels: int) -> float:
    """Variance of the dequantisation noise of one pixel in [-1, 1], ``(2/L)^2/12``."""
    return (2 / n_levels) ** 2 / 12


def _sums(chunks: Chunks, n_levels: int) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) from exact sums of whole numbers, float64."""
    middle = n_levels // 2
    rows = EXACT // middle**2
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for chunk in chunks():
        for part in torch.split(as_rows(chunk), rows):
            centred = part.float() - middle
            count += len(part)
            total = total + centred.sum(0).double()
            square = square + (centred.T @ centred).double()
    scale = 2 / n_levels
    average = total / count
    covariance = scale**2 * (square / count - torch.outer(average, average))
    covariance.diagonal().add_(noise_variance(n_levels))
    return scale * (average + middle + 0.5) - 1, covariance


def as_rows(chunk: NDArray[np.uint8]) -> Tensor:
    """(n, ...) levels as a tensor of rows."""
    return torch.from_numpy(chunk.reshape(len(chunk), -1).copy())  # mapped files cannot be written to
