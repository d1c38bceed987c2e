"""Models of images from files: Fashion-MNIST for two CPU cores, CIFAR-10 for one GPU and, small, for two CPU cores.

All maps of a data set share one pool of trajectories, which is solved once.
"""

from __future__ import annotations

from typing import Any

from flowlik_models.networks.policy import PolicyHead
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.recipes.maps import calibrated
from flowlik_models.recipes.options import Execution, Optimiser, Points, Times
from flowlik_models.recipes.policies import policies_of
from flowlik_models.recipes.recipe import DATA_TEACHER, Recipe

_GREY_NOISE = 2 / 256 / 12**0.5  # standard deviation of the dequantisation noise of 256 levels

_FASHION = Recipe(
    objective="flow-matching",
    teacher=DATA_TEACHER,
    network={
        "widths": (32, 64, 96),
        "blocks": 1,
        "attention": (7,),
        "dropout": 0.0,
        "noise": _GREY_NOISE,
    },
    derivative="jvp",
    optimiser=Optimiser(
        steps=12_000,
        batch=64,
        learning_rate=2e-3,
        weight_decay=0.01,
        ema=0.9995,
        clip=1.0,
        snapshots=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4),
    ),
    times=Times(delta=1e-3),
    points=Points(altered=0.0),
    execution=Execution(precision="bfloat16", channels_last=True, fused=True, stored="float16"),
)

# The whole covariance of CIFAR-10 would be larger than the network: cosines stand in for its axes.
_CIFAR = _FASHION.with_options(
    network={
        "widths": (96, 192, 192),
        "blocks": 2,
        "attention": (16,),
        "head": 64,
        "dropout": 0.1,
        "embed": 384,
        "noise": _GREY_NOISE,
        "basis": "cosine",
    },
    steps=200_000,
    batch=256,
    learning_rate=5e-4,
    ema=0.9999,
    compile=True,
)

# In float32: without AMX bf16 convolutions take nearly twice as long.
_CIFAR_SMALL = _FASHION.with_options(
    network={**_FASHION.network, "attention": (8,), "basis": "cosine"}, steps=9_600, precision="float32"
)


def image_recipes() -> dict[str, dict[str, Recipe]]:
    """Recipes of images from files by task and model."""
    pool = {"pool_data": 0.5, "pool_probes": 2, "pool_share": 0.5, "direct": 0.3}
    return {
        "fashion-mnist": _image_maps(
            _FASHION,
            # float32: derivatives along the path are taken
            alone={"steps": 2_000, "pool": 3_072, **pool, "precision": "float32"},
            joint={"steps": 1_500},
            direct={"steps": 9_000, "precision": "bfloat16"},
        ),
        "cifar10": _image_maps(
            _CIFAR,
            alone={"steps": 40_000, "pool": 16_384, **pool, "compile": False, "precision": "float32"},
            joint={"steps": 60_000},
            direct={"steps": 100_000, "compile": True, "precision": "bfloat16"},
        )
        | _cifar_small({"pool": 3_072, **pool}),
    }


def _cifar_small(pool: dict[str, Any]) -> dict[str, Recipe]:
    """The models of CIFAR-10 for two CPU cores, ids ending in ``-small``."""
    models = _image_maps(
        _CIFAR_SMALL, alone={"steps": 1_500, **pool}, joint={"steps": 1_000}, direct={"steps": 5_000}
    )
    # without derivatives: whatever it knows of long steps comes from the diagonal
    models["shortcut-distill-f2d2"] = models["meanflow-f2d2"].with_options(
        objective="shortcut", diagonal=0.5, start_from="teacher", steps=1_500
    )
    # components start about the teacher's guess of a pixel's colour: one a level, as on digits, would be 256 a channel
    imitation = Imitation(head=PolicyHead(components=8, layout="position"), matches=4, eps=0.0)
    on_path = models["meanflow"].with_options(
        objective="imitation", imitation=imitation, weight_c=(None, None), ends=0.0
    )
    policies = policies_of(on_path.with_options(pool=0, pool_share=0.0, direct=0.0))
    return _suffixed(models | {"pi-flow-4": policies["pi-flow-4"]}, "-small")


def _suffixed(models: dict[str, Recipe], suffix: str) -> dict[str, Recipe]:
    """The same models under ids with a suffix, built on each other under those."""
    ids = {model: f"{model}{suffix}" for model in models}
    return {
        ids[model]: recipe.with_options(
            teacher=ids.get(recipe.teacher, recipe.teacher),
            start_from=ids[recipe.start_from] if recipe.start_from else None,
        )
        for model, recipe in models.items()
    }


def _image_maps(
    teacher: Recipe, *, alone: dict[str, Any], joint: dict[str, Any], direct: dict[str, Any]
) -> dict[str, Recipe]:
    """Teacher, MeanFlow, its joint map, the joint map read off trajectories, and the same with its head calibrated."""
    base = teacher.with_options(
        objective="meanflow",
        start_from="teacher",
        teacher="teacher",
        network={**teacher.network, "dropout": 0.0},
        learning_rate=teacher.optimiser.learning_rate / 2,
        weight_decay=0.0,
        weight_c=(0.01, 0.1),
        ends=0.02,
        altered=0.1,
        altered_scale=5 * _GREY_NOISE,
        snapshots=(),
        **alone,
    )
    both = base.with_options(divergence=True, start_from="meanflow", **joint)
    read_off = both.with_options(objective="direct", direct=0.9, start_from="teacher", **direct)
    return {
        "teacher": teacher,
        "meanflow": base,
        "meanflow-f2d2": both,
        "direct-f2d2": read_off,
        "direct-f2d2-calibrated": calibrated(read_off),
    }
