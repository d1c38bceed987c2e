"""The page's summaries: best methods, impossible values, failures, notes."""

from __future__ import annotations

import math
from typing import Any, Final

import pandas as pd

from flowlik.report import labels as method_labels
from flowlik.report import numbers
from flowlik.report.frame import by_task_and_split
from flowlik.report.labels import as_dicts
from flowlik.report.tables.accuracy import mass_cell
from flowlik.report.tables.table import Cell, Table

BUDGETS: Final[tuple[tuple[str, float], ...]] = (("1 NFE", 1.0), ("≤ 8 NFE", 8.0), ("any NFE", math.inf))


# -------------------------------------------------------------------------------------------------------- at a glance
def _glance(usable: pd.DataFrame) -> Table | None:
    """Per task and split the reference, the best control and the smallest error within each budget of NFE."""
    rows = []
    for task, split, frame in by_task_and_split(usable):
        judged = frame[frame["bpd_mae_all"].notna()]
        methods, controls = judged[judged["method"] != "control"], judged[judged["method"] == "control"]
        if methods.empty:
            continue
        best = [_best(methods[methods["nfe_mean"] <= budget]) for _, budget in BUDGETS]
        row = method_labels.reference(frame)
        ref = row["bpd_ref"] if row else math.nan
        name = (
            f"{task}, {method_labels.split_title(split)}"
            if len(method_labels.splits(usable[usable["task"] == task])) > 1
            else task
        )
        rows.append((Cell(name), Cell(numbers.fixed(ref), ref), _best(controls), *best))
    if not rows:
        return None
    heads = ("task", "reference", "best control", *(f"best at {name}" for name, _ in BUDGETS))
    return Table("At a glance", heads, tuple(rows), names=1)


def _best(frame: pd.DataFrame) -> Cell:
    """The smallest error with, on a second line, whose it is."""
    if frame.empty:
        return Cell("–")
    row = frame.sort_values("bpd_mae_all", kind="stable").iloc[0]
    whose = row["row"] if row["method"] == "control" or not row["model"] else f"{row['row']} · {row['model']}"
    return Cell(f"{numbers.number(row['bpd_mae_all'], 2)}\n{whose}", float(row["bpd_mae_all"]))


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
