"""The synthetic tasks' closed forms: the public path of `flowlik_models.closed_forms.catalogue`."""

from flowlik_models.closed_forms.catalogue import (
    CLOSED_FORM_TASKS,
    SCALING_DIMS,
    SYNTHETIC_TASKS,
    ClosedForm,
    closed_form,
    constants_hash,
)

__all__ = [
    "CLOSED_FORM_TASKS",
    "SCALING_DIMS",
    "SYNTHETIC_TASKS",
    "ClosedForm",
    "closed_form",
    "constants_hash",
]
