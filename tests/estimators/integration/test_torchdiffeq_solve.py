"""The table of solvers, against the names that options may take and against what a solve is billed."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS as TORCHDIFFEQ
from toy_flows import Field, points

from flowlik_estimators import get
from flowlik_estimators.integration.torchdiffeq_solve import (
    ALIASES,
    ONE_STEP,
    SOLVERS,
    Adaptive,
    OneStep,
    Solve,
    Solver,
    torchdiffeq_name,
)


def test_every_name_that_the_option_takes_is_in_the_table() -> None:
    assert get_args(Solver) == tuple(SOLVERS)
    assert get_args(Adaptive) == tuple(name for name, method in SOLVERS.items() if method.adaptive)
    assert get_args(OneStep) == tuple(ONE_STEP)
    assert set(ALIASES.values()) <= set(SOLVERS)


def test_torchdiffeq_knows_every_solver_but_our_own() -> None:
    assert {torchdiffeq_name(name) for name in SOLVERS} - set(TORCHDIFFEQ) == {"adams_pec"}


@pytest.mark.parametrize("solver", [name for name, method in SOLVERS.items() if method.evaluations])
def test_a_step_takes_the_evaluations_of_the_table(solver: str) -> None:
    out = get("ode", solver=solver, steps=6).sample(Field(lambda x, t: x), 3, log_prob=False)
    per_step = SOLVERS[solver].evaluations
    assert per_step is not None
    assert out.cost.forwards == 6 * per_step + (solver == "adams_pec")


def test_only_an_adaptive_solve_is_loosened() -> None:
    adaptive = Solve(solver="dopri5", rtol=1e-6, atol=1e-2, max_nfe=9)
    assert adaptive.loosened(1e-3) == Solve(solver="dopri5", rtol=1e-3, atol=1e-2, max_nfe=9)
    fixed = Solve(solver="rk4", steps=4, grid="uniform")
    assert fixed.loosened(1e-3) == fixed


def test_a_condition_and_a_pilot_exclude_each_other_before_anything_is_evaluated() -> None:
    field = Field(lambda x, t, cond: cond[:, None] * x)
    estimator = get("ode", trace="hutchinson", divergence="quadrature")
    with pytest.raises(ValueError, match="ode: the pilot draws from the model, which here needs cond"):
        estimator.log_prob(field, points(3, 2), cond=torch.ones(3, dtype=torch.float64))
    assert not field.seen
