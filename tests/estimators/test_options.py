"""No option is without effect: where one is given, the answer, its cost or the samples change, or it is refused."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from test_whitened import mixture
from torch import Tensor

from flowlik_estimators import available, get
from flowlik_estimators.base import Estimator

ALTERNATIVES: dict[str, tuple[Any, ...]] = {
    "eps": (0.1,),
    "solver": ("dopri8", "tsit5", "rk4", "heun"),
    "rtol": (0.3,),
    "atol": (0.3,),
    "steps": (3,),
    "grid": ("cosine",),
    "richardson": (True,),
    "trace": ("exact", "hutchinson", "closed"),
    "probes": (3,),
    "noise": ("rademacher", "gaussian", "orthogonal"),
    "basis": ("pixel", "dct", "pca", "auto"),
    "control": ("none", "gaussian", "auto"),
    "redraw": (True,),
    "divergence": ("augmented", "quadrature"),
    "nodes": (5, 9),
    "tol": (1e-4,),
    "allocation": ("uniform", "neyman"),
    "max_nfe": (5,),
    "guidance": (0.5,),
    "clock": ("time", "stretched"),
    "floor": (0.5,),
    "corrections": (2,),
    "replicates": (3, 8),
    "field": ("teacher",),
    "route": ("invert", "own-samples", "fake-flow", "head"),
    "starts": (3,),
    "segments": (2,),
    "substeps": (8,),
    "jacobian": ("frozen", "full"),
    "updates": (3,),
    "step_size": (0.2,),
    "draws": (32,),
    "levels": ("uniform",),
    "antithetic": (False,),
    "lowest": (0.1,),
    "direction": ("likelihood", "prior", "random"),
}
"""Values of every option; of one that a base has already, the others are tried."""

OWN_AXES = ("pca", "auto")
"""Bases in which the Gaussian control is diagonal: there its quadratic form of signs is a constant, which is known. The
value is allowed, since a sweep over bases shows just that; as is a grid of a single step."""

PROBES = {"trace": "hutchinson", "probes": 2}
QUADRATURE = {"divergence": "quadrature"}
FIXED = {"solver": "euler", "steps": 4}
SOLVES: tuple[dict[str, Any], ...] = (
    {},
    FIXED,
    {**FIXED, "richardson": True},
    {"trace": "closed"},
    PROBES,
    {**PROBES, "control": "gaussian"},
    {**PROBES, **FIXED, "basis": "pca"},
    {**PROBES, **FIXED, "redraw": True},
    {**PROBES, "noise": "orthogonal", "basis": "dct"},
    {**PROBES, "noise": "gaussian"},
    {**PROBES, **FIXED, "basis": "auto", "control": "auto"},
    QUADRATURE,
    {**QUADRATURE, **FIXED, "nodes": 5},
    {**QUADRATURE, **PROBES},
    {**QUADRATURE, **PROBES, "nodes": 9, "control": "gaussian"},
    {**QUADRATURE, **PROBES, **FIXED, "nodes": 9, "allocation": "uniform"},
    {**QUADRATURE, **PROBES, "nodes": 9, "allocation": "uniform", "noise": "gaussian"},
)
BASES: dict[str, tuple[dict[str, Any], ...]] = {
    "ode": SOLVES,
    "whitened-ode": (
        FIXED,
        PROBES,
        {**PROBES, **FIXED},
        {**PROBES, "control": "none"},
        QUADRATURE,
        {**QUADRATURE, **PROBES, "nodes": 9},
    ),
    "meanflow": ({}, PROBES),
    "flow-map-exact": ({},),
    "f2d2": ({},),
    "self-guidance": ({"steps": 4},),
    "f2d2-corrected": ({}, {"trace": "exact"}),
    "elbo": ({}, {"antithetic": False}),
    "energy": ({},),
    "exact-flow": ({},),
    "pi-flow": ({"substeps": 6}, {"substeps": 6, "jacobian": "full"}),
    "generator": ({}, {"route": "own-samples"}, {"route": "fake-flow"}, {"route": "head"}),
    "peer-flow-matching": ({}, FIXED, {"trace": "hutchinson"}),
    "peer-zuko": ({}, {"trace": "hutchinson"}),
    "peer-torchode": ({}, {"trace": "hutchinson"}),
    "peer-diffrax": ({}, {"trace": "hutchinson"}),
}

LOOSE = {"rtol": 0.03, "atol": 0.03, "tol": 10.0}
"""Tolerances that take few steps: whether an option changes an answer does not hang on how exact it is."""


def coarse(name: str, options: dict[str, Any], tolerances: dict[str, float] = LOOSE) -> dict[str, Any]:
    """The options at tolerances that take few steps, where an adaptive solver takes any."""
    params = get(name, **options).params()
    loose = {option: value for option, value in tolerances.items() if params.get(option) is not None}
    return {**loose, **options}


class Policy:
    """The field of a mixture and a drift that is fixed where the policy was asked for."""

    def __init__(self, model: Everything, drift: Tensor) -> None:
        self.model, self.drift = model, drift

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.velocity(x, t) + self.drift

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        return self.model.divergence(x, t)


class Scaled:
    """The field of a model times a number."""

    def __init__(self, model: Everything, scale: float) -> None:
        self.event_shape, self.model, self.scale = model.event_shape, model, scale

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.scale * self.model.velocity(x, t)


class Everything:
    """A mixture on images of 2 x 2 that has whatever an estimator asks for; none of its maps is exact."""

    event_shape = (1, 2, 2)

    def __init__(self) -> None:
        from test_whitened import with_moments

        self.inner = with_moments(mixture())
        self.moments = self.inner.moments
        self.fake, self.teacher = Scaled(self, 0.9), Scaled(self, 1.1)

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        v: Tensor = self.inner.velocity(x.flatten(1), t)
        return v.view_as(x)

    def divergence(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        div: Tensor = self.inner.divergence(x.flatten(1), t)
        return div

    def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return self.velocity(x, (t + s) / 2)

    def joint(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.average_velocity(x, t, s), self.divergence(x, (t + s) / 2)

    def policy(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Tensor | None = None) -> Policy:
        return Policy(self, 0.1 * x.sin())

    def log_density(self, x: Tensor, *, cond: Tensor | None = None) -> Tensor:
        log_prob: Tensor = self.inner.log_prob(x.flatten(1))
        return log_prob

    def inverse(self, x: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return 2 * x, x.new_full((len(x),), 4 * math.log(2))

    def from_noise(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return z / 2

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return z + 0.3 * z.sin()


@cache
def model() -> Everything:
    return Everything()


@cache
def estimated(estimator: Estimator) -> dict[str, Any]:
    """What comes of an estimator at four points."""
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    out = estimator.log_prob(model(), x)
    extra = {f"extra {name}": value for name, value in out.extra.items()}
    return {"status": out.status, "log_prob": out.log_prob, "stderr": out.stderr, **extra, **costs(out.cost)}


@cache
def sampled(estimator: Estimator) -> dict[str, Any]:
    """What it samples; without a density where it has none of samples but one of points."""
    drawn = estimator.sample(model(), 4, dtype=torch.float64)
    if drawn.status == "refused" != estimated(estimator)["status"]:
        drawn = estimator.sample(model(), 4, dtype=torch.float64, log_prob=False)
    return {"status": drawn.status, "x": drawn.x, "log_prob": drawn.log_prob, **costs(drawn.cost)}


def costs(cost: Any) -> dict[str, Any]:
    """Evaluations of each kind."""
    return {name: getattr(cost, name) for name in ("forwards", "vjps", "jvps", "policy_calls")}


def alike(one: Estimator, other: Estimator) -> bool:
    """Whether estimates and samples are the same in every part; samples are drawn only where estimates are."""
    for look in (estimated, sampled):
        before, after = look(one), look(other)
        if before.keys() != after.keys() or not all(same(before[part], after[part]) for part in before):
            return False
    return True


def same(a: Any, b: Any) -> bool:
    """Equal, or up to what rounding makes of two orders of the same arithmetic."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        close = a.shape == b.shape and torch.allclose(
            a.double(), b.double(), rtol=1e-9, atol=1e-9, equal_nan=True
        )
        return bool(close)
    return type(a) is type(b) and bool(a == b)


