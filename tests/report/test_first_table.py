"""The tables of README and docs/results.md say what the records that come along say."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest

from flowlik.report.recommend import load

ROOT = Path(__file__).resolve().parents[2]
EXACT, NETWORK = "closed-form", {"digits": "teacher"}

Row = tuple[str, str, str]  # its words, the estimator's label, the model; NET: the trained field of the task
NET = "net"


def steps(words: str, label: str, model: str, *numbers: int) -> list[Row]:
    return [(f"{words}, {n} NFE", label.format(n), model) for n in numbers]


CONTROLS: list[Row] = [
    (f"`{name}`", name, "*") for name in ("control-median", "control-component", "control-gaussian")
]
SHORT: list[Row] = [
    ("adaptive ODE, exact field, exact trace (86 to 104 NFE)", "ode", EXACT),
    *steps("ODE by Euler steps, trained field", "ode[solver=euler,steps={}]", NET, 8),
    *steps("plain MeanFlow map", "meanflow[steps={}]", NET, 1, 8),
    *steps("MeanFlow-F2D2", "f2d2[steps={}]", "meanflow-f2d2", 1, 8),
    *steps("direct F2D2", "f2d2[steps={}]", "direct-f2d2", 1, 8),
    *CONTROLS[:2],
]
LONG: list[Row] = [
    ("ODE dopri5 1e-5, exact field (86 to 104 NFE)", "ode", EXACT),
    *steps("ODE Euler, exact field, closed trace", "ode[solver=euler,steps={},trace=closed]", EXACT, 8),
    *steps("ODE Euler, trained field", "ode[solver=euler,steps={}]", NET, 8),
    (
        "whitened RK4, exact field, closed trace, 8 NFE",
        "whitened-ode[clock=stretched,solver=rk4,steps=2,trace=closed]",
        EXACT,
    ),
    (
        "whitened RK4, exact field, closed trace, 16 NFE",
        "whitened-ode[clock=stretched,solver=rk4,steps=4,trace=closed]",
        EXACT,
    ),
    ("whitened RK4, trained field, 8 NFE", "whitened-ode[clock=stretched,solver=rk4,steps=2]", NET),
    ("whitened RK4, trained field, 16 NFE", "whitened-ode[clock=stretched,solver=rk4,steps=4]", NET),
    *steps("plain MeanFlow map", "meanflow[steps={}]", NET, 1, 8),
    *steps("MeanFlow-F2D2", "f2d2[steps={}]", "meanflow-f2d2", 1, 2, 4, 8),
    *steps("direct F2D2 (ours)", "f2d2[steps={}]", "direct-f2d2", 1, 2, 4, 8),
    *(("`control-mean`", "control-mean", "*"), *CONTROLS),
]
DIGITS = ("digits, test", "digits, own samples")


def value(frame: pd.DataFrame, column: str, label: str, model: str) -> str:
    """A cell: two significant digits, nothing where there is no such record."""
    task, _, split = column.partition(", ")
    names = {NET: ("meanflow", "teacher"), "*": None}.get(model, (model,))
    labels = {label, label.removesuffix("]") + ",trace=hutchinson]"} if model == NET else {label}
    rows = frame[(frame["task"] == task) & frame["estimator_label"].isin(labels)]
    rows = rows[rows["split"] == ("teacher-samples" if split == "own samples" else "test")]
    rows = rows if names is None else rows[rows["model"].isin(names)]
    found = float(rows["bpd_mae_all"].min()) if len(rows) else math.nan
    return "" if math.isnan(found) else f"{found:.2g}"


@pytest.mark.parametrize(
    ("page", "rows", "columns"),
    [
        ("README.md", SHORT, ("gmm-2d", "thin-2d", "gmm-64d", "digits")),
        ("docs/results.md", LONG, ("gmm-2d", "checkerboard-2d", "thin-2d", "gmm-64d", *DIGITS)),
    ],
)
def test_every_number_of_the_table_is_that_of_its_record(
    page: str, rows: list[Row], columns: tuple[str, ...]
) -> None:
    frame = load()
    lines = [f"| mean \\|error\\|, bits/dim | {' | '.join(columns)} |", "| --- |" + " ---: |" * len(columns)]
    lines += [
        " ".join(["|", words, *(f"| {value(frame, c, label, model)}" for c in columns), "|"])
        for words, label, model in rows
    ]
    table = "\n".join(lines)
    assert table in (ROOT / page).read_text(), f"due in {page}:\n{table}"
    assert page != "README.md" or len(rows) <= 10
