"""The models that cells are evaluated on: one in memory at a time, compiled where that is asked for."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch

from flowlik.evaluation import compilation
from flowlik.tasks.registry import get_task
from flowlik_models.moments.moments import attach


@lru_cache(maxsize=2)
def load(task: str, model: str, device: str, dtype: str) -> tuple[Any, str]:
    """A model in evaluation mode with its hash; one stays in memory for the cells that follow.

    Raises:
        UnavailableError: its checkpoint is not there. ValueError: it cannot be read.
    """
    found = get_task(task)
    loaded, weights = found.load_model(model, device)
    # Networks hold float32 parameters; closed forms hold float64 ones and compute in x's dtype.
    wider = dtype == "float64" and hasattr(loaded, "double")
    loaded = compilation.laid_out(loaded.double() if wider else loaded, device)
    return attach(loaded, found.data_moments()), weights


@lru_cache(maxsize=1)
def load_compiled(task: str, model: str, device: str, dtype: str) -> tuple[Any, str | None]:
    """The model with its network compiled, once for all its cells; or as it is, and one line why."""
    twin = copy.copy(load(task, model, device, dtype)[0])
    return twin, compilation.compiled(twin, device, getattr(torch, dtype))
