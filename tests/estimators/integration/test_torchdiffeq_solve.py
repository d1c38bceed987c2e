"""The table of solvers, against the names that options may take and against what a solve is billed."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torchdiffeq._impl.odeint import SOLVERS as TORCHDIFFEQ
from toy_flows import Field, points

from flowlik.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_estimators.integration.torchdiffeq_solve import (
    ALIASES,
    ONE_STEP,
    SOLVERS,
    Adaptive,
    OneStep,
    Solve,
    Solver,
    _norm_of_rows,
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


def test_a_row_is_judged_by_its_numbers_of_which_the_divergence_by_probes_is_one() -> None:
    x, columns, forms = torch.full((2, 2, 4), 3.0), torch.tensor([[0.0, 6.0], [6.0, 0.0]]), torch.ones(2, 3)
    # 8 numbers of 3 and one of root-mean-square 6 / sqrt(2); what is carried along does not count
    expected = ((8 * 9.0 + 18.0) / 9) ** 0.5
    torch.testing.assert_close(_norm_of_rows((x, columns, forms)), torch.tensor(expected))


def test_a_solve_with_probes_takes_fewer_evaluations_and_stays_far_below_their_noise() -> None:
    task = get_task("digits")
    (model, _), x = task.load_model("teacher", "cpu"), whole(task.items("train", 16).x)
    loose = get("ode", trace="hutchinson", rtol=1e-3, atol=1e-3)
    one, fine = (e.log_prob(model, x) for e in (loose, get("ode", trace="hutchinson", rtol=1e-5, atol=1e-5)))
    assert (
        float(torch.as_tensor(one.cost.forwards)) <= 44
    )  # 50, and as many at the error of 38, with x and it apart
    assert (one.log_prob - fine.log_prob).square().mean().sqrt() < 0.3  # the probe's noise is 7 nats


def test_only_where_an_adaptive_solve_carries_probes_the_answers_are_those_of_another_version() -> None:
    assert get("ode", trace="hutchinson").version == 2
    others: tuple[dict[str, Any], ...] = (
        {"trace": "exact"},
        {"trace": "hutchinson", "divergence": "quadrature"},
    )
    fixed: dict[str, Any] = {"trace": "hutchinson", "solver": "rk4", "steps": 4}
    assert [get("ode", **options).version for options in (*others, fixed)] == [1, 1, 1]
