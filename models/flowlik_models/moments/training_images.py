"""The training images of a task: grey levels held in memory as bytes, and their moments."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flowlik_models.images import CATALOG, open_images
from flowlik_models.images.digits import DIGITS_LEVELS, data_hash, digits, mean_and_covariance
from flowlik_models.images.pixels import continuous
from flowlik_models.moments.images import image_moments

IMAGE_SHAPES: dict[str, tuple[int, int, int]] = {
    "digits": (1, 8, 8),
    "digits-flow": (1, 8, 8),
    **{name: CATALOG[name].event_shape for name in ("fashion-mnist", "cifar10")},
}
"""Shapes of the tasks on images that have recipes."""


@dataclass(frozen=True, eq=False)
class TrainingImages:
    """``levels`` (n, *event) uint8 in 0..n_levels - 1, or with ``n_levels`` 0 points that are continuous already;
    ``flips``: mirrored images are as likely; ``identity`` names the images; ``labels`` (n,) int64 where they are known.
    """

    levels: Tensor
    n_levels: int
    flips: bool
    identity: str
    labels: Tensor | None = None

    def points(self, levels: Tensor, generator: torch.Generator) -> Tensor:
        """Some of the images (n, *event) as points, freshly dequantised on the generator's device."""
        if not self.n_levels:
            return levels
        noise = torch.rand(levels.shape, generator=generator, device=generator.device)
        return continuous(levels, self.n_levels, noise)


@lru_cache(maxsize=1)
def training_images(task: str) -> TrainingImages:
    """All training images of a task of `IMAGE_SHAPES`.

    Raises:
        MissingDataError, DataError: the files are not there, or not as published.
    """
    if task == "digits":
        levels, labels = digits("train")
        return TrainingImages(levels, DIGITS_LEVELS, False, data_hash("digits", "train"), labels)
    images = open_images(task, "train")
    levels = images.pixels(range(len(images)))
    kind = images.data_set
    return TrainingImages(levels, kind.levels, kind.flips, images.identity, images.labels)


def labelled(task: str, split: str) -> tuple[Tensor, Tensor]:
    """Levels (n, *event) uint8 and classes (n,) int64 of a split, all in memory; errors as of `training_images`."""
    if task == "digits":
        return digits(split)
    images = open_images(task, split)
    return images.pixels(range(len(images))), images.labels


def training_moments(task: str) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (d,), eigenvalues (d,) and eigenvectors (d, d; columns) of the dequantised training images.

    Raises:
        MissingDataError, DataError: the files are not there, or not as published.
    """
    if task == "digits":
        mean, covariance = mean_and_covariance(digits("train")[0], DIGITS_LEVELS)
        return (mean, *torch.linalg.eigh(covariance))
    found = image_moments(task)
    mean, values, vectors = map(torch.from_numpy, (found.mean, found.eigenvalues, found.eigenvectors))
    return mean, values, vectors
