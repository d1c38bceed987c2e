"""Policy flows, taught by imitation of the field along their own paths."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowlik_models.networks.policy import PolicyHead
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.recipes.maps import DIGITS
from flowlik_models.recipes.options import Optimiser, Points, Weights
from flowlik_models.recipes.recipe import Recipe

_SEGMENTS = (1, 2, 4)
# what the points off the path teach of the slope across it, the divergence teaches directly
_MATCHED: dict[str, Any] = {"divergence": 4.0, "spread": 0.0}

_PLANE = Recipe(
    objective="imitation",
    imitation=Imitation(head=PolicyHead(components=16)),  # for eight modes
    network={"hidden": 96, "depth": 3, "waves": 32, "wave_scale": 1.0},
    optimiser=Optimiser(steps=12_000, learning_rate=3e-3),
    points=Points(altered=0.0),
    weights=Weights(weight_c=(None, None)),
)

_BOARD = _PLANE.with_options(
    imitation=Imitation(head=PolicyHead(components=32, local=16)),
    network={"hidden": 128, "depth": 4, "waves": 32, "wave_scale": 1.0},
    relative=5.0,
)

_SPACE = _PLANE.with_options(
    imitation=Imitation(head=PolicyHead(components=4, layout="position"), matches=4),
    network={"hidden": 256, "depth": 4},
    steps=3_000,
    learning_rate=2e-3,
    stored="float16",
)

_DIGITS = DIGITS.with_options(
    objective="imitation",
    imitation=Imitation(head=PolicyHead(components=17, layout="position", levels=True), matches=4, eps=0.0),
    network={**DIGITS.network, "wide": 64},
    start_from="teacher",
    teacher="teacher",
    batch=64,
    steps=6_400,
    learning_rate=1e-3,
    weight_decay=0.0,
    weight_c=(None, None),
    altered=0.1,
    altered_scale=0.03,
    stored="float16",
)


def policy_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of policy flows by task and model."""
    board, space = policies_of(_BOARD), policies_of(_SPACE)
    return {
        "gmm-2d": _ring(),
        "checkerboard-2d": board | _variants(board, "pi-flow-2", components=4, steps=6_000),
        "gmm-64d": space | _variants(space, "pi-flow-2", components=1, steps=1_500),
        "digits": _digits(),
    }


def _ring() -> dict[str, Recipe]:
    models = policies_of(_PLANE)
    one, four = models["pi-flow"], models["pi-flow-4"]
    return {
        **models,
        # two components cannot hold the posterior, wherever the network puts them
        **_variants(models, "pi-flow", components=2, steps=6_000),
        "pi-flow-on-path": _changed(one, spread=0.0),
        "pi-flow-dropout": _changed(one, dropout=0.05),
        "pi-flow-data-free": _changed(one, data_free=True),
        "pi-flow-anchored-4": _changed(four, head={"anchored": True}),
        "pi-flow-dx": _changed(one, head={"kind": "predictions", "components": 8}),
    }


def _digits() -> dict[str, Recipe]:
    models = policies_of(_DIGITS)
    models |= _variants(models, "pi-flow-4", components=1, steps=1_600)
    models["pi-flow"] = models["pi-flow"].with_options(steps=3_200)  # one segment is there for its samples
    for name, steps in (("pi-flow-4", 1_200), ("pi-flow-4-small-k", 600)):
        models[f"{name}-divergence"] = _divergence_after_velocity(models[name], name, steps)
    return models


def policies_of(recipe: Recipe) -> dict[str, Recipe]:
    """The recipe as policy flows of 1, 2 and 4 segments: ``pi-flow``, ``pi-flow-2`` and ``pi-flow-4``."""
    return {
        "pi-flow" if count == 1 else f"pi-flow-{count}": _changed(recipe, segments=(count,))
        for count in _SEGMENTS
    }


def _changed(recipe: Recipe, *, head: dict[str, Any] | None = None, **options: Any) -> Recipe:
    """A policy recipe with other options of the imitation and of the head."""
    assert recipe.imitation is not None
    new = replace(recipe.imitation, head=replace(recipe.imitation.head, **(head or {})), **options)
    return recipe.with_options(imitation=new, divergence=bool(new.divergence))


def _variants(models: dict[str, Recipe], name: str, *, components: int, steps: int) -> dict[str, Recipe]:
    """Variants of the policy flow ``name``: divergences matched; too few ``components``, without and with that."""
    recipe = models[name]
    assert recipe.imitation is not None
    few = {
        "components": components,
        "local": min(recipe.imitation.head.local, components // 2),
        "levels": False,
    }
    short = recipe.with_options(steps=steps)  # what so few can hold is learnt sooner
    return {
        f"{name}-divergence": _changed(recipe, **_MATCHED),
        f"{name}-small-k": _changed(short, head=few),
        f"{name}-small-k-divergence": _changed(short, head=few, **_MATCHED),
    }


def _divergence_after_velocity(recipe: Recipe, name: str, steps: int) -> Recipe:
    """Divergences matched by a policy flow whose velocities, those of ``name``, are trained already."""
    return _changed(recipe, **_MATCHED).with_options(
        start_from=name,
        steps=steps,
        learning_rate=5e-4,
        divergence_target=DivergenceTarget(control="gaussian"),
    )
