"""Gates pass and fail by the numbers, and every estimator keeps the contract."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flowlik import gates
from flowlik.contract import contract_verdicts
from flowlik_estimators import available, register
from flowlik_estimators.base import Estimate, Estimator
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
    from flowlik import runner

    runs = []
    real = runner.run_cell
    monkeypatch.setattr(runner, "run_cell", lambda cell: runs.append(cell) or real(cell))
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


@pytest.mark.parametrize("name", sorted(available()))
def test_every_estimator_keeps_the_contract(name: str) -> None:
    broken = [verdict.line() for verdict in contract_verdicts((name,)) if not verdict.passed]
    assert not broken


def test_the_contract_catches_a_careless_plugin() -> None:
    @register("careless")
    @dataclass(frozen=True, kw_only=True)
    class Careless(Estimator):
        """Answers in float32 without asking the model."""

        family = "plugin"

        def _log_prob(self, model: Any, x: Any, run: Any) -> Estimate:
            return Estimate(log_prob=x.sum(1).float() * 0 + len(x))

    try:
        failed = {verdict.rule for verdict in contract_verdicts(("careless",)) if not verdict.passed}
    finally:
        _REGISTRY.pop("careless")
    assert {"cost is counted", "batching changes nothing"} <= failed
