"""Masses of cells from dequantisation draws: nearer than the bound, consistent, with a bar, and never above 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm

from flowlik.cells import Cell, Options
from flowlik.measures.importance_weighted import cell_masses, importance_weighted
from flowlik.running.run import run_cell
from flowlik_estimators import get

LEVELS, DIM = 8, 3


def drawn(draws: int, n: int, scale: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Log-densities (draws, n) of N(0, scale^2) in three dimensions, and the exact logarithms of the cells' masses."""
    rng = np.random.default_rng(seed)
    k = np.clip(np.floor((scale * rng.standard_normal((n, DIM)) + 1) * LEVELS / 2), 0, LEVELS - 1)
    z = 2 * (k + rng.random((draws, n, DIM))) / LEVELS - 1
    low, high = 2 * k / LEVELS - 1, 2 * (k + 1) / LEVELS - 1
    exact = np.log(norm.cdf(high / scale) - norm.cdf(low / scale)).sum(1)
    return norm.logpdf(z, scale=scale).sum(2), exact


def bits(log_mass: np.ndarray) -> float:
    return float(-log_mass.mean() / (DIM * math.log(2)))


@pytest.mark.parametrize("scale", [0.1, 0.3])
def test_it_is_between_the_truth_and_the_bound_and_its_error_covers(scale: float) -> None:
    n, volume = 2000, DIM * math.log(2 / LEVELS)
    errors = []
    for draws in (2, 8, 64):
        log_prob, exact = drawn(draws, n, scale)
        row = importance_weighted(log_prob, np.isfinite(log_prob), dim=DIM, levels=LEVELS)
        bound = bits(log_prob.mean(0) + volume)
        errors.append(row["bpd_iw"] - bits(exact))
        assert row["bpd_iw"] < bound
        if draws > 2:  # two have no jackknife to speak of
            assert abs(errors[-1]) < 2.5 * row["bpd_iw_error"]
            assert row["cells_above_one"] == 0.0
    assert abs(errors[2]) < 0.1 * abs(errors[0])


def test_standard_errors_of_a_cell_cover_its_mass() -> None:
    log_prob, exact = drawn(64, 4000, 0.3)
    cells = cell_masses(log_prob, DIM * math.log(2 / LEVELS))
    off = cells.log_mass - exact
    covered = np.abs(off) <= 1.96 * np.sqrt(cells.variance + cells.bias**2)
    assert covered.mean() == pytest.approx(0.95, abs=0.02)
    assert off.mean() == pytest.approx(cells.bias.mean(), abs=3 * off.std() / math.sqrt(4000))


def test_items_that_one_draw_decides_are_counted() -> None:
    log_prob = np.zeros((16, 4))
    log_prob[3, :2] = 30.0
    row = importance_weighted(log_prob - 50.0, np.full((16, 4), True), dim=DIM, levels=LEVELS)
    assert row["iw_one_draw_share"] == 0.5
    assert row["bpd_iw_error"] > 1.0


def test_a_cell_above_one_is_no_likelihood() -> None:
    highest = -DIM * math.log(2 / LEVELS)  # a density that fills its cell
    rng = np.random.default_rng(0)
    log_prob = highest + 0.05 * rng.standard_normal((16, 6)) + np.array([2.0, 1.0, 0.5, -0.5, -1.0, -2.0])
    valid = np.full((16, 6), True)
    assert importance_weighted(log_prob, valid, dim=DIM, levels=LEVELS)["cells_above_one"] == 0.5
    assert "cells_above_one" not in importance_weighted(log_prob[:4], valid[:4], dim=DIM, levels=LEVELS)


def test_of_one_draw_there_is_nothing_and_an_item_without_a_value_is_left_out() -> None:
    log_prob, _ = drawn(8, 5, 0.3)
    valid = np.full((8, 5), True)
    assert importance_weighted(log_prob[:1], valid[:1], dim=DIM, levels=LEVELS) == {}
    valid[2, 0] = False
    log_prob[2, 0] = np.nan
    part = importance_weighted(log_prob[:, 1:], valid[:, 1:], dim=DIM, levels=LEVELS)
    assert importance_weighted(log_prob, valid, dim=DIM, levels=LEVELS) == part


def test_a_record_of_several_draws_has_it_beside_the_bound() -> None:
    estimator = get("ode", solver="midpoint", steps=4, grid="logsnr", trace="closed")
    options = Options(n_items=12, draws=8, split="images")
    row, _ = run_cell(Cell(task="digits-gmm", model="closed-form", estimator=estimator, options=options))
    assert row["status"] == "ok"
    assert row["extra"]["bpd_iw"] < row["bpd"]
    assert row["extra"]["cells_above_one"] == 0.0
