"""Tasks on real images, and on the mixtures fitted to them, whose likelihood is exact.

Image files are the user's own (`flowlik_models.images`): where they are missing a cell is skipped, and its reason ends
with the cure. Points are made batch by batch, in a fixed shuffled order, so the first n are like all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.points import Points, whole
from flowlik.tasks.stored_references import stored_log_prob, stored_samples
from flowlik.tasks.task import DRAW_STRIDE, Items, Reference, Task, UnavailableError, digest, tensor_hash
from flowlik_models.images import ImageSet, MissingDataError, evaluation_order, open_images
from flowlik_models.interfaces import Moments
from flowlik_models.moments.images import image_moments

TEACHER_SAMPLES = "teacher-samples"
REAL_SAMPLES = 10_000


@contextmanager
def _skipped_where_missing() -> Iterator[None]:
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
    likelihood of the task's teacher, where there is one; of ``smaller_teacher`` where only that has been trained.
    """

    key: int = 25_601
    levels: int | None = 256
    reference_model: str = "teacher"
    smaller_teacher: str | None = None

    def at_hand(self) -> Task:
        """The task judged by its smaller teacher where that alone is there."""
        small = self.smaller_teacher
        if small is None or self.has_model(self.reference_model) or not self.has_model(small):
            return self
        return replace(self, reference_model=small)

    @property
    def eight_bit_images(self) -> bool:
        """True."""
        return True

    def images(self, split: str) -> ImageSet:
        """The images of a split, verified; UnavailableError where they are not there."""
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
        with _skipped_where_missing():
            return image_moments(self.id, say=_on_stderr)

    def moments(self) -> tuple[Array, Array]:
        """The same as mean and covariance."""
        found = self.data_moments()
        return found.mean, found.eigenvectors * found.eigenvalues @ found.eigenvectors.T


@lru_cache(maxsize=4)
def _order(n: int) -> Any:
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
