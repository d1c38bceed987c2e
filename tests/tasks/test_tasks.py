"""Tasks hand out the same points to everybody, and know the truth about them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import EntryPoint

import numpy as np
import pytest
import torch

from flowlik.cells import CONTROLS
from flowlik.evaluation.controls import control_log_prob, gaussian_log_density, why_not
from flowlik.measures import accuracy
from flowlik.tasks import grid as grids
from flowlik.tasks.closed_forms import CheckerboardTask, ClosedFormTask
from flowlik.tasks.registry import get_task, registry
from flowlik.tasks.task import digest
from flowlik_models import plugins
from flowlik_models.closed_forms.catalogue import constants_hash
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.zoo import TASK_MODELS

SYNTHETIC = ("gaussian-2d", "gmm-2d", "gmm-64d", "checkerboard-2d", "thin-2d")
PLANE = ("gaussian-2d", "gmm-2d", "checkerboard-2d", "thin-2d")


@pytest.mark.parametrize("name", [*SYNTHETIC, "digits"])
def test_smaller_runs_are_nested_in_larger_ones(name: str) -> None:
    task = get_task(name)
    few, many = task.items("test", 7), task.items("test", 300)
    assert torch.equal(few.x, many.x[:7])
    assert torch.equal(few.ids, many.ids[:7])
    assert many.x.shape == (300, *task.event_shape)


@pytest.mark.parametrize("name", SYNTHETIC)
def test_splits_and_tasks_draw_different_points(name: str) -> None:
    task = get_task(name)
    assert not torch.equal(task.items("test", 5).x, task.items("train", 5).x)
    assert task.data_hash("test") != task.data_hash("train")


@pytest.mark.parametrize("name", PLANE)
def test_the_truth_integrates_to_one_on_its_grid(name: str) -> None:
    task = get_task(name)
    grid = task.grid()
    assert grid is not None
    density = task.log_density(grid.points, 1.0 - task.eps)
    assert density is not None
    assert accuracy.mass(density, grid.cell_area) == pytest.approx(1.0, abs=1e-4)


def test_grid_lines_of_the_checkerboard_fall_on_its_edges() -> None:
    task = get_task("checkerboard-2d")
    grid = task.grid()
    assert grid is not None
    cell = grid.x[1] - grid.x[0]
    for edge in (-4, -2, 0, 2, 4):
        steps = (edge * (1 - task.eps) - (grid.x[0] - cell / 2)) / cell
        assert steps == pytest.approx(round(steps), abs=1e-9)


def test_grid_rows_are_y_and_columns_x() -> None:
    grid = grids.square_grid(0.0, 2.0, 2, centre=(10.0, 0.0))
    assert grid.points.tolist() == [[10.5, 0.5], [11.5, 0.5], [10.5, 1.5], [11.5, 1.5]]
    assert grid.cell_area == 1.0


# Published with the tasks' constants, from 200,000 draws (60,000 for gmm-64d): bits/dim of the truth, mean absolute
# deviation from it of the mean, of the component's mean and of the Gaussian.
TABLE = {
    "gaussian-2d": (1.886, None, None, 0.0),
    "gmm-2d": (1.541, 0.525, 0.525, 1.148),
    "thin-2d": (-0.283, 0.527, 0.527, 2.238),
    "checkerboard-2d": (2.5, 0.0, None, None),
    "gmm-64d": (-0.015, 0.129, 0.101, 0.621),
}


@pytest.mark.parametrize("name", TABLE)
def test_controls_reproduce_the_published_numbers(name: str) -> None:
    task = get_task(name)
    items = task.items("test", 16_000)
    reference = task.reference("test", items, 1.0 - task.eps)
    truth, *expected = TABLE[name]
    bits = accuracy.bits_per_dim(reference.log_prob, task.dim)
    assert bits.mean() == pytest.approx(truth, abs=0.02)
    published = ("control-mean", "control-component", "control-gaussian")
    assert set(published) == {*CONTROLS} - {"control-median"}
    for control, value in zip(published, expected, strict=True):
        if value is None:
            continue
        guess = control_log_prob(control, task, items, reference)
        error = np.abs(accuracy.bits_per_dim(guess, task.dim) - bits).mean()
        assert error == pytest.approx(value, abs=0.02)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("name", ["gmm-2d", "gmm-64d", "digits"])
def test_no_constant_has_a_smaller_mean_error_than_the_median(name: str, draws: int) -> None:
    task = get_task(name)
    items = task.items("test", 101, draws if task.levels else 1)
    reference = task.reference("test", items, 1.0 - task.eps)

    def error(guess: np.ndarray) -> float:
        judged = accuracy.judged(guess, reference.log_prob, np.full(guess.shape, True), dim=task.dim)
        return float(np.nanmean(np.abs(judged.errors)))

    guess = control_log_prob("control-median", task, items, reference)
    assert np.ptp(guess) == 0
    others = [error(guess + move) for move in (-10, -1, -0.1, -0.01, 0.01, 0.1, 1, 10)]
    assert error(guess) <= min(others)
    assert error(guess) < error(control_log_prob("control-mean", task, items, reference))


def test_a_task_without_components_has_no_component_control() -> None:
    items = get_task("gaussian-2d").items("test", 3)
    assert why_not("control-component", items)
    assert why_not("control-mean", items) is None
    assert not get_task("gaussian-2d").has_components
    assert get_task("gmm-2d").has_components


def test_gaussian_log_density_agrees_with_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    covariance, mean = a @ a.T + torch.eye(3), torch.arange(3.0, dtype=torch.float64)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    expected = torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)
    found = gaussian_log_density(mean.numpy(), covariance.numpy())(x.numpy())
    assert found == pytest.approx(expected.numpy(), abs=1e-12)


def test_digits_are_dequantised_once_for_everybody() -> None:
    task = get_task("digits")
    items = task.items("test", 20, draws=2)
    levels = task.images("test")[:20].float()  # type: ignore[attr-defined]
    x = items.x.reshape(2, 20, 1, 8, 8)
    assert torch.equal(torch.floor((x[0] + 1) * 8.5), levels)
    assert not torch.equal(x[0], x[1])
    assert torch.equal(task.items("test", 20).x, x[0])
    assert len(set(items.ids.tolist())) == 40
    assert task.images("train").shape[0] == 1437  # type: ignore[attr-defined]


def test_moments_of_digits_match_dequantised_images() -> None:
    task = get_task("digits")
    mean, covariance = task.moments()
    x = task.items("train", 1437).x.flatten(1).double().numpy()
    assert mean == pytest.approx(x.mean(axis=0), abs=0.01)
    assert np.diag(covariance) == pytest.approx(x.var(axis=0), abs=0.02)
    assert np.linalg.eigvalsh(covariance).min() >= (2 / 17) ** 2 / 12 * 0.999


def test_own_measures_of_the_checkerboard_know_the_truth_from_a_constant() -> None:
    task = get_task("checkerboard-2d")
    assert isinstance(task, CheckerboardTask)
    x = task.items("test", 500).x
    inside = -math.log(32.0)
    errors = np.where(np.arange(500) % 2, 0.1, -0.1)
    truth = task.own_measures(x, errors, lambda points: task.log_density(points, 0.999))
    constant = task.own_measures(x, errors, lambda points: np.full(len(points), inside))
    assert truth["outside_share"] == 1.0
    assert constant["outside_share"] == 0.0
    assert truth["interior_mae"] == pytest.approx(0.1)


def test_interior_points_are_a_tenth_from_every_edge() -> None:
    task = get_task("checkerboard-2d")
    assert isinstance(task, CheckerboardTask)
    points = torch.tensor([[1.0, 1.0], [0.05, 1.0], [0.12, 1.0], [-1.0, 1.0], [5.0, 5.0]])
    assert (task._depth(points) >= 0.1).tolist() == [True, False, True, False, False]
    assert task._outside().shape == (500, 2)
    assert (-task._depth(task._outside())).min() >= 0.3


@pytest.mark.parametrize(("name", "near"), [("gmm2d", "gmm-2d"), ("digit", "digits")])
def test_an_unknown_task_names_the_nearest(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"did you mean '{near}'"):
        get_task(name)


@dataclass(frozen=True, kw_only=True)
class Somebodys(ClosedFormTask):
    """A closed form that is not in the catalogue."""

    id: str = "somebodys-2d"
    event_shape: tuple[int, ...] = (2,)
    description: str = "a standard normal"

    @cached_property
    def truth(self) -> Gaussian:
        return Gaussian(torch.zeros(2), torch.eye(2))

    def data_hash(self, split: str) -> str:
        return digest(self.id, self.version, split)


def test_a_closed_form_of_another_package_is_its_own_model() -> None:
    task = Somebodys()
    model, weights = task.load_model("closed-form", "cpu")
    assert (task.models, task.has_model("closed-form")) == (("closed-form",), True)
    assert isinstance(model, Gaussian)
    assert model is not task.truth, "a run changes its models, never the truth"
    assert re.fullmatch("[0-9a-f]{12}", weights)
    assert weights == Somebodys().load_model("closed-form", "cpu")[1]
    assert weights != Somebodys(version=2).load_model("closed-form", "cpu")[1]
    with pytest.raises(ValueError, match="unknown task"):
        task.load_model("teacher", "cpu")


def test_closed_forms_of_the_catalogue_keep_the_names_of_their_constants() -> None:
    for name in ("gmm-2d", "gaussian-16d"):
        task = get_task(name)
        assert task.models == TASK_MODELS[name]
        assert task.load_model("closed-form", "cpu")[1] == constants_hash(name)


def test_a_task_of_another_package_goes_by_its_entry_points_name(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [
        EntryPoint(name=name, value=f"{__name__}:{value}", group="flowlik.tasks")
        for name, value in (("renamed-2d", "Somebodys"), ("no-task", "get_task"))
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="'no-task'.*is left out"):
        tasks = registry.__wrapped__()
    assert tasks["renamed-2d"] == Somebodys(id="renamed-2d")
    assert "no-task" not in tasks


def test_an_unknown_split_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="valid: test, train"):
        get_task("gmm-2d").items("teacher-samples", 3)
