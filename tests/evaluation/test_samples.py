"""How samples are judged, against sets whose overlap and distance are known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowlik.cells import Cell, Options
from flowlik.measures.energy_distance import energy_distance, energy_distance_and_error
from flowlik.measures.frechet import Normal, frechet, frechet_resampled, normal_of
from flowlik.measures.precision_recall import kernel_distance, precision_recall
from flowlik.planning import suites
from flowlik.running.run import run_cell
from flowlik_estimators import get


def normal(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- precision and recall --------------------------------------------------------------------------------------


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    x = normal(300, 8, 0)
    assert precision_recall(x, x.clone()) == (1.0, 1.0)
    assert precision_recall(x, x + 100.0) == (0.0, 0.0)


def test_half_the_modes_have_precision_one_and_recall_half() -> None:
    mode = normal(200, 2, 0)
    other = mode + 100.0
    precision, recall = precision_recall(torch.cat([mode, other]), mode)
    assert (precision, recall) == (1.0, 0.5)
    assert precision_recall(mode, torch.cat([mode, other])) == (0.5, 1.0)


def test_balls_reach_to_the_kth_neighbour() -> None:
    real = torch.tensor([[0.0], [1.0], [3.0], [10.0]], dtype=torch.float64)
    samples = torch.tensor([[-1.0], [-2.9], [5.0], [20.0]], dtype=torch.float64)
    # radii for k = 2: 3, 2, 3, 9; the ball around 10 reaches down to 1 and up to 19
    assert precision_recall(real, samples, neighbours=2)[0] == 0.75
    # radii for k = 1: 1, 1, 2, 7; -1 lies on the edge of the ball around 0, -2.9 outside of all
    assert precision_recall(real, samples, neighbours=1)[0] == 0.5


def test_sets_that_are_too_small_or_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 4 points"):
        precision_recall(normal(3, 2, 0), normal(9, 2, 1))
    with pytest.raises(ValueError, match="expected features"):
        precision_recall(normal(9, 2, 0), normal(9, 3, 1))


# --- distances -------------------------------------------------------------------------------------------------


def test_kernel_distance_of_shifted_normals() -> None:
    """E (xy + 1)^3 over independent normals with means a and b, from their moments."""
    shift = 0.7

    def kernel(a: float, b: float) -> float:
        cubes = (a**3 + 3 * a) * (b**3 + 3 * b)
        return cubes + 3 * (a**2 + 1) * (b**2 + 1) + 3 * a * b + 1

    exact = kernel(0, 0) + kernel(shift, shift) - 2 * kernel(0, shift)
    found = [kernel_distance(normal(1500, 1, k), normal(1500, 1, 100 + k) + shift) for k in range(8)]
    error = np.std(found, ddof=1) / math.sqrt(len(found))
    assert np.mean(found) == pytest.approx(exact, abs=4 * error)
    assert error < 0.1 * exact
    none = [kernel_distance(normal(500, 4, k), normal(500, 4, 100 + k)) for k in range(20)]
    assert abs(np.mean(none)) < 4 * np.std(none) / math.sqrt(20)


def test_energy_distance_is_zero_for_equal_laws_and_grows_with_the_shift() -> None:
    a, b = normal(1000, 1, 0), normal(1000, 1, 1)
    assert abs(energy_distance(a, b)) < 0.01
    assert energy_distance(a, b + 50.0) == pytest.approx(100 - 4 / math.sqrt(math.pi), abs=0.2)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("n", [50, 400])
def test_standard_error_of_an_energy_distance_is_its_scatter(n: int, shift: float) -> None:
    """Where the laws are equal too, whose distance has no first order. 200 draws know their scatter to 5 %."""
    # there the error itself scatters most
    real = normal(1000, 2, 0)
    found = [energy_distance_and_error(real, normal(n, 2, 10 + k) + shift) for k in range(200)]
    values, errors = np.array(found).T
    assert errors.mean() == pytest.approx(values.std(ddof=1), rel=0.3 if shift == 0 else 0.2)


def test_an_energy_distance_does_not_change_far_from_zero() -> None:
    a, b = normal(300, 2, 0), normal(300, 2, 1) + 0.3
    assert energy_distance(a + 1e6, b + 1e6) == pytest.approx(energy_distance(a, b), abs=1e-8)


@pytest.mark.parametrize(("n", "draws"), [(100, 200), (1000, 200), (10_000, 60)])
@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.1, 1.0), (0.5, 1.2)])
def test_standard_error_of_a_frechet_distance_is_its_scatter(
    n: int, draws: int, shift: float, scale: float
) -> None:
    """Fresh samples of four features, of the real law and of others; 60 draws know their scatter to 9 %."""
    real = Normal(torch.zeros(4).double(), torch.eye(4).double())
    found = [frechet(real, scale * normal(n, 4, 10 + k) + shift) for k in range(draws)]
    scatter = np.std([one.frechet for one in found], ddof=1)
    assert np.mean([one.frechet_se for one in found]) == pytest.approx(scatter, rel=0.3)
    assert found[0].resampled.std(ddof=1) == pytest.approx(found[0].frechet_se, rel=0.2)


def test_a_shared_change_is_seen_through_the_noise_of_the_draw() -> None:
    real, samples = normal_of(normal(2000, 4, 0)), normal(400, 4, 1) + 0.5
    nearer = frechet_resampled(real, samples - 0.01)
    difference = frechet_resampled(real, samples) - nearer
    assert difference.mean() > 3 * difference.std()
    assert difference.std() < 0.1 * nearer.std()


# --- cells about samples alone ---------------------------------------------------------------------------------


def sampled(estimator: object, **options: object) -> Cell:
    chosen = Options(likelihood=False, samples=400, batch_size=150, rounds=0, **options)  # type: ignore[arg-type]
    return Cell(task="gaussian-2d", model="closed-form", estimator=estimator, options=chosen)


def test_a_cell_about_samples_has_their_cost_and_measures_and_no_likelihood() -> None:
    row, arrays = run_cell(sampled(get("self-guidance", steps=1)))
    assert row["status"] == "ok"
    # one Gaussian's divergence is the same everywhere, so there is no slope to take a product for
    assert (row["nfe_mean"], row["vjp_mean"], row["work"], row["n_samples"]) == (2.0, 0.0, 2.0, 400)
    assert row["bpd"] is None
    assert row["bpd_mae"] is None
    assert len(arrays["samples"]) == 64


def test_samples_of_the_exact_map_are_the_data() -> None:
    extra = run_cell(sampled(get("f2d2", steps=1)))[0]["extra"]
    assert abs(extra["energy_distance"]) < 4 * extra["energy_distance_se"]
    from flowlik_models.closed_forms.catalogue import closed_form

    truth = closed_form("gaussian-2d")
    entropy = 0.5 * float(torch.linalg.slogdet(truth.mean_and_covariance()[1])[1]) + math.log(
        2 * math.pi * math.e
    )
    assert extra["samples_bpd"] == pytest.approx(
        entropy / (2 * math.log(2.0)), abs=4 * extra["samples_bpd_se"]
    )


def test_what_does_not_fit_the_model_is_refused_with_the_reason() -> None:
    row, _ = run_cell(replace(sampled(get("self-guidance")), task="gmm-2d"))
    assert row["status"] == "refused"
    assert "joint flow map" in row["reason"]


# --- suites ----------------------------------------------------------------------------------------------------

SUITE = """
[[cells]]
tasks = ["gmm-2d"]
models = ["*-f2d2"]
estimators = ["f2d2[steps=1]"]
samples = 10
uses = ["gradient"]
"""


def loaded(folder: Path, text: str) -> list[Cell]:
    file = folder / "mine.toml"
    file.write_text("controls = false\n" + text)
    return suites.load_suite(str(file))


def test_a_pattern_names_the_models_that_are_there(tmp_path: Path) -> None:
    found = {cell.model for cell in loaded(tmp_path, SUITE)}
    assert "meanflow-f2d2" in found
    assert all(model.endswith("-f2d2") for model in found)
    assert {cell.options.uses for cell in loaded(tmp_path, SUITE)} == {("gradient",)}
    assert loaded(tmp_path, SUITE.replace("*-f2d2", "*-nothing")) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('samples = 10\nuses = ["gradient"]', "likelihood = false"), "expected samples"),
        (("gradient", "gradients"), "did you mean 'gradient'"),
        (('["gradient"]', '"gradient"'), "expected tuple"),
    ],
)
def test_options_that_do_not_go_together_are_named(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path, SUITE.replace(*change))
