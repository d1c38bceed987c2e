"""Tasks: a data set or closed-form distribution with its test points, its truth and the models that are judged on it.

A task hands out the same points to every estimator: the first n of a fixed stream, so smaller runs are nested in larger
ones. Third parties register a `Task` in the entry-point group `flowlik.tasks` (name -> an object or a callable
returning one); nothing here needs an edit.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowlik.points import Points, pieces, whole
from flowlik.words import unknown as unknown

if TYPE_CHECKING:
    from flowlik_models.interfaces import Moments

Array = NDArray[np.float64]
Evaluate = Callable[[Tensor], Array]

BLOCK = 4096  # points of a closed form are drawn in blocks, so the first n do not depend on n
DRAW_STRIDE = 2**20  # ids of different dequantisation draws of one image never meet


class UnavailableError(Exception):
    """Something a cell needs is not there; the message is one line and ends with the cure."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """Test points: `x` (draws * n, *event) draw after draw, `ids` (draws * n,) int64, `component` (n,) where known.

    `x` may be `Points`, which are made batch by batch.
    """

    x: Tensor | Points
    ids: Tensor
    n: int
    draws: int = 1
    component: NDArray[np.int64] | None = None


@dataclass(frozen=True, kw_only=True)
class Reference:
    """True or converged log-densities (draws, n) in nats, NaN where not known; `error` is their own, in bits/dim."""

    log_prob: Array
    ref_id: str
    error: float
    digest: str
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Centres of a 2-D grid of equal cells whose lines fall on the density's edges."""

    x: Array
    y: Array

    @property
    def cell_area(self) -> float:
        """Area of one cell."""
        return float((self.x[1] - self.x[0]) * (self.y[1] - self.y[0]))

    @property
    def points(self) -> Tensor:
        """All centres, (H * W, 2) float64; row i of the (H, W) picture is y[i]."""
        y, x = np.meshgrid(self.y, self.x, indexing="ij")
        return torch.from_numpy(np.stack([x.ravel(), y.ravel()], axis=1))


def square_grid(low: float, high: float, cells: int, centre: tuple[float, float] = (0.0, 0.0)) -> Grid:
    """`cells` x `cells` cells that fill [low, high]^2 shifted to `centre`."""
    middles = low + (np.arange(cells) + 0.5) * (high - low) / cells
    return Grid(x=middles + centre[0], y=middles + centre[1])


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
        from flowlik_models.zoo import TASK_MODELS

        return tuple(TASK_MODELS.get(self.id, ()))

    @property
    def eight_bit_images(self) -> bool:
        """True for images of 256 levels in one or three colours, which `images(split)` gives as an `ImageSet`: where
        the standard Inception is at hand, they are judged with it."""
        return False

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
        from flowlik_models.moments import from_covariance

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
        from flowlik_models.zoo import CLOSED_FORM, check_names, checkpoint_path, load_model, model_hash

        check_names(self.id, model)
        if model != CLOSED_FORM and not checkpoint_path(self.id, model).is_file():
            cure = f"make it with `flowlik train {self.id} {model}` and run with `--checkpoints runs/train`"
            raise UnavailableError(f"the checkpoint of {model} on {self.id} is not there; {cure}")
        return load_model(self.id, model, device=device), model_hash(self.id, model)

    def has_model(self, model: str) -> bool:
        """Whether the model can be loaded: a closed form, or a checkpoint that is there. Goes with `load_model`."""
        from flowlik_models.zoo import CLOSED_FORM, checkpoint_path

        return model == CLOSED_FORM or checkpoint_path(self.id, model).is_file()

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
    """Twelve hexadecimal digits of the given texts, numbers and arrays."""
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


