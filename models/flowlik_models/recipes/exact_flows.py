"""Exact flows of one pass, trained by the likelihood of the data."""

from __future__ import annotations

from flowlik_models.recipes.maps import DIGITS
from flowlik_models.recipes.options import Execution, Optimiser, Points
from flowlik_models.recipes.recipe import DATA_TEACHER, Recipe

_SPACE = Recipe(
    objective="likelihood",
    teacher=DATA_TEACHER,
    network={"patch": 8, "blocks": 6, "layers": 2, "width": 96},
    optimiser=Optimiser(steps=6_000, batch=256, learning_rate=1e-3, ema=0.998, clip=1.0),
    points=Points(altered=0.0),
    execution=Execution(stored="float16"),
)


def exact_flow_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of exact flows by task and model."""
    return {
        "gmm-2d": {
            "exact-flow": _SPACE.with_options(
                network={"patch": 1, "blocks": 8, "layers": 1, "width": 64}, batch=512, steps=5_000
            )
        },
        "gmm-64d": {"exact-flow": _SPACE},
        "digits": {
            "exact-flow": DIGITS.with_options(
                objective="likelihood",
                network={"patch": 2, "blocks": 4, "layers": 2, "width": 64},
                steps=3_000,
                learning_rate=1e-3,
                stored="float16",
            )
        },
    }
