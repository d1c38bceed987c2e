"""How a student of a teacher of one's own is trained: one recipe an objective, sized by the data (docs/training.md).

``direct`` regresses averages read off the pool of trajectories, all pairs of times, so that no step asks the teacher.
The other objectives keep a share of such rows, as anchors, and ask the teacher at points of the pool.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flowlik_models.distillation.teacher import EXACT_DIMS
from flowlik_models.names import unknown
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.recipes.options import Optimiser, Points, Trajectories
from flowlik_models.recipes.recipe import Recipe

OBJECTIVES = ("direct", "meanflow", "shortcut-distill", "lsd", "calibration")
"""What `flowlik.distill` trains by."""

FEW_DIMENSIONS = 4
"""Up to here random waves of the whitened input let a small network follow steep places between modes."""

_TEACHER = "teacher"

_PLANE = Recipe(
    objective="direct",
    divergence=True,
    teacher=_TEACHER,
    network={"hidden": 192, "depth": 4, "gate_rank": 128, "waves": 64, "wave_scale": 1.5},
    divergence_target=DivergenceTarget(trace="exact"),
    optimiser=Optimiser(steps=12_000, batch=1_024, learning_rate=2e-3),
    points=Points(altered=0.1, altered_scale=0.5),
    trajectories=Trajectories(pool=32_768, pool_data=0.75, direct=1.0),
)

_SPACE = _PLANE.with_options(
    network={"hidden": 256, "depth": 4, "gate_rank": 512}, weight_c=(0.01, 0.01), altered_scale=0.3
)

_IMAGES = _PLANE.with_options(
    network={},
    derivative="jvp",
    divergence_target=DivergenceTarget(),
    steps=9_000,
    batch=128,
    ema=0.998,
    learning_rate=1e-3,
    clip=1.0,
    delta=1e-3,
    ends=0.02,
    weight_c=(0.01, 0.1),
    altered=0.1,
    altered_scale=0.1,
    pool=3_072,
    pool_data=0.5,
    pool_probes=4,
)


def recipe_of(objective: str, event_shape: Sequence[int], **options: Any) -> Recipe:
    """The recipe of an objective for data of that shape, with ``options`` of a recipe instead of its own.

    Raises:
        ValueError: an unknown objective or option, or values that do not go together.

    >>> recipe_of("direct", (2,), steps=100).optimiser.steps
    100
    >>> recipe_of("distil", (2,))
    Traceback (most recent call last):
        ...
    ValueError: unknown objective 'distil'; ... (valid: direct, meanflow, shortcut-distill, lsd, calibration)
    """
    if objective not in OBJECTIVES:
        raise ValueError(unknown("objective", objective, OBJECTIVES))
    recipe = _sized(tuple(event_shape))
    if objective == "calibration":
        recipe = recipe.with_options(
            objective="calibration",
            start_from="student",
            steps=1_000,
            learning_rate=1e-3,
            ema=0.99,
            direct=0.0,
        )
    elif objective != "direct":
        name = objective.removesuffix("-distill")
        recipe = recipe.with_options(
            objective=name, direct=0.25, batch=recipe.optimiser.batch // 2, pool=recipe.trajectories.pool // 4
        )
        if name == "shortcut":  # whatever it knows of long steps comes from the diagonal
            recipe = recipe.with_options(diagonal=0.5)
    return recipe.with_options(**{name: value for name, value in options.items() if value is not None})


def _sized(event_shape: tuple[int, ...]) -> Recipe:
    dim = math.prod(event_shape)
    if is_image(event_shape):
        return _IMAGES
    if dim <= FEW_DIMENSIONS:
        return _PLANE
    target = DivergenceTarget(trace="exact") if dim <= EXACT_DIMS else DivergenceTarget()
    return _SPACE.with_options(divergence_target=target)


def is_image(event_shape: tuple[int, ...]) -> bool:
    """Whether items are taken for images, (channels, height, width)."""
    return len(event_shape) == 3 and event_shape[0] <= 4 and min(event_shape[1:]) >= 4
