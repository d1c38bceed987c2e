"""The recipe of a training: everything that determines it besides seed and data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from flowlik_models.conditional_paths import PATHS, PathName
from flowlik_models.names import unknown
from flowlik_models.objectives.conditions.condition import Derivative
from flowlik_models.objectives.divergence_target import DivergenceTarget
from flowlik_models.objectives.imitation import Imitation
from flowlik_models.objectives.realuid import RealUID
from flowlik_models.recipes.options import Execution, Optimiser, Points, Times, Trajectories, Weights

Objective = Literal[
    "flow-matching",
    "meanflow",
    "shortcut",
    "lsd",
    "esd",
    "direct",
    "calibration",
    "imitation",
    "realuid",
    "energy",
    "likelihood",
]

Fault = Literal["broadcast", "one-direction", "step-hole"]
CLOSED_FORM_TEACHER = "closed-form"
DATA_TEACHER = "data"
SMALLEST_STEP = 1 / 128  # of the dyadic ones
_DIFFERENTIATED = {
    "meanflow",
    "lsd",
    "esd",
}  # objectives that take a derivative of the network along its inputs


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that determines a training run besides seed and data.

    ``objective``: the condition for the map off the diagonal, ``divergence_objective`` the one for its divergence
    (None: the same); ``calibration`` trains the divergence head alone, by the likelihoods of the trajectories' ends
    (`objectives.calibration`), ``energy`` a scalar network by log-densities (`objectives.energy`), ``likelihood`` an
    exact flow by that of the data. ``divergence``: whether the map has that head. ``derivative``: how a condition
    differentiates the network. ``teacher``: where velocities and divergences come from: ``closed-form``, ``data``
    (conditional velocities, and divergences of the averaged network's own diagonal), or a model id. ``network``:
    options of the network. ``start_from``: model id whose weights are taken first (a missing head stays at zero).
    ``path``: the framework of a field that is trained on conditional targets alone, or of a one-step generator.
    ``faults``: faults of the released F2D2 code to reproduce (docs/training-ablations.md).

    Options of every training are grouped: ``optimiser``, ``times``, ``points``, ``weights``, ``trajectories``,
    ``execution`` (`flowlik_models.recipes.options`). Options of one objective: ``divergence_target``, how the
    divergence of a network's field is estimated; ``imitation``, how policies are trained; ``realuid``, how a one-step
    generator is.

    Raises:
        ValueError: options that do not go together, in one line.
    """

    objective: Objective
    divergence_objective: Objective | None = None
    divergence: bool = False
    derivative: Derivative = "difference"
    teacher: str = CLOSED_FORM_TEACHER
    network: dict[str, Any] = field(default_factory=dict)
    start_from: str | None = None
    path: PathName | None = None
    faults: tuple[Fault, ...] = ()
    optimiser: Optimiser = field(default_factory=Optimiser)
    times: Times = field(default_factory=Times)
    points: Points = field(default_factory=Points)
    weights: Weights = field(default_factory=Weights)
    trajectories: Trajectories = field(default_factory=Trajectories)
    execution: Execution = field(default_factory=Execution)
    divergence_target: DivergenceTarget = field(default_factory=DivergenceTarget)
    imitation: Imitation | None = None
    realuid: RealUID | None = None

    def __post_init__(self) -> None:
        """Check that the options go together."""
        _check_names(self)
        _check_faults(self)
        _check_divergence(self)
        _check_imitation(self)
        _check_generator(self)
        _check_teacher(self)
        _check_trajectories(self)
        _check_energy(self)
        _check_round_trip(self)
        _check_likelihood(self)
        _check_compilation(self)
        _check_classes(self)

    def with_options(self, **options: Any) -> Recipe:
        """The recipe with other values of options, each given by its own name, whichever group it belongs to.

        >>> short = Recipe(objective="meanflow").with_options(steps=100, altered=0.0, start_from="teacher")
        >>> short.optimiser.steps, short.points.altered, short.start_from
        (100, 0.0, 'teacher')

        Raises:
            ValueError: an option that no group has (the line gives the nearest match), or values that do not go
                together.
        """
        changes: dict[str, Any] = {}
        grouped: dict[str, dict[str, Any]] = {}
        for name, value in options.items():
            if name not in _GROUP_OF:
                raise ValueError(unknown("option of a recipe", name, _GROUP_OF))
            group = _GROUP_OF[name]
            if group is None:
                changes[name] = value
            else:
                grouped.setdefault(group, {})[name] = value
        for group, values in grouped.items():
            changes[group] = replace(getattr(self, group), **values)
        return replace(self, **changes)

    def flat(self) -> dict[str, Any]:
        """All options by their own names, without groups, as plain values: what a card stores of the recipe."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= value if name in _GROUPS else {name: value}
        return flat


_GROUPS: dict[str, type[Any]] = {
    "optimiser": Optimiser,
    "times": Times,
    "points": Points,
    "weights": Weights,
    "trajectories": Trajectories,
    "execution": Execution,
}

_GROUP_OF: dict[str, str | None] = {
    **{each.name: None for each in fields(Recipe) if each.name not in _GROUPS},
    **{each.name: group for group, kind in _GROUPS.items() for each in fields(kind)},
}
"""The group of every option; None: it has none."""


def _check_names(recipe: Recipe) -> None:
    for name in ("objective", "divergence_objective"):
        objective = getattr(recipe, name)
        if objective is not None and objective not in get_args(Objective):
            raise ValueError(unknown(name, objective, get_args(Objective)))
    if recipe.path is not None and recipe.path not in PATHS:
        raise ValueError(unknown("path", recipe.path, PATHS))


def _check_faults(recipe: Recipe) -> None:
    if wrong := set(recipe.faults) - set(get_args(Fault)):
        raise ValueError(unknown("fault", min(wrong), get_args(Fault)))
    if "step-hole" in recipe.faults and not (recipe.times.dyadic and recipe.objective == "shortcut"):
        raise ValueError("fault step-hole needs objective shortcut with dyadic steps")


def _check_divergence(recipe: Recipe) -> None:
    if recipe.objective == "flow-matching" and (recipe.divergence or recipe.divergence_objective):
        raise ValueError("flow-matching trains a field, which has no divergence head")
    if recipe.divergence_objective and not recipe.divergence:
        raise ValueError("divergence_objective is given and divergence is off")


def _check_imitation(recipe: Recipe) -> None:
    if (recipe.objective == "imitation") != (recipe.imitation is not None):
        raise ValueError("objective imitation and the options `imitation` need each other")
    if recipe.imitation is not None and recipe.divergence != bool(recipe.imitation.divergence):
        raise ValueError("divergence must say whether imitation gives the divergence a weight")


def _check_generator(recipe: Recipe) -> None:
    if (recipe.objective == "realuid") != (recipe.realuid is not None):
        raise ValueError("objective realuid and the options `realuid` need each other")
    if recipe.path is not None and recipe.objective not in ("flow-matching", "realuid"):
        raise ValueError(f"path has no effect with objective {recipe.objective}")
    if recipe.realuid is None:
        return
    if recipe.path is None or recipe.divergence:
        raise ValueError("realuid needs a path and has no divergence head")
    if recipe.teacher in (CLOSED_FORM_TEACHER, DATA_TEACHER):
        raise ValueError("realuid needs a trained teacher, whose weights the generator starts from")
    if bool(recipe.realuid.warm) != bool(recipe.trajectories.pool):
        raise ValueError("a warm start and a pool of the teacher's trajectories need each other")
    if PATHS[recipe.path].paired and (recipe.realuid.warm or recipe.realuid.stable):
        raise ValueError("warm and stable are for paths from the noise, not for paired ones")


def _check_teacher(recipe: Recipe) -> None:
    if recipe.teacher == DATA_TEACHER and (recipe.points.altered or recipe.trajectories.pool):
        raise ValueError("conditional velocities hold on the path only: altered and pool need a teacher")


def _check_trajectories(recipe: Recipe) -> None:
    pool = recipe.trajectories.pool
    if recipe.objective == "calibration" and not (recipe.divergence and pool and recipe.start_from):
        raise ValueError("objective calibration needs a divergence head, a model to start from and a pool")
    if "direct" in (recipe.objective, recipe.divergence_objective) and not recipe.trajectories.direct:
        raise ValueError("objective direct needs a share of direct rows")


def _check_energy(recipe: Recipe) -> None:
    if recipe.objective == "energy" and (recipe.teacher != CLOSED_FORM_TEACHER or recipe.divergence):
        raise ValueError("energy regresses the log-density of a closed form and has no divergence head")


def _check_round_trip(recipe: Recipe) -> None:
    conditions = ("meanflow", "shortcut", "lsd", "esd", "direct")
    if recipe.weights.round_trip and recipe.objective not in conditions:
        raise ValueError(
            f"round_trip has no effect with objective {recipe.objective}, it is of flow maps: {', '.join(conditions)}"
        )


def _check_likelihood(recipe: Recipe) -> None:
    if recipe.objective == "likelihood" and (recipe.teacher != DATA_TEACHER or recipe.divergence):
        raise ValueError("likelihood is of the data, teacher data, and has no divergence head")


def _check_compilation(recipe: Recipe) -> None:
    if recipe.execution.compile and needs_forward_mode(recipe):
        raise ValueError(
            "a compiled network has no forward-mode derivative: compile with derivative difference"
        )


def _check_classes(recipe: Recipe) -> None:
    if "classes" in recipe.network and (
        recipe.objective != "flow-matching" or recipe.teacher != DATA_TEACHER
    ):
        raise ValueError("a network with classes is trained by flow-matching on labelled data, teacher data")


def smallest_step(recipe: Recipe) -> float:
    """Steps up to this length are cut no further; 0 where there is no shortest step, or where a fault leaves a hole."""
    return SMALLEST_STEP if recipe.times.dyadic and "step-hole" not in recipe.faults else 0.0


def needs_forward_mode(recipe: Recipe) -> bool:
    """Whether a forward-mode derivative of the network is taken."""
    conditions = {recipe.objective, recipe.divergence_objective}
    return recipe.derivative == "jvp" and not conditions.isdisjoint(_DIFFERENTIATED)
