"""One training step of every objective runs on a device as on the CPU."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_device import PRETENDED, DeviceGenerator, to_pretended
from torch import Tensor

from flowlik_models.recipes.recipe import Recipe
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import preparation, trajectories
from flowlik_models.training.losses import loss_of
from flowlik_models.training.process_group import ALONE
from flowlik_models.training.trainer import _Training
from flowlik_models.zoo import checkpoint_path

ROWS, TRAJECTORIES = 8, 4


def kind(task: str, recipe: Recipe) -> tuple[Any, ...]:
    """What tells the steps of two recipes apart."""
    target = recipe.divergence_target
    return (
        task,
        *(recipe.objective, recipe.divergence_objective, recipe.path, recipe.divergence, recipe.derivative),
        *(recipe.imitation is not None, recipe.realuid is not None, recipe.teacher == "data", recipe.faults),
        *(target.trace, target.basis, recipe.points.altered_law),
    )


def steps() -> list[Any]:
    """A recipe of every kind of step, of the shipped tasks."""
    found: dict[tuple[Any, ...], Any] = {}
    for task in ("gmm-2d", "digits"):
        for model, recipe in RECIPES[task].items():
            found.setdefault(kind(task, recipe), pytest.param(task, model, id=f"{task}-{model}"))
    return list(found.values())


def loss(task: str, model: str, out: Path, device: str) -> float:
    """The loss of a first step, which is then taken."""
    recipe = RECIPES[task][model]
    pool = min(recipe.trajectories.pool, TRAJECTORIES)
    recipe = recipe.with_options(batch=ROWS, pool=pool, pool_probes=1, compile=False, precision="float32")
    if recipe.start_from is not None and not checkpoint_path(task, recipe.start_from).is_file():
        recipe = recipe.with_options(start_from=None)  # not shipped; it is the step that is looked at
    torch.manual_seed(0)
    network, source = preparation.prepared(task, recipe, out, device)
    run = _Training(network, recipe, "", out / "state", ALONE, device)
    on_device = source.device.type == "pretended"
    generator = (DeviceGenerator if on_device else torch.Generator)(source.device).manual_seed(1)
    torch.manual_seed(1)
    value = loss_of(recipe, run.network, run.average, source, generator, device, 0)
    run.take(value)
    assert {parameter.device.type for parameter in network.parameters()} == {value.device.type}
    return float(value.detach())


@pytest.mark.parametrize(("task", "model"), steps())
def test_a_step_on_a_device_has_the_loss_of_the_cpu(
    task: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "solve", functools.partial(trajectories.solve, steps=4))
    to_pretended(Tensor())
    assert loss(task, model, tmp_path, PRETENDED) == pytest.approx(
        loss(task, model, tmp_path, "cpu"), rel=1e-4
    )
