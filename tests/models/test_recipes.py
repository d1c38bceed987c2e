"""The recipes tell how the shipped models were trained."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from flowlik_models.recipes.recipe import Recipe
from flowlik_models.recipes.table import RECIPES
from flowlik_models.zoo import checkpoint_path

SHIPPED = [
    (task, model)
    for task, models in RECIPES.items()
    for model in models
    if checkpoint_path(task, model).is_file()
]


def card_of(task: str, model: str) -> dict[str, Any]:
    return dict(json.loads(checkpoint_path(task, model).with_suffix(".json").read_text()))


@pytest.mark.parametrize(("task", "model"), SHIPPED, ids=["/".join(names) for names in SHIPPED])
def test_recipe_on_the_card_is_the_one_in_the_table(task: str, model: str) -> None:
    then = card_of(task, model)["recipe"]
    now = json.loads(json.dumps(dataclasses.asdict(RECIPES[task][model])))
    defaults = json.loads(json.dumps(dataclasses.asdict(Recipe(objective="meanflow"))))
    # cards tell the options of their day; the teacher was spelled otherwise at first
    shared = [name for name in now if name in then and name != "teacher"]
    assert {name: then[name] for name in shared} == {name: now[name] for name in shared}
    # what came later was trained without, so the table may not ask for it
    assert [name for name in now if name not in then and now[name] != defaults[name]] == []


def test_every_shipped_few_step_model_has_its_accuracy_on_its_card() -> None:
    joint = [names for names in SHIPPED if RECIPES[names[0]][names[1]].divergence]
    assert joint
    policies = [names for names in SHIPPED if RECIPES[names[0]][names[1]].imitation]
    for task, model in {*joint, *policies}:
        accuracy = card_of(task, model)["accuracy"]["test"]
        counts = 1 if (task, model) in policies else 4  # segments; 1, 2, 4 and 8 steps
        assert len(accuracy) == counts, f"{task}/{model}"
        assert all({"bpd", "bpd_error", "bpd_mae"} <= set(row) for row in accuracy.values()), (
            f"{task}/{model}"
        )
