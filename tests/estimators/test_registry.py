"""Names, options, spellings and plugins."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_flows import Linear, points, stable_matrix

import flowlik_estimators
from flowlik_estimators import Estimate, Estimator, available, get, parse_spec, register, registry
from flowlik_models import plugins


def test_the_first_estimators_are_there() -> None:
    assert {"ode", "meanflow", "f2d2"} <= set(available())
    assert {get(name).family for name in ("ode", "meanflow", "f2d2")} == {
        "ode",
        "flow-map",
        "joint-flow-map",
    }


@pytest.mark.parametrize(
    ("name", "params", "words"),
    [
        ("f2d3", {}, ["unknown estimator 'f2d3'", "meanflow", "did you mean 'f2d2'"]),
        ("ode", {"sovler": "euler"}, ["unknown parameter 'sovler'", "rtol", "did you mean 'solver'"]),
        ("ode", {"solver": "dopri6"}, ["unknown solver 'dopri6'", "bosh3", "did you mean 'dopri"]),
        ("ode", {"trace": "exactly"}, ["unknown trace", "hutchinson", "did you mean 'exact'"]),
        ("meanflow", {"trace": "closed"}, ["unknown trace", "exact, hutchinson"]),
        ("f2d2", {"grid": "log-snr"}, ["unknown grid", "uniform", "did you mean 'logsnr'"]),
        ("f2d2", {"steps": 0}, ["steps must be at least 1"]),
        ("f2d2", {"steps": 2.5}, ["steps must be a whole number, got 2.5"]),
        ("f2d2", {"steps": True}, ["steps must be a whole number"]),
        ("ode", {"rtol": "small"}, ["rtol must be a number or none, got 'small'"]),
        ("ode", {"rtol": float("nan")}, ["rtol must be a number"]),
        ("ode", {"rtol": -1e-5}, ["rtol must be positive"]),
        ("ode", {"max_nfe": 0}, ["max_nfe must be at least 1"]),
        ("ode", {"eps": 1.0}, ["eps must be in [0, 1)"]),
        ("ode", {"solver": "euler"}, ["euler needs steps"]),
    ],
)
def test_misspelling_is_one_line_that_lists_what_is_valid(
    name: str, params: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        get(name, **params)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("ode", {"steps": 4}),
        ("ode", {"grid": "cosine"}),
        ("ode", {"solver": "euler", "steps": 4, "rtol": 1e-5}),
        ("ode", {"solver": "euler", "steps": 4, "atol": 1e-5}),
        ("ode", {"solver": "euler", "steps": 4, "max_nfe": 100}),
        ("ode", {"probes": 2}),
        ("ode", {"noise": "gaussian", "trace": "closed"}),
        ("meanflow", {"probes": 2}),
    ],
)
def test_an_option_without_effect_is_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="has no effect"):
        get(name, **params)


def test_multistep_solver_refuses_uneven_steps() -> None:
    with pytest.raises(ValueError, match="needs grid=uniform"):
        get("ode", solver="explicit_adams", steps=8, grid="logsnr")


def test_spec_crosses_its_alternatives() -> None:
    labels = [e.label for e in parse_spec(" f2d2[ steps = 1|2|4 , grid=uniform| cosine ] ")]
    assert labels == [
        "f2d2[steps=1]",
        "f2d2[steps=1,grid=cosine]",
        "f2d2[steps=2]",
        "f2d2[steps=2,grid=cosine]",
        "f2d2[steps=4]",
        "f2d2[steps=4,grid=cosine]",
    ]
    assert [e.label for e in parse_spec("ode")] == ["ode"]
    assert [e.label for e in parse_spec("ode[]")] == ["ode"]


@pytest.mark.parametrize(
    "spec", ["", "f2d2[", "f2d2]", "f2d2[steps]", "f2d2[steps=]", "f2d2[steps=1,,]", "f2d2[steps=1,steps=2]"]
)
def test_unreadable_spec_is_one_line(spec: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_spec(spec)
    assert "\n" not in str(error.value)


def test_defaults_spelled_out_are_the_same_estimator() -> None:
    spelled = get("ode", solver="dopri5", rtol=1e-5, atol=1e-5, trace="exact", max_nfe=10_000)
    assert spelled == get("ode")
    assert spelled.label == "ode"
    assert get("ode").params()["rtol"] == 1e-5
    assert get("ode", solver="heun2", steps=4) == get("ode", solver="heun", steps=4)
    assert get("ode", rtol=1) == get("ode", rtol=1.0)


adaptive = st.fixed_dictionaries(
    {"solver": st.sampled_from(["dopri5", "dopri8", "bosh3"])},
    optional={"rtol": st.floats(1e-12, 1.0), "atol": st.floats(1e-12, 1.0), "max_nfe": st.integers(1, 10**6)},
)
fixed = st.fixed_dictionaries(
    {"solver": st.sampled_from(["euler", "midpoint", "heun", "rk4"]), "steps": st.integers(1, 999)},
    optional={"grid": st.sampled_from(["uniform", "cosine", "logsnr", "ramped"])},
)
traced = st.one_of(
    st.fixed_dictionaries({}, optional={"trace": st.sampled_from(["exact", "closed"])}),
    st.fixed_dictionaries(
        {"trace": st.just("hutchinson")},
        optional={"probes": st.integers(1, 99), "noise": st.sampled_from(["rademacher", "gaussian"])},
    ),
)


@settings(deadline=None)
@given(solve=st.one_of(adaptive, fixed), trace=traced, eps=st.one_of(st.none(), st.floats(0.0, 0.5)))
def test_label_reads_back_to_the_same_estimator(
    solve: dict[str, Any], trace: dict[str, Any], eps: float | None
) -> None:
    estimator = get("ode", **solve, **trace, eps=eps)
    assert parse_spec(estimator.label) == [estimator]


@pytest.fixture
def fresh_registry(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_LOADED", set())
    return monkeypatch


@dataclass(frozen=True, kw_only=True)
class Nothing(Estimator):
    """A third party's estimator that says zero everywhere."""

    family = "nothing"
    level: float = 0.0

    def _log_prob(self, model: Any, x: torch.Tensor, run: Any) -> Estimate:
        model.velocity(x, run.at(0.5))
        return Estimate(log_prob=run.zeros() + self.level)


