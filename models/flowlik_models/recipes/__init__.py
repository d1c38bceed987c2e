"""How every model is trained: one recipe each."""

from flowlik_models.recipes.options import Execution, Optimiser, Points, Times, Trajectories, Weights
from flowlik_models.recipes.recipe import (
    CLOSED_FORM_TEACHER,
    DATA_TEACHER,
    SMALLEST_STEP,
    Fault,
    Objective,
    Recipe,
    needs_forward_mode,
    smallest_step,
)
from flowlik_models.recipes.table import RECIPES

__all__ = [
    "CLOSED_FORM_TEACHER",
    "DATA_TEACHER",
    "RECIPES",
    "SMALLEST_STEP",
    "Execution",
    "Fault",
    "Objective",
    "Optimiser",
    "Points",
    "Recipe",
    "Times",
    "Trajectories",
    "Weights",
    "needs_forward_mode",
    "smallest_step",
]
