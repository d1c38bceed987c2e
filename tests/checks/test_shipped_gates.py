"""The accuracy and NFE gates of results/baselines: what `flowlik check` prints, as tests."""

from __future__ import annotations

from typing import Any

import pytest

from flowlik.checks.gates import Gate, load_gates, run_gate


def parameters() -> list[Any]:
    """Gates as parameters; those that take long carry the mark `slow`."""
    return [pytest.param(gate, id=gate.id, marks=[pytest.mark.slow] * gate.slow) for gate in load_gates()]


@pytest.mark.parametrize("gate", parameters())
def test_gate(gate: Gate) -> None:
    verdict = run_gate(gate)
    assert verdict.passed, verdict.line()
