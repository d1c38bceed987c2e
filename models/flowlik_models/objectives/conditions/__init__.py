"""The conditions that make (u, D) a joint flow map, one module each, and their table."""

from flowlik_models.objectives.conditions.condition import (
    Condition,
    Context,
    Derivative,
    evaluation,
    own_field,
    residuals,
    total_derivative,
)
from flowlik_models.objectives.conditions.direct import direct
from flowlik_models.objectives.conditions.eulerian import eulerian
from flowlik_models.objectives.conditions.lagrangian import lagrangian
from flowlik_models.objectives.conditions.meanflow import meanflow
from flowlik_models.objectives.conditions.semigroup import semigroup

CONDITIONS: dict[str, Condition] = {
    "meanflow": meanflow,
    "shortcut": semigroup,
    "lsd": lagrangian,
    "esd": eulerian,
    "direct": direct,
}

__all__ = [
    "CONDITIONS",
    "Condition",
    "Context",
    "Derivative",
    "evaluation",
    "own_field",
    "residuals",
    "total_derivative",
]
