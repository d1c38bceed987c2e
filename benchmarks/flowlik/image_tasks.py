"""Tasks on real images, and on the mixtures fitted to them, whose likelihood is exact.

Image files are the user's own (`flowlik_models.images`): where they are missing a cell is skipped, and its reason ends
with the cure. Points are made batch by batch, in a fixed shuffled order, so the first n are like all of them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowlik.points import Points, pieces, whole
from flowlik.tasks import (
    DRAW_STRIDE,
    Array,
    Items,
    Reference,
    Task,
    UnavailableError,
    digest,
    seed_of,
    tensor_hash,
)

if TYPE_CHECKING:
    from flowlik_models.images import ImageSet
    from flowlik_models.interfaces import Moments
    from flowlik_models.shared_basis import SharedBasisMixture

TEACHER_SAMPLES = "teacher-samples"
EXACT_ROWS = 256
REAL_SAMPLES = 10_000


@contextmanager
def _skipped_where_missing() -> Iterator[None]:
    from flowlik_models.images import MissingDataError

    try:
        yield
    except MissingDataError as error:
        raise UnavailableError(str(error)) from None


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr)  # noqa: T201 - minutes of silence would look like a hang


# --- images -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageTask(Task):
    """Images of one of the data sets of `flowlik_models.images`, uniformly dequantised: z = 2 (k + U)/256 - 1.

    The noise is keyed by image and draw, so every estimator sees the same points. The reference is the converged
    likelihood of the task's teacher, where there is one.
    """

    key: int = 25_601
    levels: int | None = 256
    reference_model: str = "teacher"

    @property
    def eight_bit_images(self) -> bool:
        """True."""
        return True

    def images(self, split: str) -> ImageSet:
        """The images of a split, verified; UnavailableError where they are not there."""
        from flowlik_models.images import open_images

        self.check_split(split)
        with _skipped_where_missing():
            return open_images(self.id, split)

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n images of the split's order, ``draws`` dequantisations of each, made when they are asked for."""
        if split == TEACHER_SAMPLES:
            return self._teacher_samples(n)
        images = self.images(split)
        return _dequantised(images, min(n, len(images)), draws, self.key + self.splits.index(split))

    def _teacher_samples(self, n: int) -> Items:
        self.check_split(TEACHER_SAMPLES)
        self._need_teacher()
        from flowlik.references import stored_samples

        return stored_samples(self, n)

    def _need_teacher(self) -> None:
        if not self.has_model(self.reference_model):
            cure = (
                f": flowlik train {self.id} teacher, then flowlik reference {self.id}" if self.models else ""
            )
            raise UnavailableError(f"{self.id} has no teacher yet, so there is no reference likelihood{cure}")

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The stored converged likelihoods of the teacher; UnavailableError where there is none."""
        self._need_teacher()
        from flowlik.references import stored_log_prob

        return stored_log_prob(self, split, items, t)

    def data_hash(self, split: str) -> str:
        """Names the images and the dequantisation noise; for the teacher's samples, the samples."""
        if split == TEACHER_SAMPLES:
            return tensor_hash(whole(self._teacher_samples(10**9).x))
        return digest(self.images(split).identity, self.version, self.key, split)

    def real_samples(self) -> Tensor | None:
        """Training images, dequantised once."""
        images = self.images("train")
        return images.batch(torch.from_numpy(_order(len(images))[:REAL_SAMPLES]), key=self.key)

    def data_moments(self) -> Moments:
        """Moments of all training images with the dequantisation noise added exactly."""
        from flowlik_models.image_moments import image_moments

        with _skipped_where_missing():
            return image_moments(self.id, say=_on_stderr)

    def moments(self) -> tuple[Array, Array]:
        """The same as mean and covariance."""
        found = self.data_moments()
        return found.mean, found.eigenvectors * found.eigenvalues @ found.eigenvectors.T


@lru_cache(maxsize=4)
def _order(n: int) -> Any:
    from flowlik_models.images import evaluation_order

    return evaluation_order(n)