class Naught(Nothing):
    """Another, which only an entry point names."""


def test_another_package_adds_an_estimator(fresh_registry: pytest.MonkeyPatch) -> None:
    register("nothing")(Nothing)
    out = get("nothing", level=2.0).log_prob(Linear(stable_matrix(2)), points(3, 2))
    assert out.log_prob.tolist() == [2.0, 2.0, 2.0]
    assert out.valid.all()
    assert out.cost.forwards == 1


def test_a_name_is_taken_once(fresh_registry: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="already registered"):
        register("ode")(Nothing)


def test_entry_points_are_loaded_when_first_looked_up(fresh_registry: pytest.MonkeyPatch) -> None:
    points_ = [
        EntryPoint(name="nothing", value=f"{__name__}:Nothing", group="flowlik.estimators"),
        EntryPoint(name="broken", value="no_such_module:Thing", group="flowlik.estimators"),
    ]
    fresh_registry.setattr(plugins, "entry_points", lambda group: points_)
    with pytest.warns(UserWarning, match="'broken'.*is left out"):
        assert "nothing" in available()
    assert isinstance(get("nothing"), Nothing)


def test_a_class_of_an_entry_point_takes_its_name_into_another_process(
    fresh_registry: pytest.MonkeyPatch,
) -> None:
    point = EntryPoint(name="naught", value=f"{__name__}:Naught", group="flowlik.estimators")
    fresh_registry.setattr(plugins, "entry_points", lambda group: [point])
    parcel = pickle.dumps(get("naught", level=2.0))
    fresh_registry.setattr(Naught, "name", "")  # as a process has it that has read no entry point
    back = pickle.loads(parcel)
    assert (back.name, back.label, back.level) == ("naught", "naught[level=2.0]", 2.0)


def test_a_registered_class_goes_by_one_name(fresh_registry: pytest.MonkeyPatch) -> None:
    register("nothing")(Nothing)
    point = EntryPoint(name="other", value=f"{__name__}:Nothing", group="flowlik.estimators")
    fresh_registry.setattr(plugins, "entry_points", lambda group: [point])
    with pytest.warns(UserWarning, match="'other'.*is left out.*registered as 'nothing'"):
        assert "other" not in available()


def test_an_entry_point_cannot_take_the_name_of_a_family(fresh_registry: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="ode", value=f"{__name__}:Nothing", group="flowlik.estimators")
    fresh_registry.setattr(plugins, "entry_points", lambda group: [point])
    for _ in range(2):
        with pytest.raises(ValueError, match="'ode' belongs to flowlik itself"):
            available()


def test_everything_public_exists() -> None:
    for name in flowlik_estimators.__all__:
        assert hasattr(flowlik_estimators, name)


CONSTANT = '''
"""An estimator of this package that says zero everywhere."""

from dataclasses import dataclass

from flowlik_estimators.base import Estimator
from flowlik_estimators.call import Estimate
from flowlik_estimators.registry import register


@register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Estimator):
    """Zero everywhere."""

    family = "constant"
    level: float = 0.0

    def _log_prob(self, model, x, run):
        model.velocity(x, run.at(0.5))
        return Estimate(log_prob=run.zeros() + self.level)
'''


def test_a_module_of_the_package_is_an_estimator_without_another_edit(tmp_path: Path) -> None:
    package = Path(flowlik_estimators.__file__).parent
    shutil.copytree(package, tmp_path / package.name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / package.name / "constant.py").write_text(CONSTANT)
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    listed = subprocess.run(
        [sys.executable, "-m", "flowlik", "list", "estimators", "--json"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    described = json.loads(listed.stdout)
    assert described["constant"] == "Zero everywhere. Parameters: eps, level=0.0"
    assert {"ode", "f2d2", "peer-zuko"} <= set(described)
