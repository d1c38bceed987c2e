"""Whole-density checks on densities whose mass is known, and on an estimator that contradicts itself."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowlik.cells import Cell, Options
from flowlik.evaluation import models as loaded_models
from flowlik.running import run as runs
from flowlik.tasks import closed_forms
from flowlik.tasks.registry import get_task, registry
from flowlik_estimators import get
from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate, Run, Samples
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian

TASK = "gmm-64d"


@dataclass(frozen=True, kw_only=True)
class Told(Estimator):
    """Says ``share`` times the true density, and spreads ``stray`` over a Gaussian with the data's moments."""

    name = "told"
    family = "told"

    share: float = 1.0
    stray: float = 0.0
    shift: float = 0.0

    def _true(self, x: Tensor) -> Tensor:
        truth = closed_form(TASK)
        exact = truth.log_prob(x.double()) + math.log(self.share)
        if not self.stray:
            return exact
        mean, covariance = truth.mean_and_covariance()
        broad = Gaussian(mean, covariance).log_prob(x.double())
        return torch.logaddexp(exact, broad + math.log(self.stray))

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        model.velocity(x, run.at(0.5))  # an answer that costs nothing is refused
        return Estimate(log_prob=self._true(x))

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        model.velocity(x0, run.at(0.5))
        return Samples(x=x0, log_prob=self._true(x0) + self.shift)


def row_of(estimator: Estimator, task: str = TASK, n_items: int = 3000) -> dict[str, Any]:
    options = Options(n_items=n_items, rounds=0, density=True, dtype="float64")
    return runs.run_cell(Cell(task=task, model="closed-form", estimator=estimator, options=options))[0]


@pytest.mark.parametrize(("share", "stray"), [(1.0, 0.0), (0.7, 0.0), (0.7, 0.3), (0.9, 0.4)])
def test_importance_mass_finds_the_mass_within_its_error_also_off_the_data(
    share: float, stray: float
) -> None:
    row = row_of(Told(share=share, stray=stray))
    assert row["mass_se"] < 0.03
    assert abs(row["mass"] - (share + stray)) <= 4 * row["mass_se"] + 1e-9


def test_mass_of_the_truth_alone_would_miss_what_lies_elsewhere() -> None:
    """The items themselves are the usual proposal; the stray mass above is invisible to it."""
    estimator = Told(share=0.7, stray=0.3)
    items = get_task(TASK).items("test", 3000)
    truth = closed_form(TASK).log_prob(items.x)
    on_items = float(np.exp((estimator._true(items.x) - truth).numpy()).mean())
    assert on_items < 0.85


def test_on_images_the_mass_is_taken_over_the_items_whose_reference_is_known() -> None:
    """1,000 samples of the teacher, of which 256 have a reference: the others must not count as places without mass."""
    estimator = get("f2d2", steps=1)
    options = Options(n_items=1000, rounds=0, density=True, split="teacher-samples")
    row, arrays = runs.run_cell(
        Cell(task="digits", model="meanflow-f2d2", estimator=estimator, options=options)
    )
    weights = np.exp((arrays["log_prob"] - arrays["ref"])[np.isfinite(arrays["ref"])])
    assert len(weights) == 256
    assert row["mass"] == pytest.approx(weights.mean())
    assert row["mass_se"] == pytest.approx(weights.std(ddof=1) / 16)
    held_out = Cell(
        task="digits", model="meanflow-f2d2", estimator=estimator, options=Options(n_items=8, density=True)
    )
    assert runs.run_cell(held_out)[0]["mass"] is None


def test_agreement_is_the_contradiction_in_bits_per_dim() -> None:
    agreed = row_of(Told(shift=6.4), n_items=100)["extra"]["agreement_mae"]
    assert agreed == pytest.approx(6.4 / (64 * math.log(2)), rel=1e-6)
    assert row_of(get("f2d2", steps=2), "gaussian-2d", 50)["extra"]["agreement_mae"] < 1e-9


