"""What a fast likelihood is for, as measurements: each use is a function of a cell that answers one question with the
cell's estimator and with the exact likelihood, on the same points.

A suite names them per cell (`uses = ["importance", "gradient"]`); the numbers go into the record's `extra` under the
use's name, the arrays beside the items. docs/uses.md says what each one asks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowlik.evaluation.uses.comparison import model_comparison
from flowlik.evaluation.uses.gradient import gradients
from flowlik.evaluation.uses.importance import rare_events
from flowlik.evaluation.uses.outliers import outlier_detection
from flowlik.evaluation.uses.routes import routes_of_a_generator
from flowlik.evaluation.uses.training import training_curve

if TYPE_CHECKING:
    from flowlik.evaluation.prepare import Prepared

__all__ = ["USES"]
Measures = dict[str, Any]
Arrays = dict[str, NDArray[np.float64]]

USES: dict[str, Callable[[Prepared], tuple[Measures, Arrays]]] = {
    "comparison": model_comparison,
    "outliers": outlier_detection,
    "importance": rare_events,
    "gradient": gradients,
    "routes": routes_of_a_generator,
    "training": training_curve,
}
