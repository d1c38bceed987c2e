"""The examination of models of one's own: `flowlik check mine.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import Finding, examine

ITEMS = 64


def examined(file: str, device: str) -> Iterator[tuple[str, list[Finding]]]:
    """Every model of the task in a file with what is found in it, none where it is all right.

    Raises:
        ValueError: the file holds no task, or a model cannot be made.
    """
    task = get_task(file)
    items = task.items("test", ITEMS)
    x = whole(items.x)[:ITEMS].to(device=device, dtype=torch.float32)
    options: dict[str, Any] = {} if items.cond is None else {"cond": items.cond[:ITEMS].to(device)}
    if task.levels is not None:
        options["levels"] = task.levels
    for model in task.given_models:
        yield model, examine(task.load_model(model, device)[0], x, **options)