def test_a_third_partys_task_brings_its_own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(closed_forms.ClosedFormTask):
        models = ("mine",)

        def load_model(self, model: str, device: str) -> tuple[Any, str]:
            return closed_form("gaussian-2d").to(device), "abc"

    known = registry()
    own = Own(**{f: getattr(known["gaussian-2d"], f) for f in ("id", "event_shape", "description", "window")})
    monkeypatch.setitem(known, "gaussian-2d", own)
    loaded_models.load.cache_clear()
    row = runs.run_cell(Cell(task="gaussian-2d", model="mine", estimator=get("f2d2", steps=1)))[0]
    loaded_models.load.cache_clear()
    assert (row["status"], row["model_hash"]) == ("ok", "abc")


def test_models_carry_the_moments_of_their_data() -> None:
    for task in ("gmm-64d", "checkerboard-2d"):
        model, _ = loaded_models.load(task, "closed-form", "cpu", "float32")
        x = closed_form(task).sample(20_000, generator=torch.Generator().manual_seed(5), t=1.0).double()
        spread = np.sqrt(model.moments.eigenvalues.max() / len(x))
        assert np.abs(x.mean(0).numpy() - model.moments.mean).max() < 5 * spread
        covariance = (model.moments.eigenvectors * model.moments.eigenvalues) @ model.moments.eigenvectors.T
        sample = np.cov(x.numpy(), rowvar=False)
        assert np.abs(sample - covariance).max() < 0.05 * model.moments.eigenvalues.max()


# --- maps that fold ---------------------------------------------------------------------------------------------


class Folding(nn.Module):
    """To the noise x -> |x| in the first axis, back and as a generator z -> |z|: half of all points are folded.

    With ``fold`` False it is the identity."""

    event_shape = (2,)

    def __init__(self, fold: bool = True) -> None:
        super().__init__()
        self.fold = fold

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return torch.cat((z[:, :1].abs() if self.fold else z[:, :1], z[:, 1:]), 1)

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return (self.generate(x) - x) / (s - t)[:, None]

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.average_velocity(x, t, s), torch.zeros_like(t)


def reason_of(
    monkeypatch: pytest.MonkeyPatch, estimator: Estimator, fold: bool, **options: Any
) -> str | None:
    """The reason in the record of a cell on such a model."""
    task = get_task("gaussian-2d")
    monkeypatch.setattr(type(task), "load_model", lambda self, model, device: (Folding(fold), "abc"))
    loaded_models.load.cache_clear()
    chosen = Options(n_items=200, batch_size=200, rounds=0, **options)
    row, _ = runs.run_cell(Cell(task=task.id, model="closed-form", estimator=estimator, options=chosen))
    loaded_models.load.cache_clear()
    assert row["status"] == "ok", row["reason"]
    return row["reason"]


@pytest.mark.parametrize(
    ("estimator", "words"),
    [
        (get("flow-map-exact", steps=1), r"determinant of a step is negative at (\d+) of 200 rows"),
        (get("f2d2", steps=1), r"(\d+) of 200 items do not come back from the noise"),
        (get("meanflow", steps=1), r"(\d+) of 200 items do not come back from the noise"),
        (get("generator"), r"(\d+) of 200 rows.*the generator folds"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_map_that_folds_half_of_all_points_says_so_in_its_record(
    monkeypatch: pytest.MonkeyPatch, estimator: Estimator, words: str
) -> None:
    found = re.search(words, str(reason_of(monkeypatch, estimator, fold=True)))
    assert found is not None
    assert 25 <= int(found[1]) <= 120
    assert re.search(words, str(reason_of(monkeypatch, estimator, fold=False))) is None


def test_a_generator_whose_samples_alone_are_asked_for_says_that_it_folds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    estimator = get("generator", route="own-samples")
    reason = reason_of(monkeypatch, estimator, fold=True, samples=300, likelihood=False)
    assert "the generator folds" in str(reason)
    assert reason_of(monkeypatch, estimator, fold=False, samples=300, likelihood=False) is None
