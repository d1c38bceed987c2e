"""Which feature networks judge a task's samples.

One gives the columns of the record: the standard Inception, or the small classifier of the task's own. Others, which
`features` of a cell's options names, stand beside it in `extra`: one network alone can be pleased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from torch import Tensor, nn

from flowlik.tasks.task import Task, UnavailableError
from flowlik_models.features.classifier import load_extractor
from flowlik_models.features.efficientnet import NAME as EFFICIENTNET
from flowlik_models.features.efficientnet import load_efficientnet, why_no_efficientnet
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


class Pixels(nn.Module):
    """Images as they are, (n, *event) to (n, d)."""

    def __init__(self, event_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.num_features = math.prod(event_shape)
        self.name = f"pixels-{self.num_features}"

    def forward(self, x: Tensor) -> Tensor:
        """The pixels of each image in a row."""
        return x.flatten(1)


def _efficientnet(task: Task) -> nn.Module:
    if (why := why_no_efficientnet()) is not None:
        raise UnavailableError(why)
    return load_efficientnet()


def _classifier(task: Task) -> nn.Module:
    found = load_extractor(task.id)
    if found is None:
        raise UnavailableError(f"{task.id} has no classifier: flowlik train {task.id} features --ship")
    return found


FURTHER: Final[dict[str, Callable[[Task], nn.Module]]] = {
    "classifier": _classifier,
    "pixels": lambda task: Pixels(task.event_shape),
    EFFICIENTNET: _efficientnet,
}
"""Feature networks that `features` may name."""


def further_extractors(task: Task, names: tuple[str, ...]) -> dict[str, nn.Module]:
    """The networks of these names, in evaluation mode.

    Raises:
        UnavailableError: one is not installed or not trained, or the task has no images; the line says the cure.
        CheckpointError: its file is missing, truncated or of another network.
    """
    if names and len(task.event_shape) != 3:
        raise UnavailableError(f"features = {list(names)} judge images, which {task.id} has none of")
    return {name: FURTHER[name](task) for name in names}
