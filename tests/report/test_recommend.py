"""What is recommended is the smallest error that a network can reach within the budget, the same on every page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from flowlik.cli import app
from flowlik.report import gallery
from flowlik.report.recommend import FIELD_ONLY, Advice, Choice, load, recommend, tasks_of
from flowlik_estimators import available
from flowlik_estimators.peers import Peer

ROOT = Path(__file__).resolve().parents[2]
COSTS = {"nfe": "nfe_mean", "work": "work", "ms": "ms_per_sample"}


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return load()


@pytest.mark.parametrize("cost", sorted(COSTS))
@pytest.mark.parametrize("budget", [1, 8, 100, math.inf])
def test_the_best_is_the_smallest_error_within_the_budget(
    frame: pd.DataFrame, cost: str, budget: float
) -> None:
    for task in sorted(set(frame["task"])):
        rows = frame[(frame["task"] == task) & (frame["split"] == "test")]
        rows = rows[(rows["method"] != "control") & (rows["trace"] != "closed")]
        rows = rows[(rows["model"] != "closed-form") | rows["estimator"].isin(sorted(FIELD_ONLY))]
        within = rows if math.isinf(budget) else rows[rows[COSTS[cost]] <= budget]
        best = recommend(frame, task, budget, cost=cost).best
        if within.empty:
            assert best is None
        else:
            assert best is not None
            assert best.mae == within["bpd_mae_all"].min()
            assert best.cost <= budget


def test_a_cheaper_method_is_named_only_where_no_interval_tells_it_apart(frame: pd.DataFrame) -> None:
    advice = recommend(frame, "gmm-64d", 8)
    assert advice.best is not None
    for other in (
        dataclasses.replace(advice.best, mae=m, mae_lo=m - 0.001, mae_hi=m + 0.001) for m in (0.0066, 0.01)
    ):
        assert advice.best.told_apart_from(other) == (abs(other.mae - advice.best.mae) > 0.003)
    if advice.cheaper is not None:
        assert advice.cheaper.nfe < advice.best.nfe
        assert not advice.best.told_apart_from(advice.cheaper)


def test_intervals_are_compared_as_a_difference_of_means() -> None:
    def choice(mae: float, half: float) -> Choice:
        words = dict.fromkeys(("label", "model", "estimator", "note"), "")
        numbers = dict.fromkeys(("bias", "nfe", "work", "cost"), 1.0)
        return Choice(**words, **numbers, mae=mae, mae_lo=mae - half, mae_hi=mae + half, warnings=())

    assert choice(1.0, 0.3).told_apart_from(choice(1.51, 0.4))  # half widths 0.3 and 0.4 add up to 0.5
    assert not choice(1.0, 0.3).told_apart_from(choice(1.49, 0.4))
    assert choice(1.0, 0.3).told_apart_from(choice(math.nan, 0.4))


def test_what_is_worse_than_a_control_says_so(frame: pd.DataFrame) -> None:
    advice = recommend(frame, "gmm-2d", 8)
    assert not [words for words in advice.warnings() if "control" in words]
    worse = dataclasses.replace(advice, control=1e-6, control_name="control-median")
    assert worse.warnings()[0] == "no better than control-median, 1.0e−6"


def test_a_mass_away_from_one_and_few_items_are_told(frame: pd.DataFrame) -> None:
    rows = frame.assign(mass=1.3, mass_se=0.02, n_items=50.0, invalid_share=0.25, coverage95=0.8)
    warnings = recommend(rows, "gmm-2d", 1).warnings()
    assert warnings == (
        "the density's mass is 1.30, not 1",
        "its error bars cover 80 % of items, not 95 %",
        "25 % of items are not answered",
        "judged on 50 items only",
    )
    assert recommend(frame.assign(mass=1.3, mass_se=0.2), "gmm-2d", 1).warnings() == ()


def test_public_libraries_ask_for_a_field_alone(frame: pd.DataFrame) -> None:
    peers = {name for name, kind in available().items() if issubclass(kind, Peer)}
    assert peers
    assert peers <= FIELD_ONLY
    rows = frame[(frame["task"] == "digits") & (frame["model"] == "teacher")].assign(
        estimator_label="peer-torchode"
    )
    assert recommend(rows, "digits").lines()[1].startswith("  best: ")


def test_a_number_stands_for_the_tasks_of_the_nearest_dimension(frame: pd.DataFrame) -> None:
    assert {"digits", "gmm-64d"} <= set(tasks_of(frame, "64"))
    assert tasks_of(frame, "64") == tasks_of(frame, "50")
    assert "gmm-2d" in tasks_of(frame, "1")


def test_every_page_says_what_the_records_say(frame: pd.DataFrame) -> None:
    assert (ROOT / gallery.CHOOSE).read_text() == gallery.choose_page(ROOT), "due: flowlik gallery"
    said = "\n".join(recommend(frame, "gmm-64d", 8).lines())
    assert said in (ROOT / gallery.CHOOSE).read_text()
    assert all(said in (ROOT / page).read_text() for page in ("README.md", "docs/index.md"))
    printed = CliRunner().invoke(app, ["recommend", "gmm-64d", "--nfe", "8"])
    assert printed.output.strip() == said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["gmm-2"], "did you mean 'gmm-2d'"),
        (["gmm-2d", "--nfe", "0"], "a positive number"),
        (["gmm-2d", "--nfe", "nan"], "a positive number"),
        (["gmm-2d", "--nfe", "1", "--ms", "1"], "one budget at a time"),
        (["gmm-2d", "--split", "tset"], "did you mean 'test'"),
        (["gmm-2d", "--in", "nowhere"], "no records at"),
        (["0"], "unknown task"),
    ],
)
def test_what_cannot_be_answered_is_one_line(words: list[str], says: str) -> None:
    done = CliRunner().invoke(app, ["recommend", *words])
    assert done.exit_code == 2
    assert says in done.output
    assert len(done.output.strip().splitlines()) == 1


def test_no_method_within_a_budget_is_said(frame: pd.DataFrame) -> None:
    advice: Advice = recommend(frame, "gmm-2d", 0.5)
    assert advice.best is None
    assert advice.lines() == [
        "gmm-2d, test data, at most 0.5 evaluations",
        "  no method of these records fits this budget",
    ]
