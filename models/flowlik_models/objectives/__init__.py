"""Training objectives, one module each: a condition for the average velocity and one for the average divergence."""

from flowlik_models.objectives.conditions import (
    CONDITIONS,
    Condition,
    Context,
    Derivative,
    evaluation,
    own_field,
    residuals,
    total_derivative,
)
from flowlik_models.objectives.flow_matching import flow_matching_loss
from flowlik_models.objectives.weights import adaptive

__all__ = [
    "CONDITIONS",
    "Condition",
    "Context",
    "Derivative",
    "adaptive",
    "evaluation",
    "flow_matching_loss",
    "own_field",
    "residuals",
    "total_derivative",
]