def flips(name: str, base: dict[str, Any]) -> dict[tuple[str, Any], Estimator | None]:
    """The base with one option changed, for every value; None where that is refused."""
    found: dict[tuple[str, Any], Estimator | None] = {}
    for option in get(name, **base).params():
        for value in ALTERNATIVES[option]:
            try:
                found[option, value] = get(name, **coarse(name, {**base, option: value}))
            except ValueError:
                found[option, value] = None
    return found


CASES = [
    pytest.param(name, base, id=f"{name}-{','.join(map(str, base.values()))}")
    for name, bases in BASES.items()
    for base in bases
]


@pytest.mark.parametrize(("name", "base"), CASES)
def test_an_option_changes_something_or_is_refused(name: str, base: dict[str, Any]) -> None:
    plain = get(name, **coarse(name, base))
    if (why := plain.supports(Everything())) is not None:
        pytest.skip(why)
    without = []
    for (option, value), other in flips(name, base).items():
        if other is None or other == plain or (option == "control" and base.get("basis") in OWN_AXES):
            continue
        if alike(plain, other):
            without.append(f"{option}={value}")
    assert not without


OWN = sorted(name for name, kind in available().items() if kind.__module__.startswith("flowlik_estimators."))


@pytest.mark.parametrize("name", OWN)
def test_every_option_of_every_estimator_is_tried(name: str) -> None:
    bases = BASES[name]
    options = get(name, **bases[0]).params()
    tried = {
        option
        for base in bases
        for (option, _), other in flips(name, base).items()
        if other is not None and other != get(name, **coarse(name, base))
    }
    assert tried == set(options)


@pytest.mark.parametrize("route", ["invert", "own-samples"])
def test_a_determinant_of_the_generator_is_of_no_other_time(route: str) -> None:
    with pytest.raises(ValueError, match="eps has no effect"):
        get("generator", route=route, eps=0.1)
