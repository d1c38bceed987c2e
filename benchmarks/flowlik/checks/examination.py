"""The examination of models of one's own: `flowlik check mine.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

import flowlik_estimators
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task

ITEMS = 64


def examined(file: str, device: str) -> Iterator[tuple[str, list[Any]]]:
    """Every model of the task in a file with what is found in it, none where it is all right.

    Raises:
        ValueError: the file holds no task, a model cannot be made, or this version has no examination.
    """
    task = get_task(file)
    examine = getattr(flowlik_estimators, "examine", None)
    if examine is None:
        raise ValueError(f"{file}: the task and its models load; their examination is not there yet")
    items = task.items("test", ITEMS)
    x = whole(items.x)[:ITEMS].to(device=device, dtype=torch.float32)
    options: dict[str, Any] = {} if items.cond is None else {"cond": items.cond[:ITEMS].to(device)}
    if task.levels is not None:
        options["levels"] = task.levels
    for model in task.models:
        yield model, list(examine(task.load_model(model, device)[0], x, **options))
