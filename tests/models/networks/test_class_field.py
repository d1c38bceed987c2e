"""A field of each class and of all of them together, and the same field guided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from network_checks import moments_of, points, stirred

from flowlik_estimators import get
from flowlik_models.interfaces import can
from flowlik_models.networks.unet import ClassUNet, UNet
from flowlik_models.recipes.table import RECIPES

SHAPE = (1, 8, 8)
TINY: dict[str, Any] = {"widths": (4, 8), "embed": 8, "dropout": 0.0}
X, T, _ = points(SHAPE)


def network() -> Any:
    torch.manual_seed(0)
    return ClassUNet(SHAPE, classes=3, moments=moments_of(SHAPE), **TINY)


FIELD = stirred(network())


def test_classes_begin_alike_and_every_row_follows_its_own_label() -> None:
    untrained = network().eval()
    label = torch.tensor([2, 0, 1])
    assert torch.equal(untrained.velocity(X, T, cond=label), untrained.velocity(X, T))
    together = FIELD.velocity(X, T, cond=label)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(together[one], FIELD.velocity(X[one], T[one], cond=label[one]))
        for other in (None, (label[one] + 1) % 3):
            assert (FIELD.velocity(X[one], T[one], cond=other) - together[one]).abs().max() > 1e-3


def test_without_a_label_it_is_the_last_row_and_training_may_name_it() -> None:
    twin = network()
    twin.load_state_dict(FIELD.state_dict())
    none = torch.full((3,), 3)
    torch.testing.assert_close(twin.train().velocity(X, T, cond=none), FIELD.velocity(X, T))
    with pytest.raises(ValueError, match="label 3 is of no class: expected 0 to 2"):
        FIELD.velocity(X, T, cond=none)


@pytest.mark.parametrize("whole", [torch.int32, torch.uint8])
def test_labels_are_whole_numbers_of_any_type(whole: torch.dtype) -> None:
    label = torch.tensor([2, 0, 1])
    assert torch.equal(FIELD.velocity(X, T, cond=label.to(whole)), FIELD.velocity(X, T, cond=label))


BAD = {
    "floats": (torch.tensor([0.0, 1.0, 2.0]), r"expected int64 \(3,\), got float32 \(3,\)"),
    "truths": (torch.tensor([True, False, True]), "got bool"),
    "a column": (torch.tensor([[0], [1], [2]]), r"got int64 \(3, 1\)"),
    "too few": (torch.tensor([0]), r"got int64 \(1,\)"),
    "above": (torch.tensor([0, 1, 7]), "label 7 is of no class: expected 0 to 2"),
    "below": (torch.tensor([0, -1, 1]), "label -1 is of no class"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_labels_are_one_line(case: str) -> None:
    labels, words = BAD[case]
    with pytest.raises(ValueError, match=words) as caught:
        FIELD.velocity(X, T, cond=labels)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("guidance", [0.0, 0.7, -0.5])
def test_guidance_leads_away_from_the_field_of_all_classes(guidance: float) -> None:
    label = torch.tensor([2, 0, 1])
    own, free = FIELD.velocity(X, T, cond=label), FIELD.velocity(X, T)
    torch.testing.assert_close(
        FIELD.guided(guidance).velocity(X, T, cond=label), own + guidance * (own - free)
    )
    with pytest.raises(ValueError, match="needs cond"):
        FIELD.guided(guidance).velocity(X, T)


@pytest.mark.parametrize(("guidance", "networks"), [(None, 1), (0.5, 2)])
def test_both_evaluations_of_a_guided_field_count(guidance: float | None, networks: int) -> None:
    estimator = get("ode", solver="euler", steps=2, trace="hutchinson", probes=1, guidance=guidance)
    cost = estimator.log_prob(FIELD, X, cond=torch.tensor([2, 0, 1])).cost
    assert (cost.forwards, cost.vjps) == (2 * networks, 2 * networks)


def test_only_a_field_of_classes_can_be_guided() -> None:
    assert can(FIELD, "guidance")
    refused = get("ode", solver="euler", steps=1, guidance=1.0).log_prob(UNet(SHAPE, **TINY).eval(), X)
    assert (refused.status, "needs a conditional field" in str(refused.reason)) == ("refused", True)


def test_a_network_with_classes_is_trained_on_labelled_data_alone() -> None:
    recipe = RECIPES["digits"]["teacher-classes"]
    with pytest.raises(ValueError, match="flow-matching on labelled data"):
        recipe.with_options(objective="meanflow")
    with pytest.raises(ValueError, match="flow-matching on labelled data"):
        recipe.with_options(teacher="teacher")
