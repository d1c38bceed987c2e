"""Timings that are collected and saved (`--benchmark-json`) and never gate: no comparison fails a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowlik_estimators import parse_spec
from flowlik_models.closed_forms.catalogue import closed_form

BATCH = 64
CASES = {
    "rk4-exact-2d": ("gmm-2d", "ode[solver=rk4,steps=4,trace=exact]"),
    "rk4-hutchinson-2d": ("gmm-2d", "ode[solver=rk4,steps=4,trace=hutchinson]"),
    "rk4-hutchinson-64d": ("gmm-64d", "ode[solver=rk4,steps=4,trace=hutchinson]"),
    "dopri5-closed-64d": ("gmm-64d", "ode[solver=dopri5,rtol=1e-3,atol=1e-3,trace=closed]"),
}


@pytest.mark.parametrize(("task", "spec"), CASES.values(), ids=CASES.keys())
def test_likelihood_of_a_closed_form(benchmark: Any, task: str, spec: str) -> None:
    (estimator,) = parse_spec(spec)
    model = closed_form(task)
    x = model.sample(BATCH, generator=torch.Generator().manual_seed(0))
    benchmark.extra_info |= {"items": BATCH, "threads": torch.get_num_threads()}
    estimate = benchmark.pedantic(estimator.log_prob, args=(model, x), rounds=3, warmup_rounds=1)
    assert estimate.status == "ok"


@pytest.mark.parametrize("steps", [1, 8])
def test_joint_map_of_a_gaussian(benchmark: Any, steps: int) -> None:
    (estimator,) = parse_spec(f"f2d2[steps={steps}]")
    model = closed_form("gaussian-2d")
    x = model.sample(BATCH, generator=torch.Generator().manual_seed(0))
    benchmark.extra_info |= {"items": BATCH, "threads": torch.get_num_threads()}
    estimate = benchmark.pedantic(estimator.log_prob, args=(model, x), rounds=5, warmup_rounds=1)
    assert estimate.status == "ok"
