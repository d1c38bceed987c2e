"""Tasks: data sets and closed forms with their items, truths and models."""

from flowlik.measures.arrays import Array
from flowlik.tasks.arrays import ArrayTask
from flowlik.tasks.closed_forms import BLOCK, CheckerboardTask, ClosedFormTask
from flowlik.tasks.digits import DigitsTask
from flowlik.tasks.grid import Grid, square_grid
from flowlik.tasks.image_mixtures import ImageMixtureTask
from flowlik.tasks.images import ImageTask
from flowlik.tasks.registry import available, get_task, registry
from flowlik.tasks.task import (
    DRAW_STRIDE,
    Evaluate,
    Items,
    Reference,
    Task,
    UnavailableError,
    digest,
    seed_of,
    tensor_hash,
)
from flowlik_models.names import unknown

__all__ = [
    "BLOCK",
    "DRAW_STRIDE",
    "Array",
    "ArrayTask",
    "CheckerboardTask",
    "ClosedFormTask",
    "DigitsTask",
    "Evaluate",
    "Grid",
    "ImageMixtureTask",
    "ImageTask",
    "Items",
    "Reference",
    "Task",
    "UnavailableError",
    "available",
    "digest",
    "get_task",
    "registry",
    "seed_of",
    "square_grid",
    "tensor_hash",
    "unknown",
]
