"""References of closed forms: the truth's own numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowlik.measures import accuracy
from flowlik.measures.arrays import Array
from flowlik.references.card import SCHEMA, check, write_card
from flowlik.tasks.points import whole

if TYPE_CHECKING:
    from flowlik.tasks.closed_forms import ClosedFormTask


def _summarise_closed_form(task: ClosedFormTask, folder: Path) -> Path:
    """The truth's own numbers on 20,000 fresh points, and that its density integrates to 1 on the task's grid."""
    n = 20_000
    items = task.items("test", n)
    end = 1.0 - task.eps
    bits = accuracy.bits_per_dim(task.log_density(items.x, end), task.dim)
    checks = [check("share of points whose density is not finite", float(np.mean(~np.isfinite(bits))), 0.0)]
    grid = task.grid()
    if grid is not None:
        mass = accuracy.mass(task.log_density(grid.points, end), grid.cell_area)
        checks.append(check("|mass on the task's grid - 1|", abs(mass - 1.0), 1e-4))
    mean, covariance = task.moments()
    x = whole(items.x).flatten(1).numpy()
    standard_error = np.sqrt(np.diag(covariance) / n)
    checks.append(
        check(
            "largest |sample mean - mean| in standard errors", _largest(x.mean(0) - mean, standard_error), 5.0
        )
    )
    card = {
        "schema": SCHEMA,
        "task": task.id,
        "model": "closed-form",
        "ref_id": "closed-form",
        "how": "exact log-density of the closed form at t_end, float64; nothing is stored per item",
        "data_hash": task.data_hash("test"),
        "t_end": end,
        "n": n,
        "bpd_mean": float(bits.mean()),
        "bpd_se": float(bits.std(ddof=1) / math.sqrt(n)),
        "bpd_quantiles": dict(zip(("p05", "p50", "p95"), np.quantile(bits, (0.05, 0.5, 0.95)), strict=True)),
        "checks": checks,
    }
    return write_card(folder / f"{task.id}.json", card)


def _largest(difference: Array, standard_error: Array) -> float:
    return float(np.max(np.abs(difference) / standard_error))
