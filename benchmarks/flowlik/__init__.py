"""flowlik: how fast and how wrong are the likelihood estimators of flow-based generative models.

The harness: tasks, suites, runner, measures, records, references, gates and the command line.
Estimators live in `flowlik_estimators`, models and data in `flowlik_models`; importing this package loads none of them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowlik.records.reading import read_records
    from flowlik.scoring.classes import classify
    from flowlik.scoring.distill import distill
    from flowlik.scoring.reweigh import reweigh
    from flowlik.scoring.score import score
    from flowlik.tasks.arrays import ArrayTask
    from flowlik.tasks.own.students import load_student
    from flowlik_estimators import examine
    from flowlik_models.adapters import wrap

__version__ = "0.1.0"
__all__ = [
    "ArrayTask",
    "__version__",
    "classify",
    "distill",
    "examine",
    "load_student",
    "read_records",
    "reweigh",
    "score",
    "wrap",
]

_HOMES = {
    "ArrayTask": "flowlik.tasks.arrays",
    "classify": "flowlik.scoring.classes",
    "distill": "flowlik.scoring.distill",
    "examine": "flowlik_estimators",
    "load_student": "flowlik.tasks.own.students",
    "read_records": "flowlik.records.reading",
    "reweigh": "flowlik.scoring.reweigh",
    "score": "flowlik.scoring.score",
    "wrap": "flowlik_models.adapters",
}
"""Public name -> where it is; loaded when first asked for, since these bring pandas and torch."""


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for."""
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'flowlik' has no attribute {name!r}")
