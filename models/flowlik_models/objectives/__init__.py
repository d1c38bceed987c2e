"""Training objectives, one module each: a condition for the average velocity and one for the average divergence."""

from .conditions import Condition, Context, Derivative, evaluation, own_field, residuals, total_derivative
from .direct import direct
from .eulerian import eulerian
from .flow_matching import flow_matching_loss
from .lagrangian import lagrangian
from .meanflow import meanflow
from .semigroup import semigroup
from .weights import adaptive

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
    "adaptive",
    "evaluation",
    "flow_matching_loss",
    "own_field",
    "residuals",
    "total_derivative",
]
