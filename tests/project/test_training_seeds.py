"""The table of three training seeds in the docs is what the cards say: 0 as shipped, 1 and 2 as recorded."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "flowlik_models" / "checkpoints"
OTHERS = ROOT / "results" / "training-seeds"
PAGE = ROOT / "docs" / "training-findings.md"
STEPS = (1, 2, 4, 8)
ROWS = [
    (task, model) for task in ("gmm-2d", "gmm-64d", "digits") for model in ("direct-f2d2", "meanflow-f2d2")
]


def cards(task: str, model: str) -> list[dict[str, Any]]:
    files = [
        SHIPPED / task / f"{model}.json",
        *(OTHERS / seed / task / f"{model}.json" for seed in ("1", "2")),
    ]
    return [json.loads(file.read_text()) for file in files]


def errors(task: str, model: str, steps: int) -> list[float]:
    return [card["accuracy"]["test"][f"f2d2[steps={steps}]"]["bpd_mae"] for card in cards(task, model)]


def line(task: str, model: str) -> str:
    """A row of the table: the three errors at each number of steps, and the widest spread over their mean."""
    cells = [errors(task, model, steps) for steps in STEPS]
    spread = max((max(cell) - min(cell)) / mean(cell) for cell in cells)
    shown = " | ".join(" ".join(f"{value:.3g}" for value in cell) for cell in cells)
    return f"| `{task}` | `{model}` | {shown} | {spread:.2f} |"


@pytest.mark.parametrize(("task", "model"), ROWS)
def test_the_page_prints_the_errors_of_three_seeds(task: str, model: str) -> None:
    assert line(task, model) in PAGE.read_text().splitlines()


@pytest.mark.parametrize(("task", "model"), ROWS)
def test_the_three_differ_by_their_seed_alone(task: str, model: str) -> None:
    first, *others = cards(task, model)
    assert [card["seed"] for card in (first, *others)] == [0, 1, 2]
    for card in others:
        for name in (
            "objective",
            "steps",
            "batch",
            "learning_rate",
            "pool",
            "network",
            "pool_share",
            "direct",
        ):
            # cards of older recipes lack options that were added later
            if name in first["recipe"]:
                assert card["recipe"][name] == first["recipe"][name], name
