"""The table of tasks: built-in ones, and those of the entry-point group `flowlik.tasks`."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from flowlik.tasks.closed_forms import CheckerboardTask, ClosedFormTask
from flowlik.tasks.digits import DIGITS, DIGITS_FLOW
from flowlik.tasks.image_mixtures import ImageMixtureTask
from flowlik.tasks.images import TEACHER_SAMPLES, ImageTask
from flowlik.tasks.own import task_file
from flowlik.tasks.task import Task
from flowlik_models.closed_forms.catalogue import SCALING_DIMS
from flowlik_models.moments.training_images import IMAGE_SHAPES
from flowlik_models.names import unknown as unknown
from flowlik_models.plugins import load_plugins


def image_tasks() -> tuple[Task, ...]:
    """The built-in tasks on images; those that have recipes for a teacher have its samples as a split."""

    def real(name: str, shape: tuple[int, int, int], text: str, small: str | None = None) -> ImageTask:
        splits = ("test", "train", TEACHER_SAMPLES) if name in IMAGE_SHAPES else ("test", "train")
        return ImageTask(
            id=name,
            event_shape=shape,
            splits=splits,
            description=f"{text}; files: flowlik data",
            smaller_teacher=small,
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
        real("cifar10", (3, 32, 32), "CIFAR-10, 32x32 colours", small="teacher-small"),
        real("imagenet64", (3, 64, 64), "ImageNet 64x64, colours"),
    )


MEASURED = {
    "digits-gmm": "2.81 bits/dim, div/d down to -3",
    "fashion-mnist-gmm": "6.15 bits/dim, div/d down to -6",
    "cifar10-gmm": "4.35 bits/dim, div/d down to -27",
}
"""Of the mixtures' own draws: bits/dim, and the least mean of div v/d over the draws at any time (docs/images.md)."""


def _builtin() -> dict[str, Task]:
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
        ClosedFormTask(
            id="many-well-32",
            event_shape=(32,),
            eps=1e-3,
            description="sixteen double wells beside sixteen Gaussians, 65,536 modes, judged at t = 0.999",
        ),
        ClosedFormTask(
            id="funnel-10",
            event_shape=(10,),
            eps=1e-3,
            description="Neal's funnel: one Gaussian is the log-variance of nine others, judged at t = 0.999",
        ),
        mixture("gmm-40", 2, "forty Gaussian modes spread over a wide square", (-56.0, 56.0, 224)),
        DIGITS,
        DIGITS_FLOW,
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
    """All tasks by id: the built-in ones, then those of the entry-point group `flowlik.tasks`.

    Raises:
        ValueError: two packages give the same name, or one that of a built-in task.
    """
    builtin = _builtin()
    return builtin | load_plugins("flowlik.tasks", builtin, _admitted)


def _admitted(name: str, loaded: Any) -> Task:
    """The task that an entry point gives, or that what it gives returns; its id is the entry point's name.

    Raises:
        TypeError: it is no task.
    """
    task = loaded if isinstance(loaded, Task) else loaded()
    if not isinstance(task, Task):
        raise TypeError(f"expected a Task or a callable that returns one, got {loaded!r}")
    return task if task.id == name else replace(task, id=name)


def available() -> tuple[str, ...]:
    """Ids of all tasks."""
    return tuple(registry())


def get_task(name: str) -> Task:
    """The task of this id, or the one that a file holds: `get_task("mine.py")`, then also by its own id.

    Raises:
        ValueError: unknown id; the line names the valid ones and the nearest match. A file that is no task's.

    >>> task = get_task("gmm-2d")
    >>> task.dim, task.models[0], task.items("test", 3).x.shape
    (2, 'closed-form', torch.Size([3, 2]))
    """
    if task_file.names_a_file(name):
        return task_file.load_file(name, registry())
    if (own := task_file.loaded(name)) is not None:
        return own
    if name not in registry():
        raise ValueError(unknown("task", name, available()))
    return registry()[name].at_hand()
