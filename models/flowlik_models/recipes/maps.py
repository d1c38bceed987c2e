"""Flow maps, alone and with a divergence head, on vectors and on digits; the teachers of the digits."""

from __future__ import annotations

from typing import Any

from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.recipes.options import Optimiser, Points, Times
from flowlik_models.recipes.recipe import DATA_TEACHER, Fault, Recipe

BASES = ("meanflow", "shortcut", "shortcut-distill", "lsd", "esd")
_EXACT = DivergenceTarget(trace="exact")
_DIRECT: dict[str, Any] = {"pool": 32_768, "learning_rate": 2e-3}

PLANE = Recipe(
    objective="meanflow",
    network={"hidden": 160, "depth": 4, "gate_rank": 128, "waves": 64, "wave_scale": 1.5},
)

DIGITS = Recipe(
    objective="flow-matching",
    teacher=DATA_TEACHER,
    network={"widths": (24, 48, 64), "blocks": 1, "dropout": 0.0},
    derivative="jvp",
    optimiser=Optimiser(steps=2_000, batch=128, learning_rate=4e-3, weight_decay=0.01, ema=0.998, clip=1.0),
    times=Times(delta=1e-3),
    points=Points(altered=0.0, shift=0.2),
)

_DIGITS_MAP = DIGITS.with_options(
    objective="meanflow",
    start_from="teacher",
    teacher="teacher",
    learning_rate=1e-3,
    weight_decay=0.0,
    weight_c=(0.01, 0.1),
    steps=1_200,
    ends=0.02,
    altered=0.1,
    altered_scale=0.03,
    pool=3_072,
    pool_share=0.6,
    direct=0.3,
    stored="float16",
)

# Off the squares the field grows like 1/(1 - t) and a point ends hundreds of standard deviations out.
_BOARD = PLANE.with_options(batch=768, altered=0.5, altered_scale=1_000.0, altered_law="along", relative=5.0)

_SPACE = PLANE.with_options(
    network={"hidden": 320, "depth": 4, "gate_rank": 192},
    learning_rate=2e-3,
    weight_c=(0.01, 0.01),
    altered=0.1,
    altered_scale=1.0,
    stored="float16",
)


