"""The examples in docstrings are so, module by module, and what users call has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import flowlik
import flowlik_estimators
from flowlik import tasks
from flowlik.measures import accuracy, energy_distance, frechet, precision_recall
from flowlik_estimators import registry
from flowlik_models import gaussian, mixture, moments, synthetic

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("benchmarks", "estimators", "models")


def with_examples() -> list[str]:
    """The modules of all three packages whose docstrings hold examples."""
    return sorted(
        ".".join(file.relative_to(ROOT / folder).with_suffix("").parts).removesuffix(".__init__")
        for folder in SOURCES
        for file in (ROOT / folder).rglob("*.py")
        if ">>> " in file.read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("name", with_examples())
def test_examples_give_what_they_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module(name)
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))  # one of them registers an estimator
    failed, tried = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert tried
    assert not failed, "the differences are printed above"


PUBLIC = {
    flowlik_estimators: ("Cost", "available", "counted", "get", "parse_spec", "register", "time_grid"),
    synthetic: ("closed_form", "constants_hash"),
    gaussian: ("Gaussian", "gaussian_map_coefficients", "log1p_ratio"),
    mixture: ("GaussianMixture",),
    moments: ("attach", "estimate", "from_covariance"),
    accuracy: ("bits_per_dim", "coverage95", "mass", "spearman", "summarise"),
    energy_distance: ("energy_distance",),
    frechet: ("frechet_distance", "normal_of"),
    precision_recall: ("kernel_distance", "precision_recall"),
    tasks: ("digest", "get_task", "square_grid"),
    flowlik: ("classify", "distill", "examine", "load_student", "read_records", "wrap"),
}


@pytest.mark.parametrize("module", PUBLIC, ids=lambda module: module.__name__)
def test_what_users_call_has_an_example(module: object) -> None:
    without = [name for name in PUBLIC[module] if ">>> " not in (inspect.getdoc(getattr(module, name)) or "")]
    assert without == []
