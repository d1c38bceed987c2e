"""The recipe of a training: everything that determines it besides seed and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from flowlik_models.conditional_paths import PATHS, PathName
from flowlik_models.objectives.conditions.condition import Derivative
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.objectives.realuid import RealUID

Objective = Literal[
    "flow-matching", "meanflow", "shortcut", "lsd", "esd", "direct", "calibration", "imitation", "realuid"
]

Fault = Literal["broadcast", "one-direction", "step-hole"]
CLOSED_FORM_TEACHER = "closed-form"
DATA_TEACHER = "data"
SMALLEST_STEP = 1 / 128  # of the dyadic ones


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a training run besides seed and data.

    ``objective``: the condition for the map off the diagonal, ``divergence_objective`` the one for its divergence
    (None: the same). ``teacher``: where velocities and divergences come from: ``closed-form``, ``data`` (conditional
    velocities, and divergences of the averaged network's own diagonal), or a model id. ``network``: options of the
    network. ``start_from``: model id whose weights are taken first (a missing head stays at zero).

    ``stretched``, ``diagonal``, ``ends``: shares of times drawn near the data, of s = t, and of s at an end.
    ``dyadic``: steps of lengths 2^-k, down to 1/128, that start at multiples of their length, as Shortcut was
    published, instead of any pair of times; ``middle``: where such a condition cuts a step. ``altered``: share of
    points moved, off the path by noise of a scale uniform up to ``altered_scale``, or ``along`` it (``altered_law``):
    the path's own noise times a factor log-uniform up to the scale, which is where trajectories from beside the data
    pass. ``relative``: targets larger than this are fitted to relative instead of absolute accuracy; needed where the
    field is singular off the data.

    ``weight_c``: constants of the adaptive weights of velocity and divergence; None weighs all alike.
    ``divergence_scale``: the divergence is fitted in units of this (None: of the number of dimensions).
    ``divergence_target``: how the divergence of a network's field is estimated. ``pool``: trajectories of the teacher
    solved beforehand; ``pool_data``: share of them that begin at training images, moved as ``shift`` says, instead of
    at noise; ``pool_share``: share of the data that are the teacher's own samples; ``pool_probes``: probes of each of
    their divergences near the data; ``direct``: share of a batch whose targets are averages read off the trajectories;
    the other rows of objective ``direct`` lie on the diagonal. Objective ``calibration`` trains the divergence head
    alone, by the likelihoods of the trajectories' ends (`objectives.calibration`).
    ``imitation``: how policies are trained, objective ``imitation`` alone. ``path``: the framework of a field that is
    trained on conditional targets alone, or of a one-step generator; ``realuid``: how the latter is trained, objective
    ``realuid`` alone. ``betas``: of Adam.
    ``faults``: faults of the released F2D2 code to reproduce (docs/training.md). ``precision``: of the network's
    forward and backward. ``accumulate``: parts of a batch that a process takes one after the other; like the number of
    processes it changes the trajectory by rounding alone. ``channels_last``, ``fused``, ``compile``: memory format,
    optimiser in one kernel, compiled backbone. ``stored``: type of the weights in the checkpoint. ``snapshots``: shares
    of the steps after which the average is kept as well.

    Raises:
        ValueError: options that do not go together, in one line.
    """

    objective: Objective
    divergence_objective: Objective | None = None
    divergence: bool = False
    network: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    teacher: str = CLOSED_FORM_TEACHER
    steps: int = 10_000
    batch: int = 256
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 10.0
    weight_c: tuple[float | None, float | None] = (1.0, 1.0)
    stretched: float = 0.5
    diagonal: float = 0.25
    ends: float = 0.0
    dyadic: bool = False
    middle: Literal["half", "random"] = "random"
    delta: float = 5e-3
    altered: float = 0.25
    altered_scale: float = 2.0
    altered_law: Literal["uniform", "along"] = "uniform"
    relative: float | None = None
    shift: float = 0.0
    divergence_scale: float | None = None
    divergence_target: DivergenceTarget = field(default_factory=DivergenceTarget)
    pool: int = 0
    pool_data: float = 1 / 3
    pool_share: float = 0.0
    pool_probes: int = 1
    direct: float = 0.0
    derivative: Derivative = "difference"
    imitation: Imitation | None = None
    path: PathName | None = None
    realuid: RealUID | None = None
    betas: tuple[float, float] = (0.9, 0.99)
    faults: tuple[Fault, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    accumulate: int = 1
    channels_last: bool = False
    fused: bool = False
    compile: bool = False
    stored: Literal["float32", "float16"] = "float32"
    snapshots: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Check that the options go together."""
        for name, kind in (
            ("objective", self.objective),
            ("divergence_objective", self.divergence_objective),
        ):
            if kind is not None and kind not in get_args(Objective):
                raise ValueError(f"unknown {name} {kind!r} (valid: {', '.join(get_args(Objective))})")
        if self.divergence_scale is not None and not self.divergence_scale > 0:
            raise ValueError(f"divergence_scale must be positive, got {self.divergence_scale}")
        if unknown := set(self.faults) - set(get_args(Fault)):
            raise ValueError(f"unknown fault {min(unknown)!r} (valid: {', '.join(get_args(Fault))})")
        if "step-hole" in self.faults and not (self.dyadic and self.objective == "shortcut"):
            raise ValueError("fault step-hole needs objective shortcut with dyadic steps")
        if (self.objective == "imitation") != (self.imitation is not None):
            raise ValueError("objective imitation and the options `imitation` need each other")
        if self.imitation is not None and self.divergence != bool(self.imitation.divergence):
            raise ValueError("divergence must say whether imitation gives the divergence a weight")
        if (self.objective == "realuid") != (self.realuid is not None):
            raise ValueError("objective realuid and the options `realuid` need each other")
        if self.path is not None and self.path not in PATHS:
            raise ValueError(f"unknown path {self.path!r} (valid: {', '.join(PATHS)})")
        if self.realuid is not None and (self.path is None or self.divergence):
            raise ValueError("realuid needs a path and has no divergence head")
        if self.realuid is not None and self.teacher in (CLOSED_FORM_TEACHER, DATA_TEACHER):
            raise ValueError("realuid needs a trained teacher, whose weights the generator starts from")
        if self.realuid is not None and bool(self.realuid.warm) != bool(self.pool):
            raise ValueError("a warm start and a pool of the teacher's trajectories need each other")
        from_noise = self.path is None or not PATHS[self.path].paired
        if self.realuid is not None and (self.realuid.warm or self.realuid.stable) and not from_noise:
            raise ValueError("warm and stable are for paths from the noise, not for paired ones")
        if self.path is not None and self.objective not in ("flow-matching", "realuid"):
            raise ValueError(f"path has no effect with objective {self.objective}")
        if self.objective == "flow-matching" and (self.divergence or self.divergence_objective):
            raise ValueError("flow-matching trains a field, which has no divergence head")
        if self.divergence_objective and not self.divergence:
            raise ValueError("divergence_objective is given and divergence is off")
        if not 0 <= self.direct <= 1 or (self.direct and not self.pool):
            raise ValueError("direct is a share of the batch and needs a pool of solved trajectories")
        if self.objective == "calibration" and not (self.divergence and self.pool and self.start_from):
            raise ValueError(
                "objective calibration needs a divergence head, a model to start from and a pool"
            )
        if "direct" in (self.objective, self.divergence_objective) and not self.direct:
            raise ValueError("objective direct needs a share of direct rows")
        if self.accumulate < 1 or self.batch % self.accumulate:
            raise ValueError(f"a batch of {self.batch} cannot be taken in {self.accumulate} equal parts")
        if self.compile and needs_forward_mode(self):
            raise ValueError(
                "a compiled network has no forward-mode derivative: compile with derivative difference"
            )
        if self.teacher == DATA_TEACHER and (self.altered or self.pool):
            raise ValueError("conditional velocities hold on the path only: altered and pool need a teacher")


def smallest_step(recipe: Recipe) -> float:
    """Steps up to this length are cut no further; 0 where there is no shortest step, or where a fault leaves a hole."""
    return SMALLEST_STEP if recipe.dyadic and "step-hole" not in recipe.faults else 0.0


def needs_forward_mode(recipe: Recipe) -> bool:
    """Whether a forward-mode derivative of the network is taken."""
    conditions = {recipe.objective, recipe.divergence_objective}
    return recipe.derivative == "jvp" and not conditions <= {
        "flow-matching",
        "direct",
        "calibration",
        "imitation",
        "shortcut",
        "realuid",
        None,
    }
