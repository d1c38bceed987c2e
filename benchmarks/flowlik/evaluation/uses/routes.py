"""Do the routes to a one-step generator's likelihood agree? Inversion against what its own samples say, and against
the flow of its fake model; and is its integral one?

Everything is computed in float64, whatever the cell's type: roots are then found to a residual of 1e-10, so that what
differs is the routes and not their rounding. docs/math.md section 7.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowlik.evaluation.prepare import Prepared
from flowlik.measures.accuracy import mass
from flowlik.measures.arrays import Array
from flowlik.tasks.grid import square_grid
from flowlik.tasks.points import whole
from flowlik.tasks.task import Task, UnavailableError
from flowlik_estimators import get

SAMPLES = 1000
FLOW_ITEMS = 256
SIDE = 200
BATCH = 4096


def routes_of_a_generator(prepared: Prepared) -> tuple[dict[str, Any], dict[str, Array]]:
    """What inversion says beside the other routes, in nats.

    Measures: `one_root_gap`, the largest |difference| to the density that a sample came with, over the samples with one
    root, and `one_root_share` of them; `folded_share` of the samples, where roots have determinants of both signs;
    `lost_share` of the samples, whose latent was not found; `mass` on a grid of 200 x 200 cells, where the task has a
    window; `flow_gap`, mean |difference| to the fake model's flow on the items, and `flow_bias`, its mean, where that
    flow is the generator's.
    """
    estimator = prepared.cell.estimator
    if getattr(estimator, "route", None) != "invert":
        raise UnavailableError(
            f"routes compares inversion with the others; choose generator, not {estimator.label}"
        )
    model = copy.deepcopy(prepared.model).double()
    measured = _against_samples(estimator, model)
    if (grid_mass := _mass(estimator, model, prepared.task, prepared.cell.device)) is not None:
        measured["mass"] = grid_mass
    return measured | _against_flow(prepared, model), {}


def _against_samples(estimator: Any, model: Any) -> dict[str, float]:
    drawn = get("generator", route="own-samples").sample(model, SAMPLES, dtype=torch.float64)
    assert drawn.log_prob is not None
    found = estimator.log_prob(model, drawn.x)
    if found.status != "ok":
        return {"lost_share": 1.0}
    roots, negative = found.extra["roots"], found.extra["negative_roots"]
    one = (roots == 1) & found.valid
    gap = (found.log_prob - drawn.log_prob).abs()[one]
    return {
        "one_root_gap": float(gap.max()) if len(gap) else math.nan,
        "one_root_share": _share(one),
        "folded_share": _share((negative > 0) & (negative < roots)),
        "lost_share": _share(~found.valid),
    }


def _mass(estimator: Any, model: Any, task: Task, device: str) -> float | None:
    """The integral over the task's window; where no root was found the density is 0."""
    window = getattr(task, "window", None)
    if window is None:
        return None
    low, high, _ = window
    grid = square_grid(low, high, SIDE, centre=getattr(task, "centre", (0.0, 0.0)))
    parts = torch.split(grid.points.to(device), BATCH)
    log_prob = torch.cat([estimator.log_prob(model, part).log_prob for part in parts])
    return mass(log_prob.nan_to_num(-math.inf).cpu().numpy(), grid.cell_area)


def _against_flow(prepared: Prepared, model: Any) -> dict[str, float]:
    items = prepared.items
    assert items is not None
    flow = get("generator", route="fake-flow")
    if flow.supports(model) is not None:
        return {}
    x = whole(items.x[: min(items.n, FLOW_ITEMS)]).double().to(prepared.cell.device)
    ours, theirs = (estimator.log_prob(model, x) for estimator in (prepared.cell.estimator, flow))
    difference = (theirs.log_prob - ours.log_prob)[ours.valid & theirs.valid].cpu().numpy()
    if not len(difference):
        return {}
    return {"flow_gap": float(np.abs(difference).mean()), "flow_bias": float(difference.mean())}


def _share(which: Tensor) -> float:
    return float(which.double().mean())
