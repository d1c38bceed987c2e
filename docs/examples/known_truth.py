"""Whose error it is: a teacher's and its map's likelihoods of samples whose log p is known exactly.

`python known_truth.py [SAMPLES]` takes the first test samples of `digits-flow` (default: 360). The error of the map is,
sample by sample, the teacher's part (its converged ODE against the exact log p) and the map's own (against that ODE).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from flowlik.measures.accuracy import bits_per_dim
from flowlik.measures.bootstrap import bootstrap_intervals
from flowlik.points import whole
from flowlik.tasks import get_task
from flowlik_estimators import get
from flowlik_models.moments import attach
from flowlik_models.zoo import load_model

CONVERGED = get("whitened-ode", clock="stretched", solver="rk4", steps=8)
STEPS = (1, 2, 4, 8)
HEAD = f"{'bits/dim':26}{'mean |error| [95 %]':>26}{'mean error':>12}"


def row(name: str, errors: np.ndarray) -> str:
    """Mean |error| with its interval, and bias."""
    ((low, high),) = bootstrap_intervals(abs(errors))
    return f"{name:26}{f'{abs(errors).mean():.4f} [{low:.4f}, {high:.4f}]':>26}{errors.mean():+12.4f}"


def report(samples: int = 360) -> Iterator[str]:
    """The table, line by line; the teacher's ODE takes its minutes."""
    task = get_task("digits-flow")
    items = task.items("test", samples)
    x = whole(items.x).float()
    exact = bits_per_dim(task.reference("test", items, 1.0).log_prob[0], task.dim, task.levels)
    teacher = attach(load_model(task.id, "teacher"), task.data_moments())
    ode = bits_per_dim(CONVERGED.log_prob(teacher, x).log_prob.numpy(), task.dim, task.levels)
    yield f"{len(x)} samples, {exact.mean():.4f} bits/dim"
    yield HEAD
    yield row("teacher's ODE to exact", ode - exact)
    if not task.has_model("direct-f2d2"):
        return
    student = load_model(task.id, "direct-f2d2")
    for steps in STEPS:
        found = get("f2d2", steps=steps).log_prob(student, x).log_prob.numpy()
        errors = bits_per_dim(found, task.dim, task.levels) - exact
        yield row(f"map, {steps} step{'s'[: steps > 1]}, to exact", errors)
        yield row("  to the teacher's ODE", errors - (ode - exact))


if __name__ == "__main__":
    for line in report(*map(int, sys.argv[1:])):
        sys.stdout.write(line + "\n")
