"""Distillation of a velocity field of one's own into a joint flow map; `flowlik.distill` puts it together."""

from flowlik_models.distillation.recipes import OBJECTIVES, recipe_of
from flowlik_models.distillation.source import Rows, TeacherSource
from flowlik_models.distillation.students import moments_of, sized, student_of, with_divergence_head
from flowlik_models.distillation.teacher import Pool, Teacher, solved_pool

__all__ = [
    "OBJECTIVES",
    "Pool",
    "Rows",
    "Teacher",
    "TeacherSource",
    "moments_of",
    "recipe_of",
    "sized",
    "solved_pool",
    "student_of",
    "with_divergence_head",
]
