"""diffrax on closed forms: the fields and the reading of a solve without the library, its answers with it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
from toy_flows import Linear, points, spd, stable_matrix

from flowlik_estimators import get, parse_spec
from flowlik_estimators.call import Estimate
from flowlik_estimators.peers import Diffrax, peer_diffrax
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.numerics.standard_normal import standard_normal_log_prob

CLOSED_FORMS = ("gmm-2d", "gaussian-16d")


def needs_diffrax() -> None:
    pytest.importorskip("diffrax", reason="diffrax is not installed")


def drawn(model: Any, n: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return model.sample(n, generator=torch.Generator().manual_seed(0), dtype=dtype)


# --- without the library ------------------------------------------------------------------------------------


def test_missing_library_is_a_refusal_that_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [loaded for loaded in sys.modules if loaded.split(".")[0] == "diffrax"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "diffrax", None)  # its import then raises ImportError
    out = get("peer-diffrax").log_prob(closed_form("gmm-2d"), points(3, 2))
    assert out.status == "refused"
    assert out.reason is not None
    assert out.reason.startswith("needs diffrax: pip install 'flowlik[jax]'")


def test_a_model_whose_field_is_not_written_in_jax_is_refused() -> None:
    class Shifted(Gaussian):
        """Another field under a known name."""

    shifted = Shifted(points(2), spd(2))
    for model in (Linear(stable_matrix(2)), closed_form("checkerboard-2d"), shifted):
        out = get("peer-diffrax").log_prob(model, points(3, 2))
        assert (out.status, out.reason) == (
            "refused",
            "needs a closed form whose field is written in JAX (Gaussian or GaussianMixture)",
        )


@pytest.mark.parametrize("name", [*CLOSED_FORMS, "gmm-64d"])
def test_a_field_is_that_of_the_model(name: str) -> None:
    """numpy stands in for jax.numpy: the fields ask both for the same functions."""
    model = closed_form(name)
    field, names = peer_diffrax.FIELDS[type(model)]
    parameters = {key: getattr(model, key).numpy() for key in names}
    for t in (0.0, 0.3, 0.9, 1.0):
        x = model.sample(20, generator=torch.Generator().manual_seed(0), t=t, dtype=torch.float64)
        theirs = np.stack([field(np, parameters, row, t) for row in x.numpy()])
        ours = model.velocity(x, torch.full((20,), t, dtype=torch.float64))
        np.testing.assert_allclose(theirs, ours.numpy(), rtol=0, atol=1e-9)


def with_a_solve(monkeypatch: pytest.MonkeyPatch, **answer: Any) -> list[tuple[Any, ...]]:
    """A made-up library that moves no point, and what it was given."""
    given: list[tuple[Any, ...]] = []
    known = {"steps": 7, "accepted": 5, "done": True} | answer

    def compiled(*asked: Any) -> Any:
        def solve(x: Any, *rest: Any) -> Any:
            given.append((*asked, x, *rest))
            return x, np.full(len(x), -0.5, x.dtype), known["steps"], known["accepted"], known["done"]

        return solve

    monkeypatch.setattr(peer_diffrax, "_compiled", compiled)
    monkeypatch.setattr(Diffrax, "unavailable", lambda self: None)
    return given


@pytest.mark.parametrize(
    ("options", "forwards", "products"),
    [("", 43, 86), ("trace=hutchinson", 43, 43), ("solver=tsit5", 43, 86), ("solver=heun", 14, 28)],
)
def test_cost_follows_from_the_steps_of_the_solve(
    options: str, forwards: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_a_solve(monkeypatch)
    (estimator,) = parse_spec(f"peer-diffrax[{options}]")
    out = estimator.log_prob(closed_form("gmm-2d"), points(4, 2))
    assert (out.cost.forwards, out.cost.vjps) == (forwards, products)
    assert (out.cost.accepted_steps, out.cost.rejected_steps) == (5, 2)


def test_answer_is_the_source_where_the_solve_ends_and_the_log_determinant(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = with_a_solve(monkeypatch)
    x = points(4, 2, dtype=torch.float32)
    out = get("peer-diffrax", eps=0.25, rtol=1e-3, trace="hutchinson").log_prob(closed_form("gmm-2d"), x)
    torch.testing.assert_close(out.log_prob, standard_normal_log_prob(x).double() - 0.5)
    (_, solver, _, rows, parameters, probe, ends, tolerances) = given[0]
    assert (solver, ends, tolerances) == ("dopri5", (0.75, 0.0), (1e-3, 1e-5))
    assert {rows.dtype, probe.dtype, *(part.dtype for part in parameters.values())} == {np.dtype("float32")}
    assert set(np.unique(probe)) == {-1.0, 1.0}


def test_a_solve_that_ends_early_is_a_status_with_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    given = with_a_solve(monkeypatch, steps=1, accepted=1, done=False)
    out = get("peer-diffrax", max_nfe=9).log_prob(closed_form("gmm-2d"), points(1, 2))
    assert given[0][2] == 1  # a second step would pass nine evaluations
    assert out.status == "diverged"
    assert out.reason is not None
    assert "max_nfe = 9" in out.reason
    assert out.cost.forwards == 7


# --- with it ------------------------------------------------------------------------------------------------


def estimate(model: Any, x: torch.Tensor, **options: Any) -> Estimate:
    needs_diffrax()
    return get("peer-diffrax", **options).log_prob(model, x, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-5)])
def test_exact_trace_reaches_the_density_of_each_point(name: str, dtype: torch.dtype, atol: float) -> None:
    model = closed_form(name)
    x = drawn(model, 20, dtype)
    out = estimate(model, x, rtol=1e-7, atol=1e-7)
    assert (out.status, out.log_prob.dtype) == ("ok", torch.float64)
    torch.testing.assert_close(out.log_prob, model.log_prob(x.double()), rtol=0, atol=atol)


def test_a_smaller_tolerance_is_a_smaller_error() -> None:
    model = closed_form("gmm-2d")
    x = drawn(model, 50)
    errors = [
        float((estimate(model, x, rtol=tol, atol=tol).log_prob - model.log_prob(x)).abs().mean())
        for tol in (1e-3, 1e-5, 1e-7)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-6 < errors[0]


@pytest.mark.parametrize("solver", ["dopri5", "tsit5", "heun"])
def test_evaluations_are_those_that_jax_makes(solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted by a call from the compiled field to Python."""
    needs_diffrax()
    import jax

    times: list[float] = []

    def telling(np_: Any, parameters: Any, x: Any, t: Any) -> Any:
        jax.debug.callback(lambda t: times.append(float(t)), t)
        return peer_diffrax.mixture(np_, parameters, x, t)

    monkeypatch.setitem(
        peer_diffrax.FIELDS, GaussianMixture, (telling, peer_diffrax.FIELDS[GaussianMixture][1])
    )
    model = closed_form("gmm-2d")
    out = estimate(model, drawn(model, 64), solver=solver, rtol=1e-5, atol=1e-5)
    jax.effects_barrier()
    assert out.cost.rejected_steps > 0
    assert len(times) == out.cost.forwards


def test_hutchinson_is_exact_where_every_probe_gives_the_trace() -> None:
    model = Gaussian(points(3), 4.0 * torch.eye(3, dtype=torch.float64))
    x = drawn(model, 5)
    out = estimate(model, x, trace="hutchinson", rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(out.log_prob, model.log_prob(x), rtol=0, atol=1e-5)
    assert out.cost.vjps == out.cost.forwards


def test_end_time_before_the_data_gives_the_density_there() -> None:
    model = closed_form("gmm-2d")
    x = model.sample(5, generator=torch.Generator().manual_seed(0), t=0.75, dtype=torch.float64)
    out = estimate(model, x, eps=0.25, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(out.log_prob, model.log_prob(x, 0.75), rtol=0, atol=1e-5)


def test_max_nfe_ends_a_solve() -> None:
    out = estimate(closed_form("gmm-2d"), points(4, 2), max_nfe=9)
    assert out.status == "diverged"
    assert "max_nfe = 9" in str(out.reason)
