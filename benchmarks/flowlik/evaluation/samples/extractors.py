"""Which feature network judges a task's samples: the standard Inception, or the small classifier of the task's own."""

from __future__ import annotations

from typing import Any

from flowlik.tasks.task import Task
from flowlik_models.features.classifier import load_extractor
from flowlik_models.features.inception import NAME, load_inception, named_weights


def standard_extractor(task: Task) -> str:
    """The name of the standard Inception where it judges the task's samples: images of 8 bits, and a weights file that
    was named (`flowlik_models.features.inception.VARIABLE`); else empty."""
    return NAME if task.eight_bit_images and named_weights() is not None else ""


def extractor_of(task: Task) -> Any | None:
    """The feature network in evaluation mode, a module with `name` and `num_features`; None where there is none.

    Raises:
        CheckpointError: its file is missing, truncated or of another network.
    """
    if standard_extractor(task) and (path := named_weights()) is not None:
        return load_inception(path)
    return load_extractor(task.id)
