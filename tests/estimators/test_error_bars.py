"""95 % bars of the stochastic estimates cover the closed form 93 to 97 times in a hundred, up to chance."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom, t
from toy_flows import moments_of, with_moments

from flowlik_estimators import parse_spec
from flowlik_models.closed_forms.catalogue import closed_form

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
