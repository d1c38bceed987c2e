"""scikit-learn's digits as a task, and samples of the exact flow that learned them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.closed_forms import BLOCK, ClosedFormTask
from flowlik.tasks.points import Points, chunks, whole
from flowlik.tasks.stored_references import stored_log_prob, stored_samples
from flowlik.tasks.task import DRAW_STRIDE, Items, Reference, Task, UnavailableError, digest, tensor_hash
from flowlik_models.flow_samples import flow_hash, known_flow, log_density, samples
from flowlik_models.flow_samples import mean_and_covariance as moments_of_samples
from flowlik_models.images.digits import data_hash, digits, mean_and_covariance
from flowlik_models.images.pixels import dequantise
from flowlik_models.networks.autoregressive import AutoregressiveFlow
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


@dataclass(frozen=True, kw_only=True)
class FlowSamplesTask(ClosedFormTask):
    """Samples of the exact flow that was trained on real images: its own log p, at t = 1, is their truth.

    Bits/dim are those of the images' grey levels, so that both can be compared; the samples are continuous and go
    beyond [-1, 1]. The flow itself is the model ``closed-form``, for the family `exact-flow`.
    """

    @cached_property
    def truth(self) -> AutoregressiveFlow:
        """The flow, float64."""
        return known_flow(self.id)

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """The flow as any network, in float32; other models as every task's."""
        loaded, name = super().load_model(model, device)
        return loaded.float() if model == "closed-form" else loaded, name

    def dequantises(self, split: str) -> bool:
        """Samples are continuous."""
        return False

    def _points(self, split: str, n: int) -> tuple[Tensor, None]:
        return samples(self.id, split, n), None

    def log_density(self, x: Tensor | Points, t: float) -> Array:
        """The flow's exact log p in float64, in pieces that fit in memory; UnavailableError for t before 1."""
        if t != 1.0:
            raise UnavailableError(f"the density of {self.id} is known at t = 1, not at {t}; take eps=0")
        return torch.cat([log_density(self.id, part) for part in chunks(x, BLOCK)]).numpy()

    def data_hash(self, split: str) -> str:
        """Names the flow, the split and how its samples are drawn."""
        return digest(flow_hash(self.id), self.version, split)

    def moments(self) -> tuple[Array, Array]:
        """Moments of the first 2,048 training samples."""
        mean, covariance = moments_of_samples(self.id)
        return mean.numpy(), covariance.numpy()


DIGITS_FLOW = FlowSamplesTask(
    id="digits-flow",
    event_shape=(1, 8, 8),
    levels=17,
    description="samples of the exact flow of the digits, whose own density is their truth; 2.01 bits/dim",
)
