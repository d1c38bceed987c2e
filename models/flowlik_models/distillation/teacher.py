"""A velocity field as a teacher: where it begins and ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowlik_models.interfaces import Source, data_end_of, ends_of
from flowlik_models.numerics.standard_normal import StandardNormal

EXACT_DIMS = 16
"""Up to here the divergence of its trajectories is exact."""


@dataclass(frozen=True)
class Teacher:
    """A velocity field between ``start``, where its law is ``source``, and ``end``, where the data x lie at
    ``scale`` x.

    >>> from flowlik_models.synthetic import closed_form
    >>> teacher = Teacher.of(closed_form("checkerboard-2d"))
    >>> teacher.start, teacher.end, teacher.scale
    (0.0, 0.999, 1.0)
    """

    model: Any
    start: float
    end: float
    scale: float
    source: Source

    @classmethod
    def of(cls, model: Any) -> Teacher:
        """The teacher that a model is, with ends of its own or from N(0, I) at t = 0 to the data at t = 1 - eps."""
        ends = ends_of(model)
        end = data_end_of(model)
        if ends is None:
            return cls(model, 0.0, end, 1.0, StandardNormal(tuple(model.event_shape)))
        return cls(model, float(ends.noisy_end), end, end, ends.source)

    def give_ends(self, student: Any) -> None:
        """Tell a student that it begins and ends where the teacher does."""
        if ends_of(self.model) is None:
            student.eps = 1.0 - self.end
            return
        # not as submodules: what the source holds is none of the student's weights
        student.__dict__.update(noisy_end=self.start, clean_end=self.end, source=self.source)