def map_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of maps by task and model."""
    return {
        "gmm-2d": _ring(),
        "checkerboard-2d": _checkerboard(),
        "thin-2d": _thin(),
        "gmm-64d": _space(),
        "digits": _digits(),
        "digits-flow": _digits_flow(),
    }


# The maps alone, which only start the joint ones, are trained in small batches and on the plain path.


def _ring() -> dict[str, Recipe]:
    models = _vectors(
        PLANE.with_options(steps=4_000),
        PLANE.with_options(batch=768, steps=12_000),
        direct={**_DIRECT, "steps": 24_000, "one_step": 0.25, "to_noise": 0.65},
    )
    models["meanflow-round-trip"] = models["meanflow"].with_options(round_trip=1.0)
    return models | _clustered(models, 11) | _released(models)


def _checkerboard() -> dict[str, Recipe]:
    return _vectors(
        PLANE.with_options(steps=5_000),
        _BOARD.with_options(steps=20_000),
        # at the squares' edges most of the error is the divergence's
        direct={
            **_DIRECT,
            "steps": 24_000,
            "weight_c": (0.3, 0.03),
            "network": {**_BOARD.network, "hidden": 224},
        },
    )


def _thin() -> dict[str, Recipe]:
    models = _vectors(
        PLANE.with_options(steps=4_000),
        PLANE.with_options(steps=8_000),
        direct={**_DIRECT, "steps": 36_000, "one_step": 0.25, "to_noise": 0.65},
    )
    return models | _clustered(models, 5)


def _space() -> dict[str, Recipe]:
    models = _vectors(
        _SPACE.with_options(steps=1_500),
        _SPACE.with_options(steps=10_000),
        # 8 components, each with an affine map of its own: 8 x 64 gates
        direct={
            **_DIRECT,
            "pool": 65_536,
            "steps": 36_000,
            "network": {"hidden": 256, "depth": 4, "gate_rank": 512, "head_hidden": 128},
            "weight_c": (0.01, 1.6e-4),
            "one_step": 0.25,
            "to_noise": 0.65,
        },
        own=DivergenceTarget(control="gaussian"),
    )
    return models | _clustered(models, 11) | _released(models)


def _digits() -> dict[str, Recipe]:
    joint = _DIGITS_MAP.with_options(steps=2_400)
    maps = _maps(_DIGITS_MAP, joint)
    # the shipped one began with the teacher's weights, not with those of the map alone
    maps["meanflow-f2d2"] = maps["meanflow-f2d2"].with_options(start_from="teacher")
    read_off = joint.with_options(
        objective="direct",
        divergence=True,
        direct=0.9,
        steps=9_000,
        pool=12_288,
        pool_data=0.5,
        pool_probes=4,
    )
    return {
        "teacher": DIGITS,
        # nearly Gaussian still: which probes are quiet depends on the stage of training
        "teacher-early": DIGITS.with_options(steps=200),
        "teacher-classes": DIGITS.with_options(network={**DIGITS.network, "classes": 10}),
        **maps,
        "direct-f2d2": read_off,
        "direct-f2d2-calibrated": calibrated(read_off),
    }


def _digits_flow() -> dict[str, Recipe]:
    """As of the digits, the map in less time; a sample that is moved by a pixel is none."""
    models = _digits()
    return {
        "teacher": models["teacher"].with_options(shift=0.0),
        "direct-f2d2": models["direct-f2d2"].with_options(shift=0.0, steps=2_000, pool=2_560),
    }


def calibrated(read_off: Recipe) -> Recipe:
    """A joint map read off trajectories, its divergence head trained again by the likelihoods of their ends."""
    return read_off.with_options(
        objective="calibration",
        start_from="direct-f2d2",
        direct=0.0,
        steps=400,
        learning_rate=1e-3,
        ema=0.99,
        precision="float32",  # of the latents whose norm the head makes up for
    )


def _base(model: str, recipe: Recipe) -> Recipe:
    """The recipe with the objective and the teacher that a model id stands for."""
    if not model.startswith("shortcut"):
        return recipe.with_options(objective=model)
    # whatever it knows of long steps comes from the diagonal
    recipe = recipe.with_options(objective="shortcut", diagonal=0.5)
    if model != "shortcut":
        return recipe
    # without a teacher: conditional velocities, and the divergence of the map's own diagonal; both are noisy, and
    # adaptive weights would fit another location of the noise than its mean
    return recipe.with_options(
        teacher=DATA_TEACHER, weight_c=(None, 1.0), altered=0.0, pool=0, pool_share=0.0, direct=0.0
    )


def _maps(alone: Recipe, joint: Recipe) -> dict[str, Recipe]:
    """Every way to learn a map, alone and then with a divergence head that starts from it."""
    made: dict[str, Recipe] = {}
    for model in BASES:
        made[model] = _base(model, alone)
        made[f"{model}-f2d2"] = _base(model, joint).with_options(divergence=True, start_from=model)
    return made


def _vectors(
    alone: Recipe, joint: Recipe, *, direct: dict[str, Any], own: DivergenceTarget = _EXACT
) -> dict[str, Recipe]:
    """All models of a task of vectors; the closed form is the teacher, ``own`` the divergence of a map without one."""
    made = _maps(alone, joint)
    made["shortcut-f2d2"] = made["shortcut-f2d2"].with_options(divergence_target=own)
    made["meanflow-f2d2-plain"] = _plain(made["meanflow-f2d2"])
    # targets are read off solved trajectories: no derivative, no bootstrap, so large batches are cheap
    read_off = {"objective": "direct", "divergence": True, "direct": 0.9, "batch": 1_024} | direct
    return {**made, "direct-f2d2": joint.with_options(**read_off)}


def _clustered(models: dict[str, Recipe], clusters: int) -> dict[str, Recipe]:
    """The direct map of a mixture with features of clusters, whose number is not the truth's, else the fit would be
    the answer key."""
    direct = models["direct-f2d2"]
    return {"direct-f2d2-clusters": direct.with_options(network={**direct.network, "clusters": clusters})}


def _plain(recipe: Recipe) -> Recipe:
    """The same on a network without Gaussian part, gates and features, as published."""
    network = {**recipe.network, "preconditioned": False, "waves": 0}
    return recipe.with_options(network=network, start_from=None)


def _released(models: dict[str, Recipe]) -> dict[str, Recipe]:
    """Shortcut-Distill-F2D2 as its code was released, with each of its faults and with all of them."""
    name = "shortcut-distill-f2d2"
    plain = _plain(models[name]).with_options(
        dyadic=True, middle="half", diagonal=0.75, stretched=0.0, weight_c=(None, None), altered=0.0
    )
    faults: tuple[Fault, ...] = ("broadcast", "one-direction", "step-hole")
    return {
        f"{name}-plain": plain,
        **{f"{name}-{fault}": plain.with_options(faults=(fault,)) for fault in faults},
        f"{name}-released": plain.with_options(faults=faults),
    }
