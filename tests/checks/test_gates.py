"""Gates pass and fail by the numbers, and every estimator keeps the contract."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from flowlik.checks import gates
from flowlik.checks.contract import contract_verdicts
from flowlik_estimators import available, register
from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate
from flowlik_estimators.registry import _REGISTRY

GATE = {
    "id": "exact", "task": "gaussian-2d", "model": "closed-form", "estimator": "f2d2[steps=2]", "n_items": 20,
    "dtype": "float64", "column": "abs_nats_max", "max": 1e-9,
}  # fmt: skip


def load(folder: Path, *entries: dict[str, Any]) -> list[gates.Gate]:
    (folder / "some.json").write_text(json.dumps({"gates": entries}))
    return gates.load_gates(folder)


def test_a_gate_passes_within_its_limits_and_fails_outside(tmp_path: Path) -> None:
    wanted = load(
        tmp_path,
        GATE,
        GATE | {"id": "nfe", "column": "nfe_mean", "min": 2, "max": 2},
        GATE | {"id": "high", "column": "nfe_mean", "max": 1},
        GATE | {"id": "low", "column": "spearman", "min": 1.5, "max": 2},
    )
    verdicts = list(gates.run_gates(wanted))
    assert [verdict.passed for verdict in verdicts] == [True, True, False, False]
    assert verdicts[1].value == 2.0
    assert "FAIL" in verdicts[2].line()
    assert "(<= 1)" in verdicts[2].line()


def test_a_cell_without_a_value_fails_and_says_why(tmp_path: Path) -> None:
    wanted = load(
        tmp_path,
        GATE | {"id": "refused", "task": "gmm-2d"},
        GATE | {"id": "no such measure", "column": "frechet"},
    )
    refused, nothing = gates.run_gates(wanted)
    assert not refused.passed
    assert "refused" in refused.line()
    assert "joint" in refused.line()
    assert "no value" in nothing.line()


def test_a_column_that_holds_no_numbers_is_refused_and_one_that_is_not_there_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'split', which holds no numbers"):
        load(tmp_path, GATE | {"column": "split"})
    (nothing,) = gates.run_gates(load(tmp_path, GATE | {"column": "bpd_mea"}))
    assert not nothing.passed
    assert "did you mean 'bpd_mae'" in nothing.line()


def test_a_gate_may_look_at_the_difference_to_another_cell(tmp_path: Path) -> None:
    control = {"estimator": "control-mean"}
    wanted = load(
        tmp_path,
        GATE | {"column": "nfe_mean", "minus": {"estimator": "f2d2[steps=5]"}, "max": -3, "min": -3},
        GATE | {"id": "below control-mean", "column": "bpd_mae", "minus": control, "max": 0},
        GATE | {"id": "nothing to take away", "minus": {"task": "gmm-2d"}},
    )
    steps, control_mean, nothing = gates.run_gates(wanted)
    assert (steps.value, steps.passed, control_mean.passed) == (-3.0, True, True)
    assert "refused" in nothing.line()


def test_gates_of_one_cell_share_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    real = gates.run_cell
    monkeypatch.setattr(gates, "run_cell", lambda cell: runs.append(cell) or real(cell))
    gates._row.cache_clear()
    list(gates.run_gates(load(tmp_path, GATE, GATE | {"id": "other", "column": "bpd_mae"})))
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colum": "bpd"}, "did you mean 'column'"),
        ({"task": "gmm3d"}, "unknown task"),
        ({"estimator": "f2d2[steps=1|2]"}, "names 2 estimators"),
        ({"n_items": "20"}, "expected int"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, GATE | change)
    assert "some.json" in str(caught.value)
    with pytest.raises(ValueError, match="twice"):
        load(tmp_path, GATE, GATE)


def test_measured_values_are_noted_beside_the_limits(tmp_path: Path) -> None:
    wanted = load(tmp_path, GATE | {"column": "nfe_mean", "max": 4})
    gates.note_measured(list(gates.run_gates(wanted)))
    (entry,) = json.loads((tmp_path / "some.json").read_text())["gates"]
    assert (entry["measured"], entry["max"]) == (2.0, 4)
    assert gates.load_gates(tmp_path)[0].measured == 2.0


OURS = [name for name, kind in available().items() if kind.__module__.startswith("flowlik_estimators")]


@pytest.mark.parametrize("name", sorted(OURS))
def test_every_estimator_keeps_the_contract(name: str) -> None:
    broken = [verdict.line() for verdict in contract_verdicts((name,)) if not verdict.passed]
    assert not broken


def broken_rules(kind: type[Estimator]) -> set[str]:
    """What the contract has against an estimator that is registered for the moment."""
    register(kind.__name__.lower())(kind)
    try:
        return {v.rule for v in contract_verdicts((kind.__name__.lower(),)) if not v.passed}
    finally:
        _REGISTRY.pop(kind.__name__.lower())


def test_the_contract_catches_a_careless_plugin() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Careless(Estimator):
        """Answers by the size of the batch, whatever the model has answered."""

        family = "plugin"

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            model.velocity(x, run.at(0.5))
            return Estimate(log_prob=x.sum(1).float() * 0 + len(x))

    assert broken_rules(Careless) >= {
        *("batching changes nothing", "a broken model is a status", "an unsuitable model is a status"),
    }


def test_the_contract_catches_one_that_does_not_ask_the_model() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Idle(Estimator):
        """Answers without the model: refused."""

        family = "plugin"

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            return Estimate(log_prob=x.double().sum(1))

    assert broken_rules(Idle) >= {"cost is counted", "shapes and validity"}


def test_the_contract_catches_one_that_reads_the_answer_off_the_model() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Cheat(Estimator):
        """One evaluation for show."""

        family = "plugin"
        exact_to: ClassVar[float] = 1e-9

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            model.velocity(x, run.at(0.5))
            return Estimate(log_prob=model.log_prob(x))

    assert broken_rules(Cheat) >= {"cost is honest"}


def test_the_contract_catches_evaluations_that_pass_the_counter() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Hider(Estimator):
        """Ten evaluations, nine of them past the counter."""

        family = "plugin"
        exact_to: ClassVar[float] = 1e-3

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            model.velocity(x, run.at(0.5))
            for _ in range(9):
                model._model._model.velocity(x, run.at(0.5))
            return Estimate(log_prob=x.double().sum(1))

    assert broken_rules(Hider) >= {"cost is honest", "exact on a Gaussian"}


def test_the_contract_catches_draws_that_follow_the_place_in_the_batch() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Placed(Estimator):
        """Noise by row, and state from call to call."""

        family = "plugin"
        calls: ClassVar[list[int]] = []

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            model.velocity(x, run.at(0.5))
            self.calls.append(1)
            return Estimate(log_prob=x.double().sum(1) + torch.arange(len(x)) + len(self.calls))

    assert broken_rules(Placed) >= {
        *("draws follow the items", "batching changes nothing", "same seed, same answer"),
    }
