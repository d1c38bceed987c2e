"""The page's summaries: best methods, impossible values, failures, notes."""

from __future__ import annotations

import math
from typing import Any, Final

import pandas as pd

from flowlik.report import labels as method_labels
from flowlik.report import numbers, recommend
from flowlik.report.frame import by_task_and_split
from flowlik.report.labels import as_dicts
from flowlik.report.tables.accuracy import mass_cell
from flowlik.report.tables.table import Cell, Table

BUDGETS: Final = (1.0, 8.0, math.inf)
"""Evaluations that the first table answers for."""

FIELD_BUDGETS: Final = (8.0, math.inf)
"""The same for who has a velocity field alone, where one evaluation is never enough."""


# -------------------------------------------------------------------------------------------------------- at a glance
def _glance(usable: pd.DataFrame) -> Table | None:
    """Per task and split the reference, the best control and what `flowlik recommend` says within each budget."""
    rows = []
    for task, split, frame in by_task_and_split(recommend.judged(usable)):
        if (frame["method"] == "control").all():
            continue
        advice = {budget: recommend.recommend(frame, task, budget, split=split) for budget in BUDGETS}
        row = method_labels.reference(frame)
        ref = row["bpd_ref"] if row else math.nan
        name = (
            f"{task}, {method_labels.split_title(split)}"
            if len(method_labels.splits(usable[usable["task"] == task])) > 1
            else task
        )
        control = next(iter(advice.values()))
        cells = [_chosen(advice[budget].best, advice[budget].warnings()) for budget in BUDGETS]
        cells += [_chosen(advice[budget].field_only) for budget in FIELD_BUDGETS]
        rows.append((Cell(name), Cell(numbers.fixed(ref), ref), *cells, _control(control)))
    if not rows:
        return None
    heads = (
        *("task", "reference"),
        *(f"best at {_nfe(budget)}" for budget in BUDGETS),
        *(f"field alone, {_nfe(budget)}" for budget in FIELD_BUDGETS),
        "best control",
    )
    return Table("At a glance", heads, tuple(rows), names=1)


def _nfe(budget: float) -> str:
    return "any NFE" if math.isinf(budget) else "1 NFE" if budget == 1 else f"≤ {budget:g} NFE"


def _control(advice: recommend.Advice) -> Cell:
    if not advice.control_name:
        return Cell("–")
    return Cell(f"{numbers.number(advice.control, 2)}\n{advice.control_name}", advice.control)


def _chosen(choice: recommend.Choice | None, warnings: tuple[str, ...] = ()) -> Cell:
    """The smallest error with its interval; on lines below whose it is, and what to beware of."""
    if choice is None:
        return Cell("–")
    error = choice.error().replace(" ", "\n", 1)
    lines = (error, f"{choice.label} · {choice.model}", *(f"beware: {warning}" for warning in warnings))
    return Cell("\n".join(lines), choice.mae)


def _masses(frame: pd.DataFrame) -> Table | None:
    """Mass of every density that was drawn, with the eps of what is estimated."""
    drawn = frame[frame["mass"].notna()]
    if drawn.empty:
        return None
    rows = []
    for row in as_dicts(drawn):
        mass = mass_cell(row, 5)
        eps = Cell("–" if math.isnan(row["eps"]) else f"{row['eps']:.4g}", row["eps"])
        rows.append((Cell(row["row"]), Cell(row["model"]), mass, eps))
    return Table(
        f"{frame['task'].iloc[0]}: mass of every density drawn",
        ("method", "model", "mass", "eps"),
        tuple(rows),
        note="In two dimensions by the midpoint rule on the grid of the maps, whose lines fall on the edges of the "
        "density; above by importance sampling, with its standard error. The mass is that of p at t = 1 − eps.",
    )


# -------------------------------------------------------------------------------------------- why and what went wrong
def _impossible(usable: pd.DataFrame) -> Table | None:
    """This run's plain maps and Euler solutions: bits/dim by steps, and N times the distance to the reference."""
    kept = usable[
        usable["method"].isin(["meanflow", "ode-euler"]) & usable["steps"].notna() & usable["bpd"].notna()
    ]
    steps = sorted({int(s) for s in kept["steps"]})
    if not steps:
        return None
    rows = []
    for task, split, frame in by_task_and_split(kept):
        for series in dict.fromkeys(zip(frame["series"], frame["model"], strict=True)):
            line = frame[(frame["series"] == series[0]) & (frame["model"] == series[1])]
            values = {int(row["steps"]): row for row in as_dicts(line)}
            ref = line["bpd_ref"].median()
            cells = [_at(values.get(n), n) for n in steps]
            rows.append(
                (
                    Cell(f"{task}, {method_labels.split_title(split)}"),
                    Cell(f"{series[0]} · {series[1]}"),
                    Cell(numbers.fixed(ref), float(ref)),
                    *cells,
                )
            )
    heads = ("task", "method · model", "reference", *(f"N = {n}" for n in steps))
    note = (
        "Cells: bits/dim, and in brackets N times the distance to the reference: constant for an a + b/N law."
    )
    return Table("Plain maps and Euler in this run", heads, tuple(rows), note=note)


def _at(row: dict[str, Any] | None, steps: int) -> Cell:
    if row is None:
        return Cell("–")
    scaled = numbers.number(steps * row["bpd_error"], 2)
    return Cell(f"{numbers.fixed(row['bpd'], 2)} ({scaled})", float(row["bpd"]))


def _failed(records: pd.DataFrame) -> Table | None:
    """Every cell without a result; cells that share all but the estimator stand in one line."""
    estimators: dict[tuple[str, ...], list[str]] = {}
    for row in as_dicts(records[records["status"] != "ok"]):
        key = tuple(str(row[name]) for name in ("task", "split", "model", "status", "reason"))
        estimators.setdefault(key, []).append(str(row["estimator_label"]))
    rows = [
        (
            *(Cell(word or "–") for word in key[:3]),
            Cell(", ".join(labels)),
            *(Cell(word or "–") for word in key[3:]),
        )
        for key, labels in estimators.items()
    ]
    heads = ("task", "split", "model", "estimators", "status", "reason")
    return Table("Cells without a result", heads, tuple(rows), names=6) if rows else None


def _notes(usable: pd.DataFrame) -> Table | None:
    rows = [
        tuple(Cell(row[name] or "–") for name in ("task", "split", "model", "estimator_label", "reason"))
        for row in as_dicts(usable[usable["reason"] != ""])
    ]
    heads = ("task", "split", "model", "estimator", "note")
    return Table("Results with a note", heads, tuple(rows), names=5) if rows else None


def _origins(usable: pd.DataFrame) -> Table | None:
    """Which model, data and reference stand behind the numbers."""
    names = ["task", "split", "model", "model_hash", "data_hash", "ref_id"]
    kept = usable.loc[usable["method"] != "control", names].drop_duplicates()
    rows = tuple(tuple(Cell(row[name] or "–") for name in names) for row in as_dicts(kept))
    heads = ("task", "split", "model", "model hash", "data hash", "reference")
    return Table("Models, data and references", heads, rows, names=6) if rows else None
