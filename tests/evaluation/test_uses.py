"""The uses of a likelihood where the answer is known: exact estimates are perfect, wrong ones wrong as they must be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import image_files
import numpy as np
import pytest
import torch
from scipy.stats import norm

from flowlik.cells import Cell, Options
from flowlik.evaluation.uses import comparison, gradient, importance, outliers
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError
from flowlik_estimators import get
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.images import CATALOG


def measured(
    use: str, estimator: Any, task: str = "gaussian-2d", model: str = "closed-form", seed: int = 0
) -> dict[str, Any]:
    options = Options(n_items=128, rounds=0, dtype="float64", uses=(use,), seed=seed)
    row, _ = run_cell(Cell(task=task, model=model, estimator=estimator, options=options))
    assert row["status"] == "ok", row["reason"]
    found: dict[str, Any] = row["extra"][use]
    return found


# --- comparison ------------------------------------------------------------------------------------------------


def table(bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    noise = np.random.default_rng(0).normal(size=200)
    exact = np.linspace(1.0, 1.09, 10)[:, None] + noise
    return exact + bias[:, None], exact


def test_a_common_bias_keeps_the_order_and_a_growing_one_turns_it() -> None:
    same = comparison.ranked(*table(np.full(10, 3.0)))
    assert (same["kendall"], same["kendall_lo"]) == pytest.approx((1.0, 1.0))
    assert same["regret"] == 0.0
    assert same["bias"] == pytest.approx(3.0)
    assert same["bias_spread"] == pytest.approx(0.0, abs=1e-12)
    turned = comparison.ranked(*table(np.linspace(0.0, -0.5, 10)))
    assert (turned["kendall"], turned["spearman"]) == pytest.approx((-1.0, -1.0))
    assert turned["regret"] == pytest.approx(0.09) == turned["spread"]


def test_a_rescaled_gaussian_has_the_density_of_the_wider_one() -> None:
    truth = get_task("gaussian-2d").truth
    x = truth.sample(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    variant = comparison.Variant(truth, math.log(1.5), truth.mean)
    found = variant.log_prob(lambda model, points: model.log_prob(points).numpy(), x)
    wider = torch.distributions.MultivariateNormal(truth.mean, 2.25 * truth.mean_and_covariance()[1])
    assert np.allclose(found, wider.log_prob(x).numpy(), atol=1e-9)


def test_the_ten_models_differ_by_less_than_the_bias_of_euler_and_a_good_rule_ranks_them() -> None:
    good = measured("comparison", get("whitened-ode", solver="rk4", steps=12, clock="stretched"), "gmm-2d")
    poor = measured("comparison", get("ode", solver="euler", steps=2, trace="closed"), "gmm-2d")
    for family in ("rescaled", "displaced"):
        assert good[family]["kendall"] > 0.9
        assert good[family]["regret"] < 0.002
        assert poor[family]["kendall"] < good[family]["kendall"]
        assert 0 < poor[family]["least_gap"] < poor[family]["spread"] < abs(poor[family]["bias"])


def test_what_has_no_variants_is_skipped_with_the_cure() -> None:
    with pytest.raises(UnavailableError, match="needs a mixture"):
        comparison.families(get_task("gaussian-2d").truth)


# --- outliers --------------------------------------------------------------------------------------------------


def test_auroc_of_two_normals_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    shift, n = 1.0, 400
    exact = norm.cdf(shift / math.sqrt(2.0))
    inside = 0
    for _ in range(200):
        value, low, high = outliers.auroc(rng.normal(shift, 1, n), rng.normal(0, 1, n))
        assert low < value < high
        inside += low <= exact <= high
    assert 0.9 <= inside / 200 <= 0.99


def test_few_points_or_items_have_no_interval() -> None:
    values = np.arange(40.0)
    assert np.isnan(outliers.auroc(values[:19], values)[1:]).all()
    assert np.isfinite(outliers.auroc(values[:20], values)[1:]).all()
    bits = np.random.default_rng(0).normal(size=(4, 20)) + np.arange(4.0)[:, None]
    assert math.isnan(comparison.ranked(bits[:, :19], bits[:, :19])["kendall_lo"])
    assert np.isfinite(comparison.ranked(bits, bits)["kendall_lo"])


def test_auroc_of_sets_apart_equal_and_broken() -> None:
    values = np.arange(50.0)
    assert outliers.auroc(values + 100, values)[0] == 1.0
    assert outliers.auroc(values, values + 100)[0] == 0.0
    assert outliers.auroc(values, values)[0] == pytest.approx(0.5)
    assert outliers.auroc(values, np.full(50, np.nan))[0] == 1.0


def test_out_of_distribution_images_are_what_they_say() -> None:
    levels = get_task("digits").images("test")[:20]  # type: ignore[attr-defined]
    inverted, shuffled, noise, shifted = (
        outliers.out_of_distribution(name, levels) for name in ("inverted", "shuffled", "noise", "shifted")
    )
    assert torch.equal(16 - inverted, levels)
    assert torch.equal(shuffled.flatten(1).sort(1).values, levels.flatten(1).sort(1).values)
    assert not torch.equal(shuffled, levels)
    assert (int(noise.min()), int(noise.max())) == (0, 16)
    assert torch.equal(shifted[..., 2:], levels[..., :-2])
    assert int(shifted[..., :2].max()) == 0


def test_images_from_files_are_reduced_as_the_digits_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    white = outliers.reduced(torch.full((2, 1, 28, 28), 255, dtype=torch.uint8))
    assert white.shape == (2, 1, 8, 8)
    assert white[0, 0, 1:7, 1:7].unique().tolist() == [16]
    assert int(white[0, 0, 0, 0]) == 4  # of a corner block two of four rows and columns lie inside
    levels = get_task("digits").images("test")[:3]  # type: ignore[attr-defined]
    monkeypatch.setenv("FLOWLIK_DATA", str(tmp_path))
    with pytest.raises(UnavailableError, match="flowlik data get fashion-mnist"):
        outliers.out_of_distribution("fashion-mnist", levels)
    monkeypatch.setitem(CATALOG, "fashion-mnist", image_files.write_idx(tmp_path))
    found = outliers.out_of_distribution("fashion-mnist", levels)
    assert found.shape == (3, 1, 8, 8)
    assert 0 < int(found.max()) <= 16


def test_outliers_are_defined_for_digits_alone() -> None:
    options = Options(n_items=10, rounds=0, uses=("outliers",))
    row, _ = run_cell(
        Cell(
            task="gmm-2d", model="closed-form", estimator=get("ode", solver="euler", steps=1), options=options
        )
    )
    assert row["status"] == "skipped"
    assert "digits" in row["reason"]


# --- importance ------------------------------------------------------------------------------------------------


def test_effective_sample_size_is_n_for_equal_weights_and_one_for_a_single_one() -> None:
    assert importance.effective_share(np.full(40, -3.0)) == pytest.approx(1.0)
    assert importance.effective_share(np.array([0.0] + [-1e4] * 39)) == pytest.approx(1 / 40)
    assert importance.effective_share(np.log(np.arange(1, 4.0))) == pytest.approx(36 / 14 / 3)


def test_tails_are_those_of_the_normal_and_the_design_has_the_probabilities_it_names() -> None:
    one = GaussianMixture(
        torch.ones(1), torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.5]]), torch.eye(2)[None]
    )
    event = importance.Event(torch.tensor([1.0, 0.0], dtype=torch.float64), 5.0)
    assert importance.tail(one, event) == pytest.approx(norm.sf(2.0))
    for task in ("gmm-2d", "gmm-64d"):
        design = importance.design_of(task, get_task(task).truth)  # type: ignore[attr-defined]
        assert design.exact() == pytest.approx(importance.PROBABILITIES)


def test_exact_weights_give_the_exact_odds_within_their_noise_and_a_bias_moves_only_the_mass() -> None:
    truth = get_task("gmm-2d").truth  # type: ignore[attr-defined]
    design = importance.design_of("gmm-2d", truth)
    x = design.proposal.sample(4000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    log_weights = (truth.log_prob(x) - design.proposal.log_prob(x)).numpy()
    hits = np.stack([event.holds(x) for event in design.events])
    assert (hits.mean(1) > 0.1).all()  # a quarter of the points go to the edge of each event
    exact = importance.weighed(log_weights, log_weights, hits, design.exact())
    assert exact["ess"] == exact["ess_exact"] > 0.4
    assert abs(exact["log_odds_error"]) < 4 * exact["log_odds_se"] < 0.5
    assert exact["mass"] == pytest.approx(1.0, abs=0.05)
    moved = importance.weighed(log_weights + 2.0, log_weights, hits, design.exact())
    assert moved["ess"] == pytest.approx(exact["ess"])
    assert moved["odds"] == pytest.approx(exact["odds"])
    assert moved["log_p_error"] == pytest.approx(exact["log_p_error"] + 2.0)


def test_every_seed_has_points_of_its_own_and_standard_errors_are_those_of_the_weights() -> None:
    weights = np.log(np.array([1.0, 2.0, 3.0, 6.0]))
    hits = np.array([[0.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
    found = importance.weighed(weights, weights, hits, importance.PROBABILITIES)
    assert (found["mass"], found["p"]) == pytest.approx((3.0, 2.25))
    assert found["mass_se"] == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    assert found["p_se"] == pytest.approx(np.std([0, 0, 3, 6], ddof=1) / 2)
    euler = get("ode", solver="euler", steps=2, trace="closed")
    cells = [measured("importance", euler, "gmm-2d", seed=seed) for seed in (0, 0, 1)]
    assert cells[0]["mass"] == cells[1]["mass"] != cells[2]["mass"]


def test_a_converged_solve_weighs_as_the_exact_density() -> None:
    found = measured("importance", get("ode", rtol=1e-6, atol=1e-6, trace="closed"), "gmm-2d")
    assert found["ess"] == pytest.approx(found["ess_exact"], abs=1e-3)
    assert found["sample_ess"] == pytest.approx(1.0, abs=1e-3)
    assert found["sample_log_mass"] == pytest.approx(0.0, abs=1e-2)


# --- gradient --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_the_exact_joint_map_has_the_exact_gradient(steps: int) -> None:
    found = measured("gradient", get("f2d2", steps=steps))
    assert found["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert found["error"] < 1e-6


def test_one_euler_step_has_another_gradient() -> None:
    found = measured("gradient", get("ode", solver="euler", steps=1, trace="closed"))
    assert found["error"] > 0.1


def test_the_gradient_in_the_weights_of_a_linear_flow_is_known() -> None:
    """log p(x) = log N(e^-a x; 0, 1) - a for v = a x, so its derivative in a is x^2 e^-2a - 1."""
    from toy_flows import LinearMap

    model = LinearMap(torch.tensor([[0.3]], dtype=torch.float64))
    x = torch.randn(64, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = float((x.square() * math.exp(-0.6) - 1).mean())
    for estimator in (get("f2d2", steps=3), get("ode", solver="rk4", steps=24, grid="logsnr")):
        found = gradient.weight_gradient(estimator, model, x)
        assert found.tolist() == pytest.approx([exact], rel=1e-3)
