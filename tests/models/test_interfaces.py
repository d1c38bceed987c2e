"""What a model can do, and what is said where it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from flowlik_models import interfaces
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.interfaces import CAPABILITIES, Ability, can, lacks, trial_call, velocity_and_divergence


def test_every_ability_is_in_the_table() -> None:
    assert set(get_args(Ability)) == set(CAPABILITIES)


def test_methods_of_the_table_are_those_of_the_protocols() -> None:
    protocols = {
        "velocity": interfaces.VelocityField,
        "flow map": interfaces.FlowMap,
        "joint flow map": interfaces.JointFlowMap,
        "policy flow": interfaces.PolicyFlow,
        "generator": interfaces.Generator,
        "log-density": interfaces.HasLogProb,
    }
    for ability, protocol in protocols.items():
        (name,) = CAPABILITIES[ability].attributes  # type: ignore[index]
        assert callable(getattr(protocol, name))
    assert callable(getattr(interfaces.HasDivergence, CAPABILITIES["divergence"].attributes[1]))


def test_an_attribute_of_an_attribute_counts_only_where_both_are_there() -> None:
    velocity: Any = SimpleNamespace(velocity=None)
    assert can(SimpleNamespace(fake=velocity), "fake flow")
    assert not can(SimpleNamespace(fake=None), "fake flow")
    assert not can(SimpleNamespace(), "fake flow")


def test_what_is_missing_is_one_line() -> None:
    assert lacks(SimpleNamespace(joint=None), "joint flow map") is None
    assert lacks(SimpleNamespace(), "joint flow map") == "needs a joint flow map (a `joint` method)"


@pytest.mark.parametrize("ability", ["velocity", "divergence", "flow map", "joint flow map", "policy flow"])
def test_a_trial_call_is_one_evaluation(ability: Ability) -> None:
    model = Gaussian(torch.zeros(2), torch.eye(2))
    assert can(model, ability)
    assert trial_call(model, torch.zeros(3, 2), ability)() is not None


def test_one_evaluation_gives_both_where_the_field_offers_it() -> None:
    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return x, t

    apart: Any = SimpleNamespace(velocity=lambda x, t: x, divergence=lambda x, t: t)
    x, t = torch.ones(2, 1), torch.zeros(2)
    for field in (apart, SimpleNamespace(velocity_and_divergence=both)):
        v, div = velocity_and_divergence(field, x, t)
        assert v is x
        assert div is t
