"""One-step generators: a teacher of each framework, what is distilled from it, and a divergence head on the result."""

from __future__ import annotations

from dataclasses import replace

from flowlik_models.conditional_paths import PathName
from flowlik_models.objectives.realuid import RealUID
from flowlik_models.recipes.maps import DIGITS, map_recipes
from flowlik_models.recipes.options import Optimiser, Points
from flowlik_models.recipes.recipe import DATA_TEACHER, Recipe

_FIELD = Recipe(
    objective="flow-matching",
    path="flow-matching",
    teacher=DATA_TEACHER,
    network={"hidden": 128, "depth": 4, "waves": 32, "wave_scale": 1.0},
    optimiser=Optimiser(steps=6_000, batch=512, learning_rate=3e-3),
    points=Points(altered=0.0),
)

_GENERATOR = _FIELD.with_options(
    objective="realuid",
    start_from="teacher",
    teacher="teacher",
    # most of the steps on what a density needs: slopes of the teacher's map first, the fake model's field last
    realuid=RealUID(
        a=0.94,
        b=0.96,
        start=0.7,
        monotone=30.0,
        warm=0.6,
        slope=0.3,
        reach=1.5,
        rate=0.03,
        stable=True,
        settle=0.3,
    ),
    pool=32_768,
    betas=(0.0, 0.999),
    steps=32_000,
    learning_rate=2e-3,
    clip=1.0,
)

# from the teacher's weights and nothing else, and without a penalty: folds where it likes to
_PUBLISHED = _GENERATOR.with_options(
    realuid=RealUID(a=0.94, b=0.96, start=0.7), pool=0, steps=12_000, learning_rate=3e-4
)
_SHORTER = _GENERATOR.with_options(steps=12_000)
_PAIRED = _PUBLISHED.with_options(realuid=RealUID(a=0.94, b=0.96, start=0.7, monotone=30.0))

_FRAMEWORKS: dict[PathName, Recipe] = {
    "noise": _SHORTER,
    "data": _SHORTER,
    "bridge": _PAIRED,
    "interpolant": _PAIRED,
}

_DIGITS = DIGITS.with_options(
    objective="realuid",
    path="flow-matching",
    start_from="teacher",
    teacher="teacher",
    realuid=RealUID(a=0.94, b=0.96, warm=0.4, slope=0.05, rate=0.2, settle=0.15),
    pool=4_096,
    betas=(0.0, 0.999),
    batch=64,
    steps=5_000,
    learning_rate=1e-3,
    weight_decay=0.0,
    stored="float16",  # two networks in one file
)


def generator_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of one-step generators and of their teachers by task and model; the teacher of digits is a map's too."""
    return {"gmm-2d": _ring(), "digits": _generators(_DIGITS)}


def _ring() -> dict[str, Recipe]:
    # averages read off the trajectories of the generator's fake model
    head = map_recipes()["gmm-2d"]["direct-f2d2"].with_options(
        teacher="realuid", pool=8_192, steps=6_000, one_step=0.1, to_noise=None
    )
    return {
        "teacher": _FIELD,
        **_generators(_GENERATOR),
        "realuid-plain": _PUBLISHED,
        **_frameworks(),
        "realuid-f2d2": head,
    }


def _generators(generator: Recipe) -> dict[str, Recipe]:
    """RealUID with real data, without, and fine-tuned from the former."""
    assert generator.realuid is not None
    return {
        "realuid": generator,
        "realuid-data-free": generator.with_options(realuid=replace(generator.realuid, a=1.0, b=1.0)),
        "realuid-fine-tuned": generator.with_options(
            realuid=replace(generator.realuid, b=1.0, warm=0.1),
            start_from="realuid",
            steps=generator.optimiser.steps // 3,
            learning_rate=generator.optimiser.learning_rate / 3,
        ),
    }


def _frameworks() -> dict[str, Recipe]:
    """A teacher of every framework, and the generator distilled from it."""
    made: dict[str, Recipe] = {}
    for path, generator in _FRAMEWORKS.items():
        teacher = f"teacher-{path}"
        made[teacher] = _FIELD.with_options(path=path)
        made[f"realuid-{path}"] = generator.with_options(path=path, start_from=teacher, teacher=teacher)
    return made
