"""How every shipped model is trained: one row each. Times on two cores stand on the models' cards."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .objectives.meanflow import Derivative

Objective = Literal["flow-matching", "meanflow"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a training run besides seed and data.

    ``network``: options of the network. ``start_from``: model id whose weights are taken first (a missing head stays at
    zero). ``teacher``: model whose velocity and divergence are the targets (``None``: the closed form, or the data).
    ``stretched``, ``diagonal``, ``ends``: shares of times drawn near the data, of s = t, and of s at an end.
    ``altered``: share of points moved, off the path by noise of a scale uniform up to ``altered_scale``, or ``along``
    it (``altered_law``): the path's own noise times a factor log-uniform up to the scale, which is where trajectories
    from beside the data pass. ``relative``: targets larger than this are fitted to relative instead of absolute
    accuracy; needed where the field is singular off the data. ``weight_c``: constants of the adaptive weights of
    velocity and divergence. ``probes``: Hutchinson probes per divergence target of a teacher. ``pool``: trajectories
    of the teacher solved beforehand, a third of them from training images; ``pool_share``: share of the data that are
    its own samples; ``direct``: share of a batch whose targets are averages read off the trajectories.
    """

    objective: Objective
    divergence: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    teacher: str | None = None
    steps: int = 10_000
    batch: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 10.0
    weight_c: tuple[float, float] = (1.0, 1.0)
    stretched: float = 0.5
    diagonal: float = 0.25
    ends: float = 0.0
    delta: float = 5e-3
    altered: float = 0.25
    altered_scale: float = 2.0
    altered_law: Literal["uniform", "along"] = "uniform"
    relative: float | None = None
    shift: float = 0.0
    probes: int = 1
    pool: int = 0
    pool_share: float = 0.0
    direct: float = 0.0
    derivative: Derivative = "difference"


_PLANE = Recipe(
    objective="meanflow",
    network={"hidden": 160, "depth": 4, "gate_rank": 128, "waves": 64, "wave_scale": 1.5},
)
_DIGITS = Recipe(
    objective="flow-matching",
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


def _vector_models(base: Recipe, steps: int, joint_steps: int) -> dict[str, Recipe]:
    plain = {**base.network, "preconditioned": False, "waves": 0}
    return {
        "meanflow": replace(base, steps=steps),
        "meanflow-f2d2": replace(base, divergence=True, start_from="meanflow", steps=joint_steps),
        "meanflow-f2d2-plain": replace(base, divergence=True, network=plain, steps=joint_steps),
    }


RECIPES: dict[str, dict[str, Recipe]] = {
    # the maps alone, which only start the joint ones, are trained in small batches and on the plain path
    "gmm-2d": {
        **_vector_models(replace(_PLANE, batch=768), 4_000, 12_000),
        "meanflow": replace(_PLANE, steps=4_000),
    },
    "checkerboard-2d": {**_vector_models(_BOARD, 5_000, 20_000), "meanflow": replace(_PLANE, steps=5_000)},
    "thin-2d": _vector_models(_PLANE, 4_000, 8_000),
    "gmm-64d": _vector_models(_SPACE, 1_500, 5_000),
    "digits": {
        "teacher": _DIGITS,
        # nearly Gaussian still: which probes are quiet depends on the stage of training
        "teacher-early": replace(_DIGITS, steps=200),
        "meanflow": _DIGITS_MAP,
        "meanflow-f2d2": replace(_DIGITS_MAP, divergence=True, steps=2_400),
    },
}