@dataclass(frozen=True, kw_only=True)
class ClosedFormTask(Task):
    """A synthetic task: points of p at t = 1 - eps, drawn fresh, and the exact density of the closed form."""

    window: tuple[float, float, int] | None = None
    centre: tuple[float, float] = (0.0, 0.0)
    block: int = BLOCK

    @cached_property
    def truth(self) -> Any:
        """The closed form, float64."""
        from flowlik_models.synthetic import closed_form

        return closed_form(self.id)

    @property
    def has_components(self) -> bool:
        """True for mixtures."""
        return hasattr(self.truth, "sample_with_component")

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n points of the split's stream, float64."""
        self.check_split(split)
        x, component = self._points(split, n)
        return Items(x=x, ids=torch.arange(n), n=n, component=component)

    def _points(self, split: str, n: int) -> tuple[Tensor, NDArray[np.int64] | None]:
        parts, components = [], []
        known = self.has_components
        for block in range(-(-n // self.block)):
            generator = torch.Generator().manual_seed(seed_of(self.id, self.version, split, block))
            options: dict[str, Any] = {"generator": generator, "t": 1.0 - self.eps, "dtype": torch.float64}
            if known:
                x, component = self.truth.sample_with_component(self.block, **options)
                components.append(component)
            else:
                x = self.truth.sample(self.block, **options)
            parts.append(x)
        component = torch.cat(components)[:n].numpy().astype(np.int64) if known else None
        return torch.cat(parts)[:n], component

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The exact log p_t of the points, in float64."""
        values = self.log_density(items.x, t)
        return Reference(
            log_prob=values.reshape(items.draws, items.n),
            ref_id="closed-form",
            error=0.0,
            digest="closed-form",
        )

    def log_density(self, x: Tensor | Points, t: float) -> Array:
        """Exact log p_t in float64, in pieces that fit in memory."""
        with torch.no_grad():
            values = [self.truth.log_prob(part.double().cpu(), t) for part in pieces(x, BLOCK)]
        return np.asarray(torch.cat(values).numpy(), dtype=np.float64)

    def data_moments(self) -> Moments:
        """The closed form's own eigenvectors where it holds them: at 3072 dimensions finding them takes a minute."""
        from flowlik_models.interfaces import Moments

        if not hasattr(self.truth, "eigenvectors"):
            return super().data_moments()
        truth = self.truth
        mean, values, vectors = (part.numpy() for part in (truth.mean, truth.eigenvalues, truth.eigenvectors))
        return Moments(mean, values, vectors, self.data_hash("train"))

    def data_hash(self, split: str) -> str:
        """Names the constants, the split and how its points are drawn."""
        from flowlik_models.synthetic import constants_hash

        return digest(constants_hash(self.id), self.version, split, self.eps)

    def moments(self) -> tuple[Array, Array]:
        """Exact moments where the closed form knows them, else those of 200,000 points of the training split."""
        return _closed_form_moments(self)

    def grid(self) -> Grid | None:
        """The task's window in equal cells."""
        return None if self.window is None else square_grid(*self.window, centre=self.centre)


@cache
def _closed_form_moments(task: ClosedFormTask) -> tuple[Array, Array]:
    truth = task.truth
    t = 1.0 - task.eps
    if hasattr(truth, "mean_and_covariance") or hasattr(truth, "eigenvectors"):
        mean, covariance = _exact_moments(truth)
        identity = torch.eye(task.dim, dtype=covariance.dtype)
        return (t * mean).numpy(), (t**2 * covariance + (1 - t) ** 2 * identity).numpy()
    x = whole(task.items("train", 200_000).x).numpy()
    return x.mean(axis=0), np.cov(x, rowvar=False)


def _exact_moments(truth: Any) -> tuple[Tensor, Tensor]:
    if hasattr(truth, "mean_and_covariance"):
        moments: tuple[Tensor, Tensor] = truth.mean_and_covariance()
        return moments
    return truth.mean, truth.eigenvectors * truth.eigenvalues @ truth.eigenvectors.T


@dataclass(frozen=True, kw_only=True)
class CheckerboardTask(ClosedFormTask):
    """Uniform on eight squares; judged inside, and by whether the outside is seen as empty."""

    edge_margin: float = 0.1
    outside_margin: float = 0.3
    outside_points: int = 500
    outside_drop: float = 3.0

    def own_measures(self, x: Tensor | Points, errors: Array, evaluate: Evaluate) -> dict[str, float]:
        """`interior_bias` and `interior_mae` (points at least 0.1 from an edge) in bits/dim; `outside_share`: of 500
        points uniform in [-4, 4]^2 at least 0.3 from every filled square, the share at least 3 nats below the inside.
        """
        inside = errors[self._depth(whole(x)) >= self.edge_margin]
        inside = inside[np.isfinite(inside)]
        outside = evaluate(self._outside())
        side = self.truth.side * (1.0 - self.eps)
        level = -math.log(len(self._corners()) * side**2)
        return {
            "interior_bias": float(inside.mean()) if len(inside) else math.nan,
            "interior_mae": float(np.abs(inside).mean()) if len(inside) else math.nan,
            "outside_share": float(np.mean(outside <= level - self.outside_drop)),
        }

    def _corners(self) -> Array:
        return np.asarray(self.truth.lower_left.numpy() * (1.0 - self.eps))

    def _distances(self, x: Array) -> Array:
        """Signed distance to every square, (n, squares): negative inside, to the nearest edge."""
        half = 0.5 * self.truth.side * (1.0 - self.eps)
        offset = np.abs(x[:, None, :] - (self._corners() + half)) - half
        beyond = np.linalg.norm(np.maximum(offset, 0.0), axis=2)
        return np.asarray(np.where(beyond > 0, beyond, offset.max(axis=2)))

    def _depth(self, x: Tensor) -> Array:
        """How far inside a filled square each point lies; negative outside."""
        return np.asarray(-self._distances(x.double().cpu().numpy()).min(axis=1))

    def _outside(self) -> Tensor:
        generator = np.random.default_rng(seed_of(self.id, self.version, "outside"))
        points = generator.uniform(-4.0, 4.0, size=(self.outside_points * 20, 2))
        far = points[self._distances(points).min(axis=1) >= self.outside_margin]
        return torch.from_numpy(far[: self.outside_points])


@dataclass(frozen=True, kw_only=True)
class DigitsTask(Task):
    """scikit-learn's 8x8 digits in 17 grey levels, uniformly dequantised: z = 2 (k + U)/17 - 1.

    The noise is keyed by image and draw, so every estimator sees the same points. The reference is the teacher's
    converged likelihood of the first draw of the first images of each split (`flowlik reference digits`).
    """

    key: int = 17_081
    levels: int | None = field(default=17)

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        """The first n images of a split as float32 points, `draws` dequantisations of each."""
        self.check_split(split)
        if split == "teacher-samples":
            from flowlik.references import stored_samples

            return stored_samples(self, n)
        images = self.images(split)[:n]
        x = torch.cat([self.dequantise(images, split, draw) for draw in range(draws)])
        ids = torch.cat([torch.arange(len(images)) + draw * DRAW_STRIDE for draw in range(draws)])
        return Items(x=x, ids=ids, n=len(images), draws=draws)

    def images(self, split: str) -> Tensor:
        """Grey levels 0..16 of a split, (n, 1, 8, 8) uint8."""
        from flowlik_models.data import digits

        levels: Tensor = digits(split)[0]
        return levels

    def dequantise(self, images: Tensor, split: str, draw: int) -> Tensor:
        """z = 2 (k + U)/17 - 1 with noise keyed by image and draw, float32."""
        from flowlik_models.data import dequantise
        from flowlik_models.random import uniform

        key = self.key + self.splits.index(split)
        ids = torch.arange(len(images))
        noise = uniform(key, ids, self.event_shape, stream=draw, dtype=torch.float64)
        return dequantise(images, 17, noise).float()

    def reference(self, split: str, items: Items, t: float) -> Reference:
        """The stored converged likelihoods of the teacher; NaN for images and draws that have none."""
        from flowlik.references import stored_log_prob

        return stored_log_prob(self, split, items, t)

    def data_hash(self, split: str) -> str:
        """Names the images and the dequantisation noise; for the teacher's samples, the samples."""
        if split == "teacher-samples":
            return tensor_hash(whole(self.items(split, 10**9).x))
        from flowlik_models.data import data_hash

        return digest(data_hash(self.id, split), self.version, self.key, split)

    def real_samples(self) -> Tensor | None:
        """All training images, dequantised once."""
        return self.dequantise(self.images("train"), "train", 0)

    def moments(self) -> tuple[Array, Array]:
        """Moments of the training images with the dequantisation noise added exactly."""
        from flowlik_models.data import mean_and_covariance

        mean, covariance = mean_and_covariance(self.images("train"), 17)
        return mean.numpy(), covariance.numpy()


def _builtin() -> dict[str, Task]:
    from flowlik.image_tasks import image_tasks
    from flowlik_models.synthetic import SCALING_DIMS

    def mixture(
        name: str, dim: int, text: str, window: tuple[float, float, int] | None = None
    ) -> ClosedFormTask:
        return ClosedFormTask(id=name, event_shape=(dim,), description=text, window=window)

    tasks: tuple[Task, ...] = (
        ClosedFormTask(
            id="gaussian-2d",
            event_shape=(2,),
            description="one correlated Gaussian",
            window=(-5.0, 5.0, 80),
            centre=(0.5, -0.25),
        ),
        mixture("gmm-2d", 2, "eight Gaussian modes on a ring", (-4.0, 4.0, 96)),
        mixture("gmm-64d", 64, "eight anisotropic, rotated Gaussians in 64 dimensions"),
        CheckerboardTask(
            id="checkerboard-2d",
            event_shape=(2,),
            eps=1e-3,
            description="uniform on eight squares of side 2, judged at t = 0.999",
            window=(-4.995, 4.995, 80),
        ),
        mixture(
            "thin-2d", 2, "two rotated Gaussians, one axis with standard deviation 0.02", (-4.5, 4.5, 180)
        ),
        DigitsTask(
            id="digits",
            event_shape=(1, 8, 8),
            splits=("test", "train", "teacher-samples"),
            reference_model="teacher",
            description="scikit-learn's 8x8 digits, 17 grey levels, uniformly dequantised",
        ),
    )
    scaling = (
        ClosedFormTask(
            id=name,
            event_shape=(dim,),
            description=f"one Gaussian in {dim} dimensions with an image-like spectrum, for cost against dimension",
            block=256,
        )
        for name, dim in SCALING_DIMS.items()
    )
    return {task.id: task for task in (*tasks, *image_tasks(), *scaling)}


@cache
def registry() -> dict[str, Task]:
    """All tasks by id: the built-in ones, then those of the entry-point group `flowlik.tasks`."""
    tasks = _builtin()
    for point in entry_points(group="flowlik.tasks"):
        loaded = point.load()
        task = loaded if isinstance(loaded, Task) else loaded()
        tasks.setdefault(task.id, task)
    return tasks


def available() -> tuple[str, ...]:
    """Ids of all tasks."""
    return tuple(registry())


def get_task(name: str) -> Task:
    """The task of this id.

    Raises:
        ValueError: unknown id; the line names the valid ones and the nearest match.
    """
    if name not in registry():
        raise ValueError(unknown("task", name, available()))
    return registry()[name]
