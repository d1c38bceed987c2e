"""Scalar networks of the log-density, taught by the closed form at the points where the direct maps' trajectories
start."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from flowlik_models.recipes.maps import map_recipes
from flowlik_models.recipes.options import Trajectories
from flowlik_models.recipes.recipe import Recipe

_PLANE = {"hidden": 128, "depth": 3, "rank": 64, "waves": 64, "wave_scale": 1.5}
_SPACE = {"hidden": 256, "depth": 2, "rank": 512}


def energy_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of scalar networks by task and model."""
    return {
        "gmm-2d": {"energy": _energy("gmm-2d", network=_PLANE)},
        # beside the thin axis log p falls by thousands of nats
        "thin-2d": {"energy": _energy("thin-2d", network=_PLANE, relative=5.0, stored="float16")},
        "checkerboard-2d": {"energy": _energy("checkerboard-2d", network=_PLANE, stored="float16")},
        "gmm-64d": {
            "energy": _energy("gmm-64d", network=_SPACE, batch=256, steps=70_000, weight_c=(0.01, 1.0))
        },
    }


def _energy(task: str, **options: Any) -> Recipe:
    """A scalar network in the place of a task's direct map: the same points, no trajectories."""
    shared: dict[str, Any] = {"batch": 512, "steps": 10_000, "weight_c": (0.1, 1.0), "learning_rate": 2e-3}
    return (
        map_recipes()[task]["direct-f2d2"]
        .with_options(objective="energy", divergence=False, ema=0.998, **asdict(Trajectories()))
        .with_options(**{**shared, **options})
    )
