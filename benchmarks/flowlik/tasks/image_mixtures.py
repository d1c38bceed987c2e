"""Mixtures fitted to real images, whose likelihood is exact, as tasks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.digits import DIGITS
from flowlik.tasks.images import _dequantised, _on_stderr, _skipped_where_missing
from flowlik.tasks.points import Points, chunks
from flowlik.tasks.task import Items, Reference, Task, digest, seed_of
from flowlik_models.closed_forms.image_mixtures import IMAGES_OF, image_mixture, mixture_hash
from flowlik_models.closed_forms.shared_basis import SharedBasisMixture
from flowlik_models.images import open_images
from flowlik_models.interfaces import Moments
from flowlik_models.zoo import TASK_MODELS

EXACT_ROWS = 256


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
        return ("closed-form", *TASK_MODELS.get(self.id, ()))

    @property
    def has_components(self) -> bool:
        """True; real images have none."""
        return True

    @property
    def truth(self) -> SharedBasisMixture:
        """The closed form, float64; fitted on the first call. UnavailableError where the images are not there."""
        return self._fitted()[0]

    def dequantises(self, split: str) -> bool:
        """Real images are; the mixture's own draws are continuous."""
        return split == "images"

    def _fitted(self) -> tuple[SharedBasisMixture, Moments]:
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
        source = IMAGES_OF[self.id]
        if source == "digits":
            return DIGITS.items("test", n, draws)
        with _skipped_where_missing():
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
            values = [truth.log_prob(part.double().cpu(), t) for part in chunks(x, EXACT_ROWS)]
        return np.asarray(torch.cat(values).numpy(), dtype=np.float64)

    def data_hash(self, split: str) -> str:
        """Names the fit, the split and how its points are drawn."""
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
