"""What the card of a trained model says of its accuracy."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flowlik.cells import Cell, Options
from flowlik.evaluation.batching.batches import evaluate
from flowlik.evaluation.density import cycle_error
from flowlik.measures import accuracy as measures
from flowlik.measures.energy_distance import energy_distance
from flowlik.tasks.points import whole
from flowlik.tasks.task import Task, UnavailableError
from flowlik_estimators import get
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.coupling import TurnedPairs
from flowlik_models.interfaces import can

STEPS = (1, 2, 4, 8)
JUDGED_ITEMS = 1000
FEW_DIMENSIONS = 8
JUDGED_STEPS = 32  # of a field
JUDGED_IMAGES = 128  # of more than 64 pixels: a field costs hundreds of evaluations an image
SMALL = 64  # dimensions
JUDGED_PAIRS = 500
JUDGED_DRAWS = 4000
REPEATED = 5  # times so many
WATCHED_ITEMS = 256  # while training goes on


def likelihood_error(task: Task, network: Any, device: str) -> float | None:
    """Mean |error| of the one-step likelihood in bits/dim while a training goes on; None for a model without one.

    On items of the split `train`: what a recipe is chosen by never has seen the test items. Of a closed form these are
    points of a stream of their own, of images those that the model is trained on.
    """
    if can(network, "joint flow map"):
        estimator = get("f2d2", steps=1)
    elif can(network, "scalar log-density"):
        estimator = get("energy")
    elif can(network, "exact inverse"):
        estimator = get("exact-flow")
    elif getattr(network, "frozen_density", False):
        estimator = get("pi-flow", segments=min(network.segments))
    else:
        return None
    try:
        return _judged(task, network, estimator, "train", device, items=WATCHED_ITEMS).get("bpd_mae")
    except UnavailableError:
        return None


def accuracy(task: Task, network: Any, device: str) -> dict[str, Any]:
    """What goes on a model's card: bits/dim and, where there is a reference, bias and mean |error|, by split and steps.

    A joint map is judged by `f2d2`, a map alone by its cycle error, a field by `ode`, beyond a few dimensions with
    Hutchinson's trace, a generator of x_1 given x_0 by its density on the pairs it is trained for and by their energy
    distance.
    """
    if can(network, "joint flow map"):
        estimators = [get("f2d2", steps=steps) for steps in STEPS]
    elif can(network, "scalar log-density"):
        estimators = [get("energy")]
    elif can(network, "exact inverse"):
        estimators = [get("exact-flow")]
    elif can(network, "policy flow"):
        jacobians = ("frozen",) if network.frozen_density else ("full",)
        estimators = [get("pi-flow", segments=n, jacobian=j) for n in network.segments for j in jacobians]
    elif getattr(network, "conditional", False):
        return {"pairs": _of_pairs(task, network, device)}
    elif can(network, "generator"):
        estimators = _of_generator(task, network)
    elif can(network, "flow map"):
        return {"cycle_error": {str(steps): _cycle(task, network, steps, device) for steps in STEPS}}
    elif not can(network, "velocity"):
        return {}
    else:
        trace = "exact" if task.dim <= FEW_DIMENSIONS else "hutchinson"
        estimators = [get("ode", solver="rk4", steps=JUDGED_STEPS, grid="logsnr", trace=trace)]
    report: dict[str, Any] = {}
    for split in task.splits if task.levels else ("test",):
        for estimator in estimators:
            try:
                report.setdefault(split, {})[estimator.label] = _judged(
                    task, network, estimator, split, device
                )
            except UnavailableError:
                continue
    return report


def _of_generator(task: Task, network: Any) -> list[Any]:
    """Routes of a one-step generator that are quick enough for a card: those in the plane."""
    if task.dim > FEW_DIMENSIONS:
        return []
    routes = ("invert", "fake-flow") if network.fake_is_flow else ("invert",)
    return [get("generator", route=route) for route in routes]


def _of_pairs(task: Task, network: Any, device: str) -> dict[str, float]:
    """Of a generator of x_1 given x_0: bits/dim of log p(x_1 | x_0) and its error against the coupling's, the share of
    points with a root, and the energy distance of pairs with generated x_1 to true pairs.

    That of fresh true pairs stands beside it: what the same number of draws gives where nothing is wrong.
    """
    coupling = TurnedPairs(closed_form(task.id))  # type: ignore[arg-type]
    draws = torch.Generator().manual_seed(0)

    def pairs(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = coupling.truth.sample(n, generator=draws, dtype=torch.float64)
        return coupling.pairs(x, draws).to(device), x.to(device)

    model = copy.deepcopy(network).to(device).double().eval()
    start, end = pairs(JUDGED_PAIRS)
    found = get("generator").log_prob(model, end, cond=start)
    valid = found.valid.cpu()
    bpd, truth = (
        measures.bits_per_dim(of.cpu()[valid].numpy(), task.dim)
        for of in (found.log_prob, coupling.log_prob(end.cpu(), start.cpu()))
    )
    error = bpd - truth
    distances = []
    for _ in range(REPEATED):
        (others, _), fresh, true = pairs(JUDGED_DRAWS), pairs(JUDGED_DRAWS), pairs(JUDGED_DRAWS)
        with torch.no_grad():
            made = model.generate(torch.randn(others.shape, generator=draws).to(others), cond=others)
        known = torch.cat(true, 1)
        distances.append([energy_distance(torch.cat(of, 1), known) for of in ((others, made), fresh)])
    generated, drawn = torch.tensor(distances).T
    row = {
        "bpd": bpd.mean(),
        "bpd_error": error.mean(),
        "bpd_mae": np.abs(error).mean(),
        "valid_share": float(valid.double().mean()),
        "energy_distance": float(generated.mean()),
        "energy_distance_se": float(generated.std()) / math.sqrt(REPEATED),
        "energy_distance_fresh": float(drawn.mean()),
    }
    return _rounded(row)


def _rounded(row: dict[str, Any]) -> dict[str, float]:
    """What is known, to four digits."""
    return {name: float(f"{value:.4g}") for name, value in row.items() if np.isfinite(value)}


def _judged(
    task: Task, network: Any, estimator: Any, split: str, device: str, items: int = JUDGED_ITEMS
) -> dict[str, float]:
    if task.dim > SMALL:
        items = min(items, JUDGED_IMAGES)
    cell = Cell(
        task=task.id,
        model="",
        estimator=estimator,
        device=device,
        options=Options(split=split, n_items=items, batch_size=500),
    )
    points = task.for_model(network).items(split, items)
    points = replace(points, x=points.x.to(torch.float32))
    out = evaluate(cell, network, points.x, points.ids, points.cond)
    shape = (points.draws, points.n)
    truth = np.full(shape, np.nan)
    # an exact flow, or a field of classes, has learned the data, not a teacher: only the data's own density judges it
    own = can(network, "exact inverse") or points.cond is not None
    if not own or task.reference_model == "closed-form":
        with suppress(UnavailableError, ValueError):
            truth = task.reference(split, points, estimator.data_end(network)).log_prob
    levels = None if split == "teacher-samples" else task.levels
    row = measures.summarise(
        out.log_prob.reshape(shape), truth, out.valid.reshape(shape), dim=task.dim, levels=levels
    )
    return _rounded({name: row[name] for name in ("bpd", "bpd_error", "bpd_mae", "spearman") if name in row})


def _cycle(task: Task, network: Any, steps: int, device: str) -> float:
    x = whole(task.items("test", JUDGED_ITEMS).x).to(device=device, dtype=torch.float32)
    error = cycle_error(get("meanflow", steps=steps), network, x)
    return float("nan") if error is None else float(f"{error:.4g}")
