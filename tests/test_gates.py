"""The accuracy and NFE gates of results/baselines: what `flowlik check` prints, as tests."""

from __future__ import annotations

import pytest

from flowlik.gates import Gate, load_gates, run_gate


@pytest.mark.parametrize("gate", load_gates(), ids=lambda gate: gate.id)
def test_gate(gate: Gate) -> None:
    verdict = run_gate(gate)
    assert verdict.passed, verdict.line()
