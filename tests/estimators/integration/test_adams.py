"""Adams' predictor and corrector with one evaluation a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from toy_flows import points, spd

from flowlik_estimators import get
from flowlik_estimators.grids import time_grid
from flowlik_estimators.integration.adams import adams_pec, weights
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian


def gaussian() -> Gaussian:
    return Gaussian(points(3, seed=3), spd(3))


def data(model: Any, n: int = 40) -> Tensor:
    x: Tensor = model.sample(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x


def test_weights_of_equal_steps_are_the_textbooks() -> None:
    """Hairer, Norsett and Wanner, III.1, tables 1.1 and 1.2."""
    assert weights([0.0], 0.0, 1.0) == pytest.approx([1.0])
    assert weights([-2.0, -1.0, 0.0], 0.0, 1.0) == pytest.approx([5 / 12, -16 / 12, 23 / 12])
    assert weights([-2.0, -1.0, 0.0, 1.0], 0.0, 1.0) == pytest.approx([1 / 24, -5 / 24, 19 / 24, 9 / 24])


@settings(deadline=None)
@given(
    lengths=st.lists(st.floats(0.05, 1.0), min_size=1, max_size=3),
    step=st.floats(0.05, 1.0),
    sign=st.sampled_from([1.0, -1.0]),
    coefficients=st.lists(st.floats(-2.0, 2.0), min_size=1, max_size=4),
)
def test_weights_integrate_polynomials_through_any_nodes(
    lengths: list[float], step: float, sign: float, coefficients: list[float]
) -> None:
    nodes = [sign * t for t in torch.tensor([0.0, *lengths]).cumsum(0).tolist()]
    start, end = nodes[-1], nodes[-1] + sign * step
    coefficients = coefficients[: len(nodes)]
    found = sum(
        w * sum(c * t**k for k, c in enumerate(coefficients))
        for w, t in zip(weights(nodes, start, end), nodes, strict=True)
    )
    truth = sum(c * (end ** (k + 1) - start ** (k + 1)) / (k + 1) for k, c in enumerate(coefficients))
    assert found == pytest.approx(truth, abs=1e-11)


def test_a_cubic_is_followed_exactly_once_three_values_lie_behind() -> None:
    """dx/dt = 4 t^3 from t = 1 to 0: only the two first steps, of two and three values, can be off."""
    times = torch.linspace(1.0, 0.0, 9, dtype=torch.float64)
    calls = []

    def evaluate(t: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        calls.append(float(t))
        return (4 * t**3 + 0 * state[0],)

    states = [float(state[0]) for state in adams_pec(evaluate, (torch.ones(1, dtype=torch.float64),), times)]
    assert states[0] == 1.0
    assert states[-1] - states[2] == pytest.approx(-(0.75**4), abs=1e-14)
    assert calls == times.tolist()


def test_n_steps_take_n_plus_one_evaluations_and_converge_with_the_third_order_of_their_start() -> None:
    model = gaussian()
    x = data(model)
    errors = []
    for steps in (32, 64, 128):
        out = get("ode", solver="adams_pec", steps=steps, trace="closed").log_prob(model, x)
        assert (out.cost.forwards, out.cost.accepted_steps) == (steps + 1, steps)
        errors.append(float((out.log_prob - model.log_prob(x)).abs().mean()))
    assert errors[0] / errors[1] > 2**3
    assert errors[1] / errors[2] > 2**3
    assert errors[2] < 1e-7


def test_it_beats_the_textbook_rules_at_as_many_evaluations() -> None:
    model = closed_form("gmm-2d")
    x = data(model, 200)

    def error(solver: str, steps: int) -> float:
        out = get("ode", solver=solver, steps=steps, grid="ramped", trace="closed").log_prob(model, x)
        assert out.cost.forwards == 24
        return float((out.log_prob - model.log_prob(x, t=1.0 - model.eps)).abs().mean())

    multistep = error("adams_pec", 23)
    assert multistep < 0.02 * error("euler", 24)
    assert multistep < 0.1 * error("midpoint", 12)


def test_density_found_while_sampling_is_found_again_while_inverting() -> None:
    model = gaussian()
    estimator = get("ode", solver="adams_pec", steps=128, trace="closed")
    drawn = estimator.sample(model, 30, dtype=torch.float64)
    assert drawn.log_prob is not None
    torch.testing.assert_close(drawn.log_prob, model.log_prob(drawn.x), rtol=0, atol=2e-5)
    torch.testing.assert_close(estimator.log_prob(model, drawn.x).log_prob, drawn.log_prob, rtol=0, atol=2e-5)


def test_its_grid_is_ramped_unless_another_is_named() -> None:
    assert get("ode", solver="adams_pec", steps=8) == get("ode", solver="adams_pec", steps=8, grid="ramped")
    assert get("ode", solver="adams_pec", steps=8, grid="logsnr").label.count("grid=logsnr") == 1
    assert float(time_grid("ramped", 8, 1.0, 0.0)[0]) == 1.0
    with pytest.raises(ValueError, match="richardson needs"):
        get("ode", solver="adams_pec", steps=8, richardson=True)
    with pytest.raises(ValueError, match="needs steps"):
        get("ode", solver="adams_pec")


def test_nodes_of_a_quadrature_are_steps_of_it() -> None:
    model = gaussian()
    x = data(model)
    out = get(
        "ode", solver="adams_pec", steps=48, divergence="quadrature", nodes=17, trace="closed"
    ).log_prob(model, x)
    assert float((out.log_prob - model.log_prob(x)).abs().mean()) < 1e-5


def test_a_pilot_follows_its_path_and_is_refused_where_steps_must_be_equal() -> None:
    model = closed_form("gmm-64d")
    x = data(model, 8)
    found = {}
    for solver in ("adams_pec", "rk4"):
        estimator = get("ode", solver=solver, steps=24, trace="hutchinson", probes=2, basis="auto")
        out = estimator.log_prob(model, x)
        assert out.status == "ok"
        found[solver] = out.log_prob
    torch.testing.assert_close(found["adams_pec"], found["rk4"], rtol=0, atol=0.1)
    for auto in ({"basis": "auto"}, {"control": "auto"}):
        with pytest.raises(ValueError, match="needs a named basis and control"):
            get("ode", solver="explicit_adams", steps=24, trace="hutchinson", **auto)
