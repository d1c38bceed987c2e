"""scikit-learn's digits as a task."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.points import whole
from flowlik.tasks.stored_references import stored_log_prob, stored_samples
from flowlik.tasks.task import DRAW_STRIDE, Items, Reference, Task, UnavailableError, digest, tensor_hash
from flowlik_models.images.digits import data_hash, digits, mean_and_covariance
from flowlik_models.images.pixels import dequantise
from flowlik_models.numerics.random import uniform


@dataclass(frozen=True, kw_only=True)
class DigitsTask(Task):
    """scikit-learn's 8x8 digits in 17 grey levels, uniformly dequantised: z = 2 (k + U)/17 - 1.

    The noise is keyed by image and draw, so every estimator sees the same points. The reference is the teacher's
    converged likelihood of the first draw of the first images of each split (`flowlik reference digits`). Models that
    have ``classes`` are given the images' labels (`for_model`), the others are not.
    """

    key: int = 17_081
    levels: int | None = field(default=17)
    labelled: bool = False

    def for_model(self, model: Any) -> DigitsTask:
        """With the labels, where the model has ``classes``."""
        return replace(self, labelled=getattr(model, "classes", None) is not None)

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n images of a split as float32 points, `draws` dequantisations of each."""
        self.check_split(split)
        if split == "teacher-samples":
            if self.labelled:
                raise UnavailableError(
                    f"the samples of {self.reference_model} have no labels; take split test"
                )
            return stored_samples(self, n)
        images = self.images(split)[:n]
        x = torch.cat([self.dequantise(images, split, draw) for draw in range(draws)])
        ids = torch.cat([torch.arange(len(images)) + draw * DRAW_STRIDE for draw in range(draws)])
        cond = self.labels(split)[:n].repeat(draws) if self.labelled else None
        return Items(x=x, ids=ids, n=len(images), draws=draws, cond=cond)

    def images(self, split: str) -> Tensor:
        """Grey levels 0..16 of a split, (n, 1, 8, 8) uint8."""
        levels: Tensor = digits(split)[0]
        return levels

    def labels(self, split: str) -> Tensor:
        """The digit of each image of a split, (n,) int64."""
        labels: Tensor = digits(split)[1]
        return labels

    def sample_conditions(self, split: str, ids: Tensor) -> Tensor | None:
        """Labels drawn from those of the split, for models that are given labels."""
        if not self.labelled:
            return None
        labels = self.labels(split)
        return labels[(uniform(self.key, ids, (), dtype=torch.float64) * len(labels)).long()]

    def dequantise(self, images: Tensor, split: str, draw: int) -> Tensor:
        """z = 2 (k + U)/17 - 1 with noise keyed by image and draw, float32."""
        key = self.key + self.splits.index(split)
        ids = torch.arange(len(images))
        noise = uniform(key, ids, self.event_shape, stream=draw, dtype=torch.float64)
        return dequantise(images, 17, noise).float()

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The stored converged likelihoods of the teacher; NaN for images and draws that have none."""
        return stored_log_prob(self, split, items, t)

    def data_hash(self, split: str) -> str:
        """Names the images and the dequantisation noise; for the teacher's samples, the samples."""
        if split == "teacher-samples":
            return tensor_hash(whole(self.items(split, 10**9).x))

        return digest(data_hash(self.id, split), self.version, self.key, split)

    def real_samples(self) -> Tensor | None:
        """All training images, dequantised once."""
        return self.dequantise(self.images("train"), "train", 0)

    def moments(self) -> tuple[Array, Array]:
        """Moments of the training images with the dequantisation noise added exactly."""
        mean, covariance = mean_and_covariance(self.images("train"), 17)
        return mean.numpy(), covariance.numpy()


DIGITS = DigitsTask(
    id="digits",
    event_shape=(1, 8, 8),
    splits=("test", "train", "teacher-samples"),
    reference_model="teacher",
    description="scikit-learn's 8x8 digits, 17 grey levels, uniformly dequantised",
)
