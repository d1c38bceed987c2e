"""Tasks: a data set or closed-form distribution with its test points, its truth and the models that are judged on it.

A task hands out the same points to every estimator: the first n of a fixed stream, so smaller runs are nested in larger
ones. Third parties register a `Task` in the entry-point group `flowlik.tasks` (id -> an object or a callable
returning one); nothing here needs an edit.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.measures.arrays import Array
from flowlik.tasks.grid import Grid
from flowlik.tasks.points import Points, chunks
from flowlik_models.images.pixels import normal_noise, normal_noise_log_density
from flowlik_models.interfaces import Moments
from flowlik_models.moments.moments import from_covariance
from flowlik_models.names import unknown as unknown
from flowlik_models.numerics.streams import DRAW_STRIDE as DRAW_STRIDE
from flowlik_models.zoo import CLOSED_FORM, TASK_MODELS, check_names, checkpoint_path, load_model, model_hash

Evaluate = Callable[[Tensor], Array]

NOISE_ROWS = 1024  # items whose noise is looked at at once


class UnavailableError(Exception):
    """Something a cell needs is not there; the message is one line and ends with the cure."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """Test points: `x` (draws * n, *event) draw after draw, `ids` (draws * n,) int64, `component` (n,) where known.

    `x` may be `Points`, which are made batch by batch. `cond` (draws * n, ...) is what each is conditioned on.
    `log_noise` (draws, n) nats is the log-density of the dequantisation noise with respect to uniform noise, which is
    to be taken off log p.
    """

    x: Tensor | Points
    ids: Tensor
    n: int
    draws: int = 1
    component: NDArray[np.int64] | None = None
    cond: Tensor | None = None
    log_noise: Array | float = 0.0


def with_normal_noise(items: Items, levels: int, tau: float) -> Items:
    """Items of ``levels`` levels with truncated-normal instead of uniform noise, made from it: a normal with standard
    deviation 1/(2 tau) of the cell, cut at its ends."""

    def split(z: Tensor) -> tuple[Tensor, Tensor]:
        at = (z.double() + 1) * levels / 2
        k = at.floor().clamp(0, levels - 1)
        return k, (at - k).clamp(0, 1)

    def made(z: Tensor) -> Tensor:
        k, noise = split(z)
        return (2 * (k + normal_noise(noise, tau)) / levels - 1).to(z.dtype)

    given = items.x
    x: Tensor | Points
    if isinstance(given, Points):
        rows = given.rows
        x = replace(given, rows=lambda a, b: made(rows(a, b)))
    else:
        x = made(given)
    parts = (normal_noise_log_density(split(z)[1], tau).flatten(1).sum(1) for z in chunks(x, NOISE_ROWS))
    log_noise = torch.cat(list(parts)).reshape(items.draws, items.n)
    return replace(items, x=x, log_noise=log_noise.numpy())


def labels_of(items: Items) -> NDArray[np.int64] | None:
    """The class of each item, (n,); None where items are not conditioned on whole numbers, one each."""
    cond = items.cond
    if cond is None or cond.ndim != 1 or cond.is_floating_point():
        return None
    return np.asarray(cond[: items.n].cpu().numpy(), dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """True or converged log-densities (draws, n) in nats, NaN where not known; `error` is their own, in bits/dim."""

    log_prob: Array
    ref_id: str
    error: float
    digest: str
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What a task must say. `eps`: likelihoods are those of p at t = 1 - eps unless an estimator asks otherwise."""

    id: str
    event_shape: tuple[int, ...]
    description: str
    version: int = 1
    eps: float = 0.0
    levels: int | None = None
    splits: tuple[str, ...] = ("test", "train")
    reference_model: str = "closed-form"

    def at_hand(self) -> Task:
        """The task with the reference model that is there, where it has several to choose from."""
        return self

    @property
    def dim(self) -> int:
        """Dimensions of one item."""
        return math.prod(self.event_shape)

    @property
    def has_components(self) -> bool:
        """True where it is known which component of a mixture each item comes from."""
        return False

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that are judged on this task."""
        return tuple(TASK_MODELS.get(self.id, ()))

    @property
    def given_models(self) -> tuple[str, ...]:
        """Those that come with the task, without what was distilled from one of its own."""
        return self.models

    def no_such_model(self, model: str) -> str:
        """One line for a name that is no model's."""
        return unknown(f"model of task {self.id!r}", model, self.models)

    @property
    def eight_bit_images(self) -> bool:
        """True for images of 256 levels in one or three colours, which `images(split)` gives as an `ImageSet`: where
        the standard Inception is at hand, they are judged with it."""
        return False

    def dequantises(self, split: str) -> bool:
        """Whether the split's items are quantised data with noise added, of which there can be several draws."""
        return self.levels is not None and split != "teacher-samples"

    def check_split(self, split: str) -> None:
        """Raise ValueError, naming the valid ones, where the task has no such split."""
        if split not in self.splits:
            raise ValueError(unknown("split", split, self.splits))

    @abstractmethod
    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first `n` items of a split; fewer where the split has fewer. ValueError for an unknown split."""

    @abstractmethod
    def reference(self, split: str, items: Items, t: float) -> Reference:
        """log p_t of the items; UnavailableError where a stored reference is missing or of another model."""

    @abstractmethod
    def data_hash(self, split: str) -> str:
        """Twelve hexadecimal digits that change whenever the items of the split do."""

    @abstractmethod
    def moments(self) -> tuple[Array, Array]:
        """Mean (d,) and covariance (d, d) of the data at t = 1 - eps."""

    def data_moments(self) -> Moments:
        """Moments of the data themselves, at t = 1, as models carry them for whitening and control variates."""
        t = 1.0 - self.eps
        mean, covariance = self.moments()
        covariance = (covariance - (1 - t) ** 2 * np.eye(self.dim)) / t**2
        return from_covariance(mean / t, covariance, self.data_hash("train"))

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        """A model of this task in evaluation mode, and twelve hexadecimal digits that name its weights.

        Default: closed forms and shipped checkpoints of `flowlik_models`. A third party's task with models of its own
        overrides this and `models`.

        Raises:
            UnavailableError: its checkpoint is not there. ValueError: unknown model, or it cannot be read.
        """
        check_names(self.id, model)
        if model != CLOSED_FORM and not checkpoint_path(self.id, model).is_file():
            cure = f"make it with `flowlik train {self.id} {model}` and run with `--checkpoints runs/train`"
            raise UnavailableError(f"the checkpoint of {model} on {self.id} is not there; {cure}")
        return load_model(self.id, model, device=device), model_hash(self.id, model)

    def own_model_hash(self, model: str) -> str | None:
        """The digits that `load_model` gives; None: the model's checkpoint has them."""
        return None

    def for_model(self, model: Any) -> Task:
        """The task as this model is given it: where labels are for some of its models only, with them or without."""
        return self

    def check(self, models: Sequence[str], device: str) -> None:
        """Raise ValueError where data or models of one's own cannot be used; called before a run writes anything."""
        return

    def sample_conditions(self, split: str, ids: Tensor) -> Tensor | None:
        """What samples with these ids (n,) are conditioned on, (n, ...); None: nothing."""
        return None

    @property
    def reference_folders(self) -> tuple[Path, ...]:
        """Folders in which a stored reference is looked for besides the shipped and the user's own checkpoints'."""
        return ()

    @property
    def reference_command(self) -> str | None:
        """The command that makes the stored reference; None: that of the built-in tasks."""
        return None

    def has_model(self, model: str) -> bool:
        """Whether the model can be loaded: the task's own and closed forms always, others where their checkpoint is.
        Goes with `load_model`."""
        own = model in self.models and model not in TASK_MODELS.get(self.id, ())
        return own or model == CLOSED_FORM or checkpoint_path(self.id, model).is_file()

    def grid(self) -> Grid | None:
        """The grid on which densities of a 2-D task are drawn and their mass is taken; None: no such grid."""
        return None

    def log_density(self, x: Tensor | Points, t: float) -> Array | None:
        """Exact log p_t at any x, (batch,) nats; None where the task has no closed form."""
        return None

    def real_samples(self) -> Tensor | None:
        """Real items for the Frechet distance, (n, *event) float32; None where the task has no feature network."""
        return None

    def own_measures(self, x: Tensor | Points, errors: Array, evaluate: Evaluate) -> dict[str, float]:
        """The task's own measures: `x` (n, *event), their `errors` (n,) in bits/dim, `evaluate` the estimator."""
        return {}


def digest(*parts: Any) -> str:
    """Twelve hexadecimal digits of the given texts, numbers and arrays.

    >>> len(digest("cigar-2d", 1)), digest("cigar-2d", 1) == digest("cigar-2d", 2)
    (12, False)
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        state.update(b"|")
    return state.hexdigest()[:12]


def tensor_hash(x: Tensor) -> str:
    """Twelve hexadecimal digits of a tensor's float32 values and shape."""
    return digest(tuple(x.shape), np.ascontiguousarray(x.detach().cpu().numpy().astype("<f4")))


def seed_of(*parts: Any) -> int:
    """A seed named by texts and numbers."""
    return int(digest(*parts), 16)
