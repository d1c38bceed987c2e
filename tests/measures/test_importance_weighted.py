"""Masses of cells from dequantisation draws: nearer than the bound, consistent, with a bar, and never above 1."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import norm, truncnorm

from flowlik.cells import Cell, Options
from flowlik.measures.importance_weighted import cell_masses, importance_weighted
from flowlik.planning.suites import expand
from flowlik.running.run import run_cell
from flowlik.tasks.points import Points
from flowlik.tasks.task import Items, with_normal_noise
from flowlik_estimators import get
from flowlik_models.images.pixels import normal_noise, normal_noise_log_density

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


TAUS = (0.5, 1.0, 3.0)


class Cut:
    """Independent numbers on eight levels, spread in each cell as a normal that is cut ``tau`` standard deviations
    off its middle: what a network that was taught with such noise can learn. The masses of cells are known."""

    def __init__(self, tau: float) -> None:
        self.tau = tau
        self.mass = np.array([0.05, 0.25, 0.1, 0.3, 0.02, 0.08, 0.15, 0.05])

    def log_prob(self, z: np.ndarray) -> np.ndarray:
        """Log-densities (n,) at z (n, DIM) in [-1, 1]."""
        at = np.clip((z + 1) * LEVELS / 2, 0, LEVELS)
        k = np.minimum(at.astype(int), LEVELS - 1)
        within = truncnorm.logpdf(2 * self.tau * (at - k - 0.5), -self.tau, self.tau) + math.log(2 * self.tau)
        return np.asarray((np.log(self.mass[k]) + within + math.log(LEVELS / 2)).sum(1))


def noisy(tau: float, draws: int, k: np.ndarray) -> Items:
    """Levels (n, DIM) with truncated-normal noise, as `Points`, which are made batch by batch."""
    rng = np.random.default_rng(0)
    z = torch.from_numpy(2 * (k + rng.random((draws, *k.shape))) / LEVELS - 1).flatten(0, 1)
    points = Points(lambda a, b: z[a:b], len(z), (DIM,), torch.float64)
    items = Items(x=points, ids=torch.arange(len(z)), n=len(k), draws=draws)
    made, whole = (with_normal_noise(replace(items, x=x), LEVELS, tau) for x in (points, z))
    assert torch.equal(made.x[3:7].tensor(), whole.x[3:7])
    assert np.array_equal(made.log_noise, whole.log_noise)
    return whole


@pytest.mark.parametrize("tau", TAUS)
def test_truncated_normal_noise_has_its_distribution_and_density(tau: float) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    noise = normal_noise(u, tau)
    z = 2 * tau * (noise.numpy() - 0.5)
    assert truncnorm.cdf(z, -tau, tau) == pytest.approx(u.numpy(), abs=1e-12)
    expected = truncnorm.logpdf(z, -tau, tau) + math.log(2 * tau)
    assert normal_noise_log_density(noise, tau).numpy() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", TAUS)
def test_noise_that_the_density_knows_gives_the_mass_of_the_cell_by_one_draw(tau: float) -> None:
    law, rng = Cut(tau), np.random.default_rng(1)
    k = rng.choice(LEVELS, p=law.mass, size=(500, DIM))
    items = noisy(tau, 1, k)
    found = law.log_prob(items.x.numpy()) - items.log_noise[0] + DIM * math.log(2 / LEVELS)
    assert found == pytest.approx(np.log(law.mass[k]).sum(1), abs=1e-9)


@pytest.mark.parametrize("tau", TAUS)
def test_other_noise_gives_a_bound_and_by_weights_the_mass_of_every_cell(tau: float) -> None:
    """One density, its mass in every cell known, whatever the noise: the bound is off by the divergence of the noise
    from the density within the cell, the weighted mean by less than its error, and no cell holds more than 1."""
    law, taught, rng = Cut(tau), 1.7, np.random.default_rng(2)
    k = rng.choice(LEVELS, p=law.mass, size=(400, DIM))
    items = noisy(taught, 64, k)
    log_prob = law.log_prob(items.x.numpy()).reshape(64, 400) - items.log_noise
    exact, volume = np.log(law.mass[k]).sum(1), DIM * math.log(2 / LEVELS)
    grid = np.linspace(-taught, taught, 20001)
    q = truncnorm.pdf(grid, -taught, taught)
    ratio = tau / taught * truncnorm.pdf(tau / taught * grid, -tau, tau)
    gap = DIM * float(np.trapezoid(q * np.log(q / ratio), grid))
    assert (exact - volume - log_prob).mean() == pytest.approx(gap, abs=0.02)
    row = importance_weighted(log_prob, np.isfinite(log_prob), dim=DIM, levels=LEVELS)
    assert abs(row["bpd_iw"] - bits(exact)) < 2.5 * row["bpd_iw_error"]
    assert row["cells_above_one"] == 0.0
    cells = cell_masses(log_prob, volume)
    assert np.exp(cells.log_mass - 3 * np.sqrt(cells.variance)).max() < 1.0


def test_a_record_says_its_noise_and_its_errors_are_those_of_the_same_points() -> None:
    estimator = get("ode", solver="midpoint", steps=4, grid="logsnr", trace="closed")
    options = Options(n_items=12, draws=8, split="images", rounds=0)
    rows = [
        run_cell(
            Cell(
                task="digits-gmm",
                model="closed-form",
                estimator=estimator,
                options=replace(options, truncated_normal=tau),
            )
        )
        for tau in (0.0, 1.0)
    ]
    (uniform, _), (normal, arrays) = rows
    assert [row["dequant_noise"] for row, _ in rows] == [None, "truncated normal 1"]
    assert uniform["cell_id"] != normal["cell_id"]
    assert normal["bpd_mae"] == pytest.approx(uniform["bpd_mae"], rel=0.2)
    off = normal["extra"]["bpd_iw"] - uniform["extra"]["bpd_iw"]
    assert abs(off) < 2 * (normal["extra"]["bpd_iw_error"] + uniform["extra"]["bpd_iw_error"])
    assert normal["extra"]["bpd_iw"] < normal["bpd"] < uniform["bpd"]
    kept = (arrays["ref"] - arrays["log_prob"]).mean() / (64 * math.log(2))
    assert normal["bpd_error"] == pytest.approx(kept, abs=1e-9)


def test_a_stored_reference_knows_uniform_noise_alone_and_no_effect_is_refused() -> None:
    options = Options(n_items=2, truncated_normal=1.0, rounds=0)
    cell = Cell(task="digits", model="teacher", estimator=get("elbo", draws=8), options=options)
    row, _ = run_cell(cell)
    assert row["status"] == "ok"
    assert row["ref_id"] is None
    assert "uniform dequantisation noise" in row["reason"]
    with pytest.raises(ValueError, match=r"truncated_normal = 1\.0 has no effect on task 'gmm-2d'"):
        expand(["gmm-2d"], ["closed-form"], ["f2d2"], Options(truncated_normal=1.0))
    for wrong in (-1.0, 11.0, math.nan):
        with pytest.raises(ValueError, match="expected 0"):
            Options(truncated_normal=wrong)
