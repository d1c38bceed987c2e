"""A run examines each model once, and says in its records what it found; of a sound model they say nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowlik
from flowlik.cells import Cell, Options
from flowlik.evaluation import examination
from flowlik.evaluation.evaluate_cell import run_prepared
from flowlik.evaluation.prepare import Prepared, prepare
from flowlik_estimators import parse_spec


class Reversed:
    """The field with the other sign; it counts its calls."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.event_shape, self.calls = inner, inner.event_shape, 0

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        self.calls += 1
        return -self.inner.velocity(x, t)  # type: ignore[no-any-return]


def prepared(spec: str = "ode[solver=euler,steps=2]") -> Prepared:
    (estimator,) = parse_spec(spec)
    options = Options(n_items=64, samples=0, rounds=0, density=False)
    return prepare(Cell(estimator=estimator, task="gmm-2d", model="closed-form", options=options))


@pytest.fixture(autouse=True)
def _nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examination, "_KNOWN", {})


def test_records_of_a_sound_model_say_nothing() -> None:
    row, _ = run_prepared(prepared())
    assert "examination" not in row["extra"]
    assert row["reason"] is None


def test_findings_stand_in_extra_and_beside_the_reason_and_the_model_is_examined_once() -> None:
    sound = prepared()
    wrong = Reversed(sound.model)
    first = replace(sound, model=wrong, model_hash="reversed")
    row, _ = run_prepared(first)
    (finding,) = row["extra"]["examination"]
    assert "the sign" in finding
    assert "displacements over velocities -1.0" in finding
    assert row["reason"] == f"examination: {finding}"
    calls = wrong.calls
    row, _ = run_prepared(first)
    assert row["extra"]["examination"] == [finding]

    assert 0 < calls - (wrong.calls - calls) <= 20


def test_a_conditional_model_is_examined_with_its_conditions() -> None:
    class Labelled(torch.nn.Module):
        event_shape = (2,)

        def __init__(self) -> None:
            super().__init__()
            self.means = torch.nn.Embedding(3, 2)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor) -> Tensor:
            return 0.1 * self.means(cond) - x

    x = torch.randn(80, 2, generator=torch.Generator().manual_seed(0))
    labels = {split: torch.arange(80) % 3 for split in ("train", "test")}
    task = flowlik.ArrayTask(id="labelled", train=x, test=x, labels=labels, models={"net": Labelled})
    items = task.items("test", 64)
    cell = replace(
        prepared(), model=task.load_model("net", "cpu")[0], model_hash="labelled", items=items, task=task
    )
    assert not [words for words in examination.findings(cell) if "condition" in words or "raised" in words]


def test_examining_leaves_the_random_state_and_failing_cells_their_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = torch.get_rng_state()
    sound = prepared()

    class Lost(Reversed):
        def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
            return torch.full_like(x, float("nan"))

    row, _ = run_prepared(replace(sound, model=Lost(sound.model), model_hash="lost"))
    assert row["status"] == "diverged"
    assert "the model's velocity is NaN at t = 1 for finite x" in row["reason"]
    assert "examination: not finite in 64 of 64 rows" in row["reason"]
    monkeypatch.setattr(examination, "examine", lambda *_: 1 / 0)
    row, _ = run_prepared(replace(sound, model_hash="other"))
    assert row["reason"] is None
    assert torch.equal(torch.get_rng_state(), state)
