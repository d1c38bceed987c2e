"""How every model is trained: the recipes of all families in one table. Times on two cores stand on the cards of those
that are shipped."""

from __future__ import annotations

from flowlik_models.recipes.energies import energy_recipes
from flowlik_models.recipes.exact_flows import exact_flow_recipes
from flowlik_models.recipes.generators import generator_recipes
from flowlik_models.recipes.images import image_recipes
from flowlik_models.recipes.maps import map_recipes
from flowlik_models.recipes.policies import policy_recipes
from flowlik_models.recipes.recipe import Recipe


def joined(*families: dict[str, dict[str, Recipe]]) -> dict[str, dict[str, Recipe]]:
    """Recipes by task and model of several families.

    Raises:
        ValueError: two families have a model of the same task and name.
    """
    table: dict[str, dict[str, Recipe]] = {}
    for family in families:
        for task, models in family.items():
            known = table.setdefault(task, {})
            if twice := known.keys() & models.keys():
                raise ValueError(f"two recipes of {min(twice)} on {task}")
            known |= models
    return table


RECIPES = joined(
    map_recipes(),
    policy_recipes(),
    generator_recipes(),
    energy_recipes(),
    exact_flow_recipes(),
    image_recipes(),
)