def _dequantised(images: ImageSet, n: int, draws: int, key: int) -> Items:
    """Draw after draw of the first n images in the fixed order; the noise is keyed by the place in that order."""
    order = _order(len(images))

    def rows(start: int, stop: int) -> Tensor:
        made = [torch.empty(0, *images.event_shape, dtype=torch.float32)]
        for draw in range(start // n, -(-stop // n)):
            ids = torch.arange(max(start, draw * n), min(stop, (draw + 1) * n)) - draw * n
            made.append(images.batch(torch.from_numpy(order[ids.numpy()]), key=key, draw=draw, items=ids))
        return torch.cat(made)

    ids = torch.cat([torch.arange(n) + draw * DRAW_STRIDE for draw in range(draws)])
    return Items(x=Points(rows, n * draws, images.event_shape, torch.float32), ids=ids, n=n, draws=draws)


# --- mixtures fitted to images ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ImageMixtureTask(Task):
    """A mixture fitted to real images: the splits test and train are its draws, ``images`` the real test images.

    The exact likelihood is known of both. Bits/dim are those of 256 (digits: 17) levels everywhere, so that draws and
    images can be compared.
    """

    key: int = 25_602
    splits: tuple[str, ...] = ("test", "train", "images")
    block: int = 256

    @property
    def models(self) -> tuple[str, ...]:
        """The closed form alone."""
        from flowlik_models.zoo import TASK_MODELS

        return ("closed-form", *TASK_MODELS.get(self.id, ()))

    @property
    def has_components(self) -> bool:
        """True; real images have none."""
        return True

    @property
    def truth(self) -> SharedBasisMixture:
        """The closed form, float64; fitted on the first call. UnavailableError where the images are not there."""
        return self._fitted()[0]

    def _fitted(self) -> tuple[SharedBasisMixture, Moments]:
        from flowlik_models.image_mixtures import image_mixture

        with _skipped_where_missing():
            return image_mixture(self.id, say=_on_stderr)

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """The closed form on that device and the name of its fit; other models as every task's."""
        if model != "closed-form":
            return super().load_model(model, device)
        truth, moments = self._fitted()
        held = truth if device == "cpu" else copy.deepcopy(truth).to(device)
        return held.eval(), moments.data_hash

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n draws of the split's stream, or the first n test images, made when they are asked for."""
        self.check_split(split)
        if split == "images":
            return self._real(n, draws)
        truth = self.truth

        def rows(start: int, stop: int) -> Tensor:
            first, last = start // self.block, -(-stop // self.block)
            x = torch.cat(
                [_block(truth, self._seed(split, block), self.block) for block in range(first, last)]
            )
            return x[start - first * self.block : stop - first * self.block]

        blocks = range(-(-n // self.block))
        generators = [torch.Generator().manual_seed(self._seed(split, block)) for block in blocks]
        component = torch.cat([truth.draw_components(self.block, generator) for generator in generators])
        x = Points(rows, n, self.event_shape, torch.float64)
        return Items(x=x, ids=torch.arange(n), n=n, component=component[:n].numpy().astype(np.int64))

    def _seed(self, split: str, block: int) -> int:
        return seed_of(self.id, self.version, split, block)

    def _real(self, n: int, draws: int) -> Items:
        from flowlik_models.image_mixtures import IMAGES_OF

        source = IMAGES_OF[self.id]
        if source == "digits":
            return _digits_items(n, draws)
        with _skipped_where_missing():
            from flowlik_models.images import open_images

            images = open_images(source, "test")
        return _dequantised(images, min(n, len(images)), draws, self.key)

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The exact log p_t of the points, in float64."""
        values = self.log_density(items.x, t).reshape(items.draws, items.n)
        return Reference(log_prob=values, ref_id="closed-form", error=0.0, digest="closed-form")

    def log_density(self, x: Tensor | Points, t: float) -> Array:
        """Exact log p_t in float64, in pieces that fit in memory."""
        truth = self.truth
        with torch.no_grad():
            values = [truth.log_prob(part.double().cpu(), t) for part in pieces(x, EXACT_ROWS)]
        return np.asarray(torch.cat(values).numpy(), dtype=np.float64)

    def data_hash(self, split: str) -> str:
        """Names the fit, the split and how its points are drawn."""
        from flowlik_models.image_mixtures import mixture_hash

        with _skipped_where_missing():
            return digest(mixture_hash(self.id), self.version, self.key, split)

    def data_moments(self) -> Moments:
        """Moments of the images that the mixture was fitted to, in the mixture's own basis."""
        return self._fitted()[1]

    def moments(self) -> tuple[Array, Array]:
        """Exact moments of the mixture."""
        return _mixture_moments(self.truth)


@lru_cache(maxsize=2)
def _block(truth: SharedBasisMixture, seed: int, size: int) -> Tensor:
    """A block of draws; the last ones are kept, since batches and blocks need not have the same ends."""
    return truth.sample(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@lru_cache(maxsize=1)
def _mixture_moments(truth: SharedBasisMixture) -> tuple[Array, Array]:
    mean, covariance = truth.mean_and_covariance()
    return mean.numpy(), covariance.numpy()


def _digits_items(n: int, draws: int) -> Items:
    from flowlik.tasks import get_task

    return get_task("digits").items("test", n, draws)


def image_tasks() -> tuple[Task, ...]:
    """The built-in tasks on images; those that have recipes for a teacher have its samples as a split."""
    from flowlik_models.training_images import IMAGE_SHAPES

    def real(name: str, shape: tuple[int, int, int], text: str) -> ImageTask:
        splits = ("test", "train", TEACHER_SAMPLES) if name in IMAGE_SHAPES else ("test", "train")
        return ImageTask(
            id=name, event_shape=shape, splits=splits, description=f"{text}; files: flowlik data"
        )

    def mixture(
        name: str, shape: tuple[int, int, int], levels: int, text: str, measured: str
    ) -> ImageMixtureTask:
        described = f"mixture fitted to {text}, exact likelihood; {measured}"
        return ImageMixtureTask(id=name, event_shape=shape, levels=levels, description=described)

    return (
        mixture("digits-gmm", (1, 8, 8), 17, "the digits in 64 dimensions", MEASURED["digits-gmm"]),
        mixture(
            "fashion-mnist-gmm",
            (1, 28, 28),
            256,
            "Fashion-MNIST in 784 dimensions",
            MEASURED["fashion-mnist-gmm"],
        ),
        mixture("cifar10-gmm", (3, 32, 32), 256, "CIFAR-10 in 3072 dimensions", MEASURED["cifar10-gmm"]),
        real("mnist", (1, 28, 28), "MNIST, 28x28 grey levels"),
        real("fashion-mnist", (1, 28, 28), "Fashion-MNIST, 28x28 grey levels"),
        real("cifar10", (3, 32, 32), "CIFAR-10, 32x32 colours"),
        real("imagenet64", (3, 64, 64), "ImageNet 64x64, colours"),
    )


MEASURED = {
    "digits-gmm": "2.81 bits/dim, div/d down to -3",
    "fashion-mnist-gmm": "6.15 bits/dim, div/d down to -6",
    "cifar10-gmm": "4.35 bits/dim, div/d down to -27",
}
"""Of the mixtures' own draws: bits/dim, and the least mean of div v/d over the draws at any time (docs/images.md)."""
