"""A cell of every sort runs on a device, and has the numbers of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_files import write_task
from pretended_device import PRETENDED, to_pretended

from flowlik.cells import Cell, Options
from flowlik.evaluation.evaluate_cell import run_prepared
from flowlik.evaluation.prepare import prepare
from flowlik.tasks.registry import get_task
from flowlik_estimators import parse_spec

FEW: dict[str, Any] = {"n_items": 8, "batch_size": 5, "rounds": 0}
EULER = "ode[solver=euler,steps=2]"
CELLS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "closed form": ("gmm-2d", "closed-form", "ode[solver=euler,steps=2,trace=closed]", {}),
    "float64": ("gaussian-2d", "closed-form", EULER, {"dtype": "float64"}),
    "timing": ("thin-2d", "closed-form", EULER, {"rounds": 1, "timing_batch": 4}),
    "samples": ("gmm-2d", "teacher", EULER, {"samples": 16}),
    "samples alone": ("gmm-2d", "meanflow", "meanflow[steps=1]", {"samples": 16, "likelihood": False}),
    "joint map": ("gmm-64d", "direct-f2d2", "f2d2-corrected[steps=1]", {}),
    "policy": ("gmm-2d", "pi-flow-2", "pi-flow[segments=2,substeps=4]", {}),
    "generator": ("gmm-2d", "realuid", "generator[starts=2]", {"n_items": 2}),
    "moments": ("digits", "teacher", "whitened-ode[solver=euler,steps=1,trace=hutchinson]", {"n_items": 3}),
    "probes": (
        "digits",
        "teacher",
        "ode[solver=euler,steps=1,trace=hutchinson,basis=pca]",
        {"n_items": 3, "draws": 2},
    ),
    "automatic batch": ("gmm-2d", "closed-form", EULER, {"batch_size": "auto"}),
    "control": ("gmm-2d", "", "control-gaussian", {}),
    "head of a generator": ("gmm-2d", "realuid-f2d2", "generator[route=head]", {}),
    "density": ("gaussian-2d", "closed-form", EULER, {"density": True}),
}


def measured(
    task: str, model: str, spec: str, options: dict[str, Any], device: str, file: str | None = None
) -> Any:
    """The row and the arrays of a cell."""
    estimator: Any = spec if spec.startswith("control") else parse_spec(spec)[0]
    cell = Cell(
        task=task,
        model=model,
        estimator=estimator,
        options=Options(**(FEW | options)),
        device=device,
        task_file=file,
    )
    return run_prepared(prepare(cell))


def assert_same_numbers(*args: Any) -> None:
    to_pretended(torch.empty(0))
    (row, arrays), (expected, others) = (
        measured(*args[:4], device, *args[4:]) for device in (PRETENDED, "cpu")
    )
    assert row.get("status", "ok") == expected.get("status", "ok") == "ok", row.get("reason")
    assert row.get("reason") == expected.get("reason")
    assert arrays.keys() == others.keys()
    for name, values in others.items():
        np.testing.assert_allclose(arrays[name], values, rtol=1e-4, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("sort", CELLS)
def test_a_cell_has_on_a_device_the_numbers_of_the_cpu(sort: str) -> None:
    assert_same_numbers(*CELLS[sort])


def test_a_cell_of_a_task_of_ones_own_runs_on_a_device(tmp_path: Path) -> None:
    file = write_task(tmp_path, "on-a-device")
    task = get_task(str(file)).id
    assert_same_numbers(task, "net", EULER, {}, str(file))
