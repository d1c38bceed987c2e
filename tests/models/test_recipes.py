"""The recipes tell how the shipped models were trained."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import fields
from typing import Any

import pytest

from flowlik_models.recipes import options as groups
from flowlik_models.recipes.recipe import Recipe, needs_forward_mode
from flowlik_models.recipes.table import RECIPES, joined
from flowlik_models.training.trainer import _recipe_key
from flowlik_models.zoo import checkpoint_path

SHIPPED = [
    (task, model)
    for task, models in RECIPES.items()
    for model in models
    if checkpoint_path(task, model).is_file()
]
GROUPS = [
    groups.Optimiser,
    groups.Times,
    groups.Points,
    groups.Weights,
    groups.Trajectories,
    groups.Execution,
]


def card_of(task: str, model: str) -> dict[str, Any]:
    return dict(json.loads(checkpoint_path(task, model).with_suffix(".json").read_text()))


@pytest.mark.parametrize(("task", "model"), SHIPPED, ids=["/".join(names) for names in SHIPPED])
def test_recipe_on_the_card_is_the_one_in_the_table(task: str, model: str) -> None:
    then = card_of(task, model)["recipe"]
    now = json.loads(json.dumps(RECIPES[task][model].flat()))
    defaults = json.loads(json.dumps(Recipe(objective="meanflow").flat()))
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


def test_every_option_has_a_name_of_its_own() -> None:
    names = Counter(each.name for kind in (Recipe, *GROUPS) for each in fields(kind))
    assert max(names.values()) == 1


def test_options_are_found_in_their_groups() -> None:
    base = Recipe(objective="meanflow")
    made = base.with_options(steps=7, batch=8, altered=0.5, pool=3, start_from="teacher")
    assert (made.optimiser.steps, made.optimiser.batch) == (7, 8)
    assert (made.points.altered, made.trajectories.pool, made.start_from) == (0.5, 3, "teacher")
    changed = {"steps", "batch", "altered", "pool", "start_from"}
    assert {name for name, value in made.flat().items() if value != base.flat()[name]} == changed
    assert base.with_options() == base


def test_an_unknown_option_comes_with_the_nearest_match() -> None:
    with pytest.raises(ValueError, match="unknown option of a recipe 'step'; did you mean 'steps'"):
        Recipe(objective="meanflow").with_options(step=7)
    with pytest.raises(ValueError, match="unknown option of a recipe 'optimiser'"):
        Recipe(objective="meanflow").with_options(optimiser=groups.Optimiser())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must not be negative"),
        ({"ema": 1.5}, "ema must be a share"),
        ({"batch": 10, "accumulate": 3}, "a batch of 10 cannot be taken in 3 equal parts"),
        ({"stretched": 2.0}, "stretched must be a share"),
        ({"middle": "third"}, "unknown middle 'third'"),
        ({"altered_law": "alon"}, "did you mean 'along'"),
        ({"altered_scale": 0.0}, "altered_scale must be positive"),
        ({"weight_c": (0.0, None)}, "positive constants or None"),
        ({"relative": -1.0}, "relative must be positive"),
        ({"pool": -1}, "pool is a number"),
        ({"pool_probes": 0}, "pool_probes must be at least 1"),
        ({"precision": "float8"}, "unknown precision 'float8'"),
        ({"stored": "float64"}, "unknown stored 'float64'"),
        ({"compile": True, "derivative": "jvp"}, "no forward-mode derivative"),
    ],
)
def test_options_out_of_range_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Recipe(objective="meanflow").with_options(**options)
    assert "\n" not in str(error.value)


def test_families_that_share_a_model_are_refused() -> None:
    family = {"digits": {"teacher": RECIPES["digits"]["teacher"]}}
    with pytest.raises(ValueError, match="two recipes of teacher on digits"):
        joined(family, family)


def test_forward_derivatives_are_taken_in_float32() -> None:
    """In bfloat16 autocast a convolution's tangent keeps the type of its point, and torch refuses the mixture."""
    mixed = [
        f"{task}/{model}"
        for task, models in RECIPES.items()
        for model, recipe in models.items()
        if needs_forward_mode(recipe) and recipe.execution.precision != "float32"
    ]
    assert not mixed


def digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def test_recipes_are_those_that_trainings_and_cards_are_named_after() -> None:
    """Options in groups or not: a training that was interrupted goes on, and an altered recipe is another one."""
    keys = {
        f"{t}/{m}": _recipe_key(recipe, 0) for t, models in RECIPES.items() for m, recipe in models.items()
    }
    assert len(keys) == 149
    assert digest(keys) == "171bd25cf9ca"
    recipe = RECIPES["gmm-2d"]["meanflow"]
    assert _recipe_key(recipe.with_options(accumulate=2), 0) == _recipe_key(recipe, 0)
    for options in ({"steps": 1}, {"altered": 0.0}, {"stored": "float16"}, {"divergence": True}):
        assert _recipe_key(recipe.with_options(**options), 0) != _recipe_key(recipe, 0)
    assert _recipe_key(recipe, 1) != _recipe_key(recipe, 0)
