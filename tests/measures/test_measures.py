"""Measures against numbers known on paper."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import norm, t

from flowlik.measures import accuracy, bootstrap

LN2 = math.log(2.0)


def summary(log_prob: np.ndarray, ref: np.ndarray, **options: object) -> dict[str, object]:
    log_prob, ref = np.atleast_2d(log_prob), np.atleast_2d(ref)
    valid = options.pop("valid", np.ones(log_prob.shape, dtype=bool))
    return accuracy.summarise(log_prob, ref, np.atleast_2d(valid), **({"dim": 1} | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("levels", [17, 256])
@pytest.mark.parametrize("dim", [1, 64])
def test_uniform_density_on_the_cube_costs_log2_of_the_levels(levels: int, dim: int) -> None:
    log_prob = np.full(5, -dim * math.log(2.0))
    assert accuracy.bits_per_dim(log_prob, dim, levels) == pytest.approx(math.log2(levels), abs=1e-14)


def test_continuous_data_has_no_constant() -> None:
    assert accuracy.bits_per_dim(np.array([-3 * LN2]), 3) == pytest.approx(1.0)


def test_exact_estimates_have_no_error() -> None:
    truth = np.random.default_rng(0).normal(size=300)
    row = summary(truth, truth)
    for name in ("bpd_error", "bpd_mae", "bpd_rmse", "bpd_err_p95", "bpd_error_lo", "bpd_mae_hi"):
        assert row[name] == 0.0
    assert row["spearman"] == pytest.approx(1.0)
    assert row["invalid_share"] == 0.0


def test_errors_are_in_bits_per_dim_and_signed() -> None:
    truth = np.linspace(-3, 0, 101)
    row = summary(truth - 2 * LN2, truth, dim=2)
    assert row["bpd_error"] == pytest.approx(1.0)
    assert row["bpd_mae"] == pytest.approx(1.0)
    assert row["bpd_rmse"] == pytest.approx(1.0)
    assert row["bpd"] == pytest.approx(row["bpd_ref"] + 1.0)  # type: ignore[operator]
    assert row["extra"]["abs_nats_mean"] == pytest.approx(2 * LN2)  # type: ignore[index]


def test_levels_move_bits_but_not_errors() -> None:
    truth = np.linspace(-3, 0, 50)
    plain, grey = summary(truth + 0.1, truth), summary(truth + 0.1, truth, levels=17)
    assert grey["bpd"] == pytest.approx(plain["bpd"] + math.log2(8.5))  # type: ignore[operator]
    assert grey["bpd_error"] == pytest.approx(plain["bpd_error"])


def test_invalid_items_are_counted_and_left_out() -> None:
    truth = np.zeros(10)
    guess = np.zeros(10)
    guess[0], guess[1], guess[2] = np.nan, -np.inf, 50.0
    valid = np.ones(10, dtype=bool)
    valid[2] = False
    row = summary(guess, truth, valid=valid)
    assert row["invalid_share"] == pytest.approx(0.3)
    assert row["bpd_mae"] == 0.0


def test_nothing_valid_gives_no_numbers() -> None:
    row = summary(np.full(4, np.nan), np.zeros(4))
    assert row["invalid_share"] == 1.0
    assert math.isnan(row["bpd"])  # type: ignore[arg-type]
    assert "bpd_mae" not in row


def test_draws_are_averaged_and_judged_where_the_reference_knows_them() -> None:
    ref = np.array([[0.0, 0.0], [np.nan, np.nan]])
    guess = np.array([[-LN2, -LN2], [-3 * LN2, -3 * LN2]])
    row = summary(guess, ref)
    assert row["bpd"] == pytest.approx(2.0)
    assert row["bpd_error"] == pytest.approx(1.0)


def test_draws_without_a_reference_do_not_enter_what_is_compared_with_it() -> None:
    """Four noisy draws of each item, and a reference of the first alone: the exact estimate agrees with it."""
    rng = np.random.default_rng(8)
    draws = rng.normal(size=200) + 0.6 * rng.normal(size=(4, 200))
    ref = np.full_like(draws, np.nan)
    ref[0] = draws[0]
    row = summary(draws, ref)
    assert row["spearman"] == pytest.approx(1.0)
    assert row["bpd_mae"] == pytest.approx(0.0, abs=1e-12)
    assert row["bpd_ref"] == pytest.approx(-draws[0].mean() / LN2)
    # draws that the reference knows all belong together as means
    known = summary(draws + rng.normal(size=draws.shape), draws)
    alone = summary((draws + rng.normal(size=draws.shape))[:1], draws[:1])
    assert alone["spearman"] < known["spearman"] < 1.0  # type: ignore[operator]


def test_stored_items_are_means_over_the_draws_with_a_reference() -> None:
    from flowlik.evaluation.row import _item_arrays

    draws = np.arange(12.0).reshape(4, 3)
    ref = np.full_like(draws, np.nan)
    ref[0, :2], ref[1, 1] = draws[0, :2], draws[1, 1]
    stored = _item_arrays(draws, ref, np.full(draws.shape, True), None)
    assert stored["log_prob"].tolist() == [0.0, 2.5, 6.5]
    assert stored["ref"][:2].tolist() == [0.0, 2.5]
    assert math.isnan(stored["ref"][2])


def test_negative_bits_are_invalid_from_eight_draws_on() -> None:
    guess = np.full((8, 3), 10.0)
    assert summary(guess, np.zeros((8, 3)), levels=17)["invalid_share"] == 1.0
    assert summary(guess[:7], np.zeros((7, 3)), levels=17)["invalid_share"] == 0.0


def test_spearman_is_the_rank_correlation_and_nothing_for_a_constant_truth() -> None:
    truth = np.random.default_rng(1).normal(size=200)
    assert accuracy.spearman(np.exp(truth), truth) == pytest.approx(1.0)
    assert accuracy.spearman(-(truth**3), truth) == pytest.approx(-1.0)
    constant = np.full(200, -3.4657)
    constant[:5] -= 2.0  # blurred edges
    assert math.isnan(accuracy.spearman(truth, constant))
    assert math.isnan(accuracy.spearman(np.zeros(200), truth))


@pytest.mark.parametrize("probes", [2, 4])
def test_error_bars_from_few_probes_cover_by_students_t(probes: int) -> None:
    draws = np.random.default_rng(2).normal(3.0, 2.0, size=(probes, 40_000))
    mean, error = draws.mean(axis=0), draws.std(axis=0, ddof=1) / math.sqrt(probes)
    truth = np.full_like(mean, 3.0)
    assert accuracy.coverage95(mean, truth, error, probes - 1) == pytest.approx(0.95, abs=0.005)
    assert accuracy.coverage95(mean, truth, error, math.inf) < 0.9
    assert math.isnan(accuracy.coverage95(mean, truth, error, 0))


def test_bootstrap_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(3).normal(size=2000)
    ((low, high),) = bootstrap.bootstrap_intervals(values)
    half = norm.ppf(0.975) * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


LAWS = {  # name -> draws of that shape, and the mean
    "normal": (lambda draws, shape: draws.normal(size=shape), 0.0),
    "absolute normal": (lambda draws, shape: abs(draws.normal(size=shape)), math.sqrt(2 / math.pi)),
    "log-normal": (lambda draws, shape: np.exp(draws.normal(size=shape)), math.exp(0.5)),
    "chi-square": (lambda draws, shape: draws.chisquare(1, size=shape), 1.0),
}


@pytest.mark.parametrize("n", [20, 50, 200])
@pytest.mark.parametrize("law", LAWS)
def test_intervals_cover_the_mean_of_skewed_errors_too(law: str, n: int) -> None:
    """2,000 samples: 0.93 is 3.6 standard errors from 0.95; measured are 0.940 to 0.966."""
    draw, mean = LAWS[law]
    values = draw(np.random.default_rng(11), (2000, n))
    low, high = np.array(bootstrap.bootstrap_intervals(values)).T
    covered = float(np.mean((low <= mean) & (mean <= high)))
    assert 0.93 <= covered <= 0.985
    if n == 200:  # and is no wider than it has to be
        student = 2 * t.ppf(0.975, n - 1) * values.std(axis=1, ddof=1) / math.sqrt(n)
        assert np.median(high - low) < 1.15 * np.median(student)


def test_fewer_than_twenty_items_have_no_interval() -> None:
    values = np.random.default_rng(6).normal(size=40)
    for n in (0, 1, 16, 19):
        assert np.isnan(bootstrap.bootstrap_intervals(values[:n])).all()
        row = summary(values[:n] - 3.0, np.zeros(n)) if n else {}
        assert all(
            math.isnan(row[f"{name}_{end}"]) for name in ("bpd_mae", "bpd_error") for end in ("lo", "hi") if n
        )
    assert np.isfinite(bootstrap.bootstrap_intervals(values[:20])).all()
    values[20:] = np.nan  # what is not known does not count
    assert np.isfinite(bootstrap.bootstrap_intervals(values)).all()
    values[19] = np.inf
    assert np.isnan(bootstrap.bootstrap_intervals(values)).all()


def test_an_interval_of_absolute_errors_does_not_reach_below_nought() -> None:
    errors = np.zeros(20)
    errors[0] = 1.0
    row = summary(-errors * LN2, np.zeros(20))
    assert 0.0 <= row["bpd_mae_lo"] < row["bpd_mae"] < row["bpd_mae_hi"] < 1.0  # type: ignore[operator]


def test_bootstrap_is_paired_between_estimators_on_the_same_items() -> None:
    values = np.random.default_rng(4).normal(size=500)
    (one,), (other,) = bootstrap.bootstrap_intervals(values), bootstrap.bootstrap_intervals(values + 2.0)
    assert np.subtract(other, one) == pytest.approx([2.0, 2.0])


def test_mass_is_the_midpoint_rule() -> None:
    square = np.full((10, 10), math.log(0.25))
    assert accuracy.mass(square, (2 / 10) ** 2) == pytest.approx(1.0)
    square[0, 0] = -np.inf
    assert accuracy.mass(square, (2 / 10) ** 2) == pytest.approx(0.99)
    assert accuracy.mass(np.full(4, 1e4), 1.0) == math.inf
    assert math.isnan(accuracy.mass(np.full(4, np.nan), 1.0))
