"""Models of images from files: Fashion-MNIST for two CPU cores, CIFAR-10 for one GPU.

All maps of a data set share one pool of trajectories, which is solved once.
"""

from __future__ import annotations

from typing import Any

from flowlik_models.recipes.options import Execution, Optimiser, Points, Times
from flowlik_models.recipes.recipe import DATA_TEACHER, Recipe

_GREY_NOISE = 2 / 256 / 12**0.5  # standard deviation of the dequantisation noise of 256 levels
_CALIBRATION_STEPS = 400

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
        ),
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
        "direct-f2d2-calibrated": read_off.with_options(
            objective="calibration",
            start_from="direct-f2d2",
            direct=0.0,
            steps=_CALIBRATION_STEPS,
            learning_rate=1e-3,
            ema=0.99,
            precision="float32",  # of the latents whose norm the head makes up for
        ),
    }
