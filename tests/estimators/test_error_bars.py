"""95 % bars of the stochastic estimates cover the closed form 93 to 97 times in a hundred, up to chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, t
from toy_flows import moments_of, points, with_moments

from flowlik.tasks import get_task
from flowlik_estimators import parse_spec
from flowlik_estimators.divergence import skewness
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.mixture import GaussianMixture
from flowlik_models.zoo import load_model

POINTS = 400
TAIL = 1e-3
"""Chance that a test fails although the true coverage is at the edge of its range."""

BARS = [
    "trace=hutchinson,probes=8",
    "trace=hutchinson,probes=8,noise=orthogonal",
    "trace=hutchinson,probes=2,divergence=quadrature",
    "trace=hutchinson,probes=4,divergence=quadrature",
    "trace=hutchinson,probes=4,divergence=quadrature,noise=orthogonal",
    "trace=hutchinson,probes=4,divergence=quadrature,basis=auto,control=auto",
]


@pytest.mark.parametrize("options", BARS)
def test_bars_cover_the_closed_form(options: str) -> None:
    model = closed_form("gmm-64d")
    with_moments(model, moments_of(model.mean_and_covariance()[1]))
    x = model.sample(POINTS, generator=torch.Generator().manual_seed(5))
    (estimator,) = parse_spec(f"ode[rtol=1e-4,atol=1e-4,{options}]")
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(7))
    assert out.stderr is not None
    error = (out.log_prob - model.log_prob(x.double())).abs()
    dof = out.extra["dof"]
    assert dof.shape == out.stderr.shape == (POINTS,)
    width = torch.from_numpy(t.ppf(0.975, dof.numpy())) * out.stderr
    covered = int((error <= width).sum())
    assert binom.ppf(TAIL, POINTS, 0.93) <= covered <= binom.ppf(1 - TAIL, POINTS, 0.97)
    # the bars are about the probes and of the right size, not wide in one place and narrow in another
    assert float(error.square().mean().sqrt()) == pytest.approx(
        float(out.stderr.square().mean().sqrt()), rel=0.25
    )


def test_fewer_than_two_probes_a_node_give_no_bar() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(3, generator=torch.Generator().manual_seed(5))
    for options in ("probes=1", "probes=1,divergence=quadrature"):
        (estimator,) = parse_spec(f"ode[rtol=1e-3,atol=1e-3,trace=hutchinson,{options}]")
        assert estimator.log_prob(model, x).stderr is None


def test_degrees_of_freedom_lie_between_a_nodes_and_those_of_all_nodes() -> None:
    model = closed_form("gmm-64d")
    x = model.sample(30, generator=torch.Generator().manual_seed(5))
    spec = (
        "ode[rtol=1e-3,atol=1e-3,trace=hutchinson,divergence=quadrature,nodes=17,probes=3,allocation=uniform]"
    )
    dof = parse_spec(spec)[0].log_prob(model, x).extra["dof"].numpy()
    assert np.all((dof >= 2.0 - 1e-9) & (dof <= 17 * 2 + 1e-9))
    assert math.isclose(float(parse_spec("ode[rtol=1e-3,atol=1e-3,trace=hutchinson,probes=3]")[0]
                              .log_prob(model, x).extra["dof"][0]), 2.0)  # fmt: skip


def separated(spread: float, width: float) -> GaussianMixture:
    """Nine isotropic components in 64 dimensions, far apart: between them the Jacobian is nearly of rank one."""
    means = points(9, 64, seed=0)
    means = spread * means / means.norm(dim=1, keepdim=True)
    weights, stds = torch.full((9,), 1 / 9, dtype=torch.float64), torch.full_like(means, width)
    return GaussianMixture(weights, means, stds, torch.eye(64, dtype=torch.float64).expand(9, 64, 64))


EIGHT = [
    "noise=rademacher",
    "noise=orthogonal",
    "divergence=quadrature",
    "divergence=quadrature,allocation=uniform",
]
FEW = [
    *("probes=2", "probes=3", "probes=4", "probes=2,noise=orthogonal", "probes=4,noise=orthogonal"),
    *("probes=2,divergence=quadrature", "probes=4,divergence=quadrature"),
]


@pytest.mark.parametrize(
    ("spread", "width", "options"),
    [
        *(
            (spread, width, f"probes=8,{more}")
            for spread, width in ((3.0, 0.1), (20.0, 1.0))
            for more in EIGHT
        ),
        *((3.0, 0.1, options) for options in FEW),
    ],
)
def test_bars_cover_where_the_jacobian_is_nearly_of_rank_one(
    spread: float, width: float, options: str
) -> None:
    model = separated(spread, width)
    x = model.sample(POINTS, generator=torch.Generator().manual_seed(5))
    (estimator,) = parse_spec(f"ode[trace=hutchinson,{options}]")
    out = estimator.log_prob(model, x, generator=torch.Generator().manual_seed(7))
    assert out.stderr is not None
    error = (out.log_prob - model.log_prob(x.double())).abs()
    width95 = torch.from_numpy(t.ppf(0.975, out.extra["dof"].numpy())) * out.stderr
    # 400 points: at a true coverage of 0.93 fewer than 355 are covered once in a thousand
    assert int((error <= width95).sum()) >= binom.ppf(TAIL, POINTS, 0.93)
    assert float(out.stderr.mean()) <= 2.0 * float(error.mean())


@pytest.mark.slow
@pytest.mark.parametrize("probes", [2, 4, 8])
def test_bars_cover_on_the_shipped_digits_teacher(probes: int) -> None:
    """Probes alone: the same steps with the exact trace are the truth."""
    model = load_model("digits", "teacher")
    x = get_task("digits").items("test", 250).x[:250].float()
    rule = "solver=midpoint,steps=4,grid=logsnr"
    exact = parse_spec(f"ode[{rule}]")[0].log_prob(model, x)
    out = parse_spec(f"ode[{rule},trace=hutchinson,probes={probes}]")[0].log_prob(model, x)
    assert out.stderr is not None
    covered = int(((out.log_prob - exact.log_prob).abs() <= t.ppf(0.975, probes - 1) * out.stderr).sum())
    assert binom.ppf(TAIL, 250, 0.93) <= covered <= binom.ppf(1 - TAIL, 250, 0.97)


def test_products_tell_rank_one_from_a_symmetric_law_and_leave_out_the_identity() -> None:
    """The law of the ratio at its two ends, by direct calculation, for few probes, one block of them and two."""
    for probes in (2, 3, 4, 8, 12):
        signs = points(500, probes, 64, seed=4).sign()
        overlap = skewness.overlaps(signs, free=False)
        axis = points(500, 64, 1, seed=5)
        thin, full = axis @ axis.transpose(1, 2), points(500, 64, 64, seed=6)
        grown = {}
        for name, matrix in {"thin": thin, "full": full, "shifted": thin + 50.0 * torch.eye(64)}.items():
            products = signs @ matrix
            found = skewness.forms(products, signs, free=False)
            assert found.shape[1] == skewness.form_count(probes)
            cross = skewness.without_identity(found, overlap)
            variance = (products * signs).sum(2).var(1)
            grown[name] = skewness.widening(variance, cross, probes)
        assert float(grown["full"].mean()) < 1.1
        assert float(grown["thin"].mean()) > 1.4
        torch.testing.assert_close(grown["shifted"].mean(), grown["thin"].mean(), rtol=0.05, atol=0)
        assert torch.equal(skewness.widening(torch.zeros(500), cross, probes), torch.ones(500).double())
