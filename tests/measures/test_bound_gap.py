"""The gap between a diffusion's likelihood and its ODE's: mean, error, and spread without the draws' noise."""

from __future__ import annotations

import numpy as np
import pytest

from flowlik.cells import Cell, Options
from flowlik.measures.bound_gap import bound_gap
from flowlik.running.run import run_cell
from flowlik_estimators import get


def test_the_spread_is_that_of_the_items_without_the_noise_of_the_draws() -> None:
    rng = np.random.default_rng(0)
    stderr = np.full(40_000, 0.04)
    found = bound_gap(0.02 + 0.03 * rng.standard_normal(40_000) + 0.04 * rng.standard_normal(40_000), stderr)
    assert found["ode_gap"] == pytest.approx(0.02, abs=0.001)
    assert found["ode_gap_se"] == pytest.approx(0.05 / 200, rel=0.02)
    assert found["ode_gap_sd"] == pytest.approx(0.03, rel=0.03)


def test_noise_alone_is_no_spread_and_too_few_items_no_gap() -> None:
    assert bound_gap(np.array([0.1, -0.1]), np.array([1.0, 1.0]))["ode_gap_sd"] == 0.0
    assert bound_gap(np.array([0.1, np.nan]), None) == {}


@pytest.mark.parametrize(
    ("model", "estimator", "known"),
    [("closed-form", "elbo", True), ("teacher", "elbo", False), ("closed-form", "ode", False)],
)
def test_it_is_given_where_the_reference_is_the_ode_of_the_same_model(
    model: str, estimator: str, known: bool
) -> None:
    cell = Cell(task="gmm-2d", model=model, estimator=get(estimator), options=Options(n_items=20))
    row, _ = run_cell(cell)
    assert row["status"] == "ok"
    assert ("ode_gap" in row["extra"]) == known
    if known:
        assert row["extra"]["ode_gap"] == pytest.approx(row["bpd_error"])
        assert abs(row["extra"]["ode_gap"]) < 4 * row["extra"]["ode_gap_se"]
