"""How every model is trained: one row each. Times on two cores stand on the cards of those that are shipped."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flowlik_models.conditional_paths import PathName
from flowlik_models.networks.policy import PolicyHead
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.objectives.realuid import RealUID
from flowlik_models.recipes.recipe import DATA_TEACHER, Fault, Recipe

_EXACT = DivergenceTarget(trace="exact")

_PLANE = Recipe(
    objective="meanflow",
    network={"hidden": 160, "depth": 4, "gate_rank": 128, "waves": 64, "wave_scale": 1.5},
)

_DIGITS = Recipe(
    objective="flow-matching",
    teacher=DATA_TEACHER,
    network={"widths": (24, 48, 64), "blocks": 1, "dropout": 0.0},
    steps=2_000,
    batch=128,
    learning_rate=4e-3,
    weight_decay=0.01,
    ema=0.998,
    clip=1.0,
    delta=1e-3,
    altered=0.0,
    shift=0.2,
    derivative="jvp",
)

_DIGITS_MAP = replace(
    _DIGITS,
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
)


# Off the squares the field grows like 1/(1 - t) and a point ends hundreds of standard deviations out.
_BOARD = replace(_PLANE, batch=768, altered=0.5, altered_scale=1_000.0, altered_law="along", relative=5.0)

_SPACE = replace(
    _PLANE,
    network={"hidden": 320, "depth": 4, "gate_rank": 192},
    learning_rate=2e-3,
    weight_c=(0.01, 0.01),
    altered=0.1,
    altered_scale=1.0,
)

_BASES = ("meanflow", "shortcut", "shortcut-distill", "lsd", "esd")


def _base(model: str, recipe: Recipe) -> Recipe:
    """The recipe with the objective and the teacher that a model id stands for."""
    if model.startswith("shortcut"):  # whatever it knows of long steps comes from the diagonal
        recipe = replace(recipe, objective="shortcut", diagonal=0.5)
    else:
        recipe = replace(recipe, objective=model)  # type: ignore[arg-type]
    if model != "shortcut":
        return recipe
    # without a teacher: conditional velocities, and the divergence of the map's own diagonal; both are noisy, and
    # adaptive weights would fit another location of the noise than its mean
    return replace(
        recipe,
        teacher=DATA_TEACHER,
        weight_c=(None, 1.0),
        altered=0.0,
        pool=0,
        pool_share=0.0,
        direct=0.0,
    )


def _maps(alone: Recipe, joint: Recipe) -> dict[str, Recipe]:
    """Every way to learn a map, alone and then with a divergence head that starts from it."""
    made: dict[str, Recipe] = {}
    for model in _BASES:
        made[model] = _base(model, alone)
        made[f"{model}-f2d2"] = replace(_base(model, joint), divergence=True, start_from=model)
    return made


def _plain(recipe: Recipe) -> Recipe:
    """The same on a network without Gaussian part, gates and features, as published."""
    network = {**recipe.network, "preconditioned": False, "waves": 0}
    return replace(recipe, network=network, start_from=None)


def _released(recipe: Recipe) -> dict[str, Recipe]:
    """Shortcut-Distill-F2D2 as its code was released, with each of its faults and with all of them."""
    plain = replace(
        _plain(recipe),
        dyadic=True,
        middle="half",
        diagonal=0.75,
        stretched=0.0,
        weight_c=(None, None),
        altered=0.0,
    )
    faults: tuple[Fault, ...] = ("broadcast", "one-direction", "step-hole")
    name = "shortcut-distill-f2d2"
    return {
        f"{name}-plain": plain,
        **{f"{name}-{fault}": replace(plain, faults=(fault,)) for fault in faults},
        f"{name}-released": replace(plain, faults=faults),
    }


def _vectors(
    alone: Recipe, joint: Recipe, *, direct: dict[str, Any], own: DivergenceTarget = _EXACT
) -> dict[str, Recipe]:
    """All models of a task of vectors; the closed form is the teacher."""
    made = _maps(alone, joint)
    made["shortcut-f2d2"] = replace(made["shortcut-f2d2"], divergence_target=own)
    made["meanflow-f2d2-plain"] = _plain(made["meanflow-f2d2"])
    # targets are read off solved trajectories: no derivative, no bootstrap, so large batches are cheap
    read_off: dict[str, Any] = {
        "objective": "direct",
        "divergence": True,
        "direct": 0.9,
        "batch": 1_024,
    } | direct
    return {**made, "direct-f2d2": replace(joint, **read_off)}


def _policies(base: Recipe, imitation: Imitation, segments: tuple[int, ...]) -> dict[str, Recipe]:
    """Policy flows of so many segments, ``pi-flow`` and ``pi-flow-N``."""
    made = {}
    for count in segments:
        options = replace(imitation, segments=(count,))
        made["pi-flow" if count == 1 else f"pi-flow-{count}"] = replace(
            base, objective="imitation", imitation=options, divergence=bool(options.divergence)
        )
    return made


def _changed(recipe: Recipe, *, head: dict[str, Any] | None = None, **options: Any) -> Recipe:
    """A policy recipe with other options of the imitation and of the head."""
    assert recipe.imitation is not None
    new = replace(recipe.imitation, head=replace(recipe.imitation.head, **(head or {})), **options)
    return replace(recipe, imitation=new, divergence=bool(new.divergence))


def _variants(models: dict[str, Recipe], name: str, small: int, steps: int) -> dict[str, Recipe]:
    """Beside the policy flow ``name``: divergences matched; ``small`` components, too few, without and with that."""
    imitation = models[name].imitation
    assert imitation is not None
    few = {"components": small, "local": min(imitation.head.local, small // 2), "levels": False}
    short = replace(models[name], steps=steps)  # what so few can hold is learnt sooner
    matched: dict[str, Any] = {
        "divergence": 4.0,
        "spread": 0.0,
    }  # what the points beside the path tell is told directly
    return {
        f"{name}-divergence": _changed(models[name], **matched),
        f"{name}-small-k": _changed(short, head=few),
        f"{name}-small-k-divergence": _changed(short, head=few, **matched),
    }


_DIGITS_JOINT = replace(_DIGITS_MAP, steps=2_400)
_DIRECT = {"pool": 32_768, "learning_rate": 2e-3}
_MAPS_OF_DIGITS = _maps(_DIGITS_MAP, _DIGITS_JOINT)


# the shipped one began with the teacher's weights, not with those of the map alone
_MAPS_OF_DIGITS["meanflow-f2d2"] = replace(_MAPS_OF_DIGITS["meanflow-f2d2"], start_from="teacher")

RECIPES: dict[str, dict[str, Recipe]] = {
    # the maps alone, which only start the joint ones, are trained in small batches and on the plain path
    "gmm-2d": _vectors(
        replace(_PLANE, steps=4_000),
        replace(_PLANE, batch=768, steps=12_000),
        direct={**_DIRECT, "steps": 12_000},
    ),
    "checkerboard-2d": _vectors(
        replace(_PLANE, steps=5_000),
        replace(_BOARD, steps=20_000),
        # at the squares' edges most of the error is the divergence's
        direct={
            **_DIRECT,
            "steps": 24_000,
            "weight_c": (0.3, 0.03),
            "network": {**_BOARD.network, "hidden": 224},
        },
    ),
    "thin-2d": _vectors(
        replace(_PLANE, steps=4_000), replace(_PLANE, steps=8_000), direct={**_DIRECT, "steps": 12_000}
    ),
    "gmm-64d": _vectors(
        replace(_SPACE, steps=1_500),
        replace(_SPACE, steps=10_000),
        direct={**_DIRECT, "steps": 12_000},
        own=DivergenceTarget(control="gaussian"),
    ),
    "digits": {
        "teacher": _DIGITS,
        # nearly Gaussian still: which probes are quiet depends on the stage of training
        "teacher-early": replace(_DIGITS, steps=200),
        **_MAPS_OF_DIGITS,
        "direct-f2d2": replace(
            _DIGITS_JOINT,
            objective="direct",
            divergence=True,
            direct=0.9,
            steps=9_000,
            pool=12_288,
            pool_data=0.5,
            pool_probes=4,
        ),
    },
}


# on mixtures a number of clusters that is not the truth's, else the fit would be the answer key
for _task, _clusters in (("gmm-2d", 11), ("gmm-64d", 11), ("thin-2d", 5)):
    _direct = RECIPES[_task]["direct-f2d2"]
    RECIPES[_task]["direct-f2d2-clusters"] = replace(
        _direct, network={**_direct.network, "clusters": _clusters}
    )


for _task in ("gmm-2d", "gmm-64d"):
    RECIPES[_task] |= _released(RECIPES[_task]["shortcut-distill-f2d2"])


_POLICY = replace(
    _PLANE,
    network={"hidden": 96, "depth": 3, "waves": 32, "wave_scale": 1.0},
    batch=256,
    steps=12_000,
    learning_rate=3e-3,
    altered=0.0,
    weight_c=(None, None),
)


# 16 components for the eight modes; two cannot hold the posterior, wherever the network puts them
_plane = _policies(_POLICY, Imitation(head=PolicyHead(components=16)), (1, 2, 4))


RECIPES["gmm-2d"] |= _plane | _variants(_plane, "pi-flow", 2, 6_000)


RECIPES["gmm-2d"] |= {
    "pi-flow-on-path": _changed(_plane["pi-flow"], spread=0.0),
    "pi-flow-dropout": _changed(_plane["pi-flow"], dropout=0.05),
    "pi-flow-data-free": _changed(_plane["pi-flow"], data_free=True),
    "pi-flow-anchored-4": _changed(_plane["pi-flow-4"], head={"anchored": True}),
    "pi-flow-dx": _changed(_plane["pi-flow"], head={"kind": "predictions", "components": 8}),
}


_board = _policies(
    replace(
        _POLICY,
        network={"hidden": 128, "depth": 4, "waves": 32, "wave_scale": 1.0},
        relative=5.0,
        altered=0.0,
    ),
    Imitation(head=PolicyHead(components=32, local=16)),
    (1, 2, 4),
)


RECIPES["checkerboard-2d"] |= _board | _variants(_board, "pi-flow-2", 4, 6_000)


_space = _policies(
    replace(_POLICY, network={"hidden": 256, "depth": 4}, steps=3_000, learning_rate=2e-3),
    Imitation(head=PolicyHead(components=4, layout="position"), matches=4),
    (1, 2, 4),
)


RECIPES["gmm-64d"] |= _space | _variants(_space, "pi-flow-2", 1, 1_500)


_images = _policies(
    replace(
        _DIGITS,
        network={**_DIGITS.network, "wide": 64},
        start_from="teacher",
        teacher="teacher",
        batch=64,
        steps=6_400,
        learning_rate=1e-3,
        weight_decay=0.0,
        weight_c=(None, None),
        altered=0.1,
        altered_scale=0.03,
    ),
    Imitation(head=PolicyHead(components=17, layout="position", levels=True), matches=4, eps=0.0),
    (1, 2, 4),
)


RECIPES["digits"] |= _images | _variants(_images, "pi-flow-4", 1, 1_600)


# one segment is there for its samples
RECIPES["digits"]["pi-flow"] = replace(RECIPES["digits"]["pi-flow"], steps=3_200)


# divergences after velocities
for _name, _steps in (("pi-flow-4", 1_200), ("pi-flow-4-small-k", 600)):
    RECIPES["digits"][f"{_name}-divergence"] = replace(
        _changed(RECIPES["digits"][_name], divergence=4.0, spread=0.0),
        start_from=_name,
        steps=_steps,
        learning_rate=5e-4,
        divergence_target=DivergenceTarget(control="gaussian"),
    )


# one-step generators: a teacher of each framework, and what is distilled from it
_FIELD = Recipe(
    objective="flow-matching",
    path="flow-matching",
    teacher=DATA_TEACHER,
    network={"hidden": 128, "depth": 4, "waves": 32, "wave_scale": 1.0},
    steps=6_000,
    batch=512,
    learning_rate=3e-3,
    altered=0.0,
)

_GENERATOR = replace(
    _FIELD,
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
_PUBLISHED_GENERATOR = replace(
    _GENERATOR, realuid=RealUID(a=0.94, b=0.96, start=0.7), pool=0, steps=12_000, learning_rate=3e-4
)


def _generators(generator: Recipe) -> dict[str, Recipe]:
    """RealUID with real data, without, and fine-tuned from the former."""
    assert generator.realuid is not None
    tuned = replace(generator.realuid, b=1.0, warm=0.1)
    return {
        "realuid": generator,
        "realuid-data-free": replace(generator, realuid=replace(generator.realuid, a=1.0, b=1.0)),
        "realuid-fine-tuned": replace(
            generator,
            realuid=tuned,
            start_from="realuid",
            steps=generator.steps // 3,
            learning_rate=generator.learning_rate / 3,
        ),
    }


RECIPES["gmm-2d"] |= {
    "teacher": _FIELD,
    **_generators(_GENERATOR),
    "realuid-plain": _PUBLISHED_GENERATOR,
}


_SHORTER = replace(_GENERATOR, steps=12_000)
_PAIRED = replace(_PUBLISHED_GENERATOR, realuid=RealUID(a=0.94, b=0.96, start=0.7, monotone=30.0))

_FRAMEWORKS: dict[PathName, Recipe] = {
    "noise": _SHORTER,
    "data": _SHORTER,
    "bridge": _PAIRED,
    "interpolant": _PAIRED,
}


for _path, _kind in _FRAMEWORKS.items():
    _taught = f"teacher-{_path}"
    RECIPES["gmm-2d"] |= {
        _taught: replace(_FIELD, path=_path),
        f"realuid-{_path}": replace(_kind, path=_path, start_from=_taught, teacher=_taught),
    }


# a divergence head on the generator: averages read off the trajectories of its fake model
RECIPES["gmm-2d"]["realuid-f2d2"] = replace(
    RECIPES["gmm-2d"]["direct-f2d2"], teacher="realuid", pool=8_192, steps=6_000
)


RECIPES["digits"] |= _generators(
    replace(
        _DIGITS,
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
)


# Fashion-MNIST, for two CPU cores. All maps share one pool of trajectories, which is solved once.
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
    steps=12_000,
    batch=64,
    learning_rate=2e-3,
    weight_decay=0.01,
    ema=0.9995,
    clip=1.0,
    delta=1e-3,
    altered=0.0,
    derivative="jvp",
    precision="bfloat16",
    channels_last=True,
    fused=True,
    stored="float16",
    snapshots=(1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4),
)


def _image_maps(
    teacher: Recipe, alone: dict[str, Any], joint: dict[str, Any], **direct: Any
) -> dict[str, Recipe]:
    """Teacher, MeanFlow, its joint map, the joint map read off trajectories, and the same with its head calibrated."""
    base = replace(
        teacher,
        objective="meanflow",
        start_from="teacher",
        teacher="teacher",
        network={**teacher.network, "dropout": 0.0},
        learning_rate=teacher.learning_rate / 2,
        weight_decay=0.0,
        weight_c=(0.01, 0.1),
        ends=0.02,
        altered=0.1,
        altered_scale=5 * _GREY_NOISE,
        snapshots=(),
        **alone,
    )
    both = replace(base, divergence=True, start_from="meanflow", **joint)
    read_off: dict[str, Any] = {"objective": "direct", "direct": 0.9, "start_from": "teacher"}
    made = replace(both, **(read_off | direct))
    return {
        "teacher": teacher,
        "meanflow": base,
        "meanflow-f2d2": both,
        "direct-f2d2": made,
        "direct-f2d2-calibrated": replace(
            made,
            objective="calibration",
            start_from="direct-f2d2",
            direct=0.0,
            steps=400,
            learning_rate=1e-3,
            ema=0.99,
            precision="float32",  # of the latents whose norm the head makes up for
        ),
    }


RECIPES["fashion-mnist"] = _image_maps(
    _FASHION,
    {
        "steps": 2_000,
        "pool": 3_072,
        "pool_data": 0.5,
        "pool_probes": 2,
        "pool_share": 0.5,
        "direct": 0.3,
        "precision": "float32",  # of derivatives along the path
    },
    {"steps": 1_500},
    steps=9_000,
    precision="bfloat16",
)


# CIFAR-10, for one GPU. Its whole covariance would be larger than the network: cosines stand in for its axes.
_CIFAR = replace(
    _FASHION,
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
    precision="bfloat16",
    compile=True,
)

RECIPES["cifar10"] = _image_maps(
    _CIFAR,
    {
        "steps": 40_000,
        "pool": 16_384,
        "pool_data": 0.5,
        "pool_probes": 2,
        "pool_share": 0.5,
        "direct": 0.3,
        "compile": False,
    },
    {"steps": 60_000},
    steps=100_000,
    compile=True,
)
