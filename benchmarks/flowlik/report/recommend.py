"""The best method for a task and a budget, read off records: how wrong it is, and what to beware of.

Nothing is measured here. Only methods that a trained network can use are named: traces in closed form are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flowlik.records.paths import results_dir
from flowlik.records.reading import read_records
from flowlik.report import frame as frames
from flowlik.report import labels, numbers
from flowlik.report.tables.accuracy import beware_of
from flowlik_models.names import unknown

COSTS: Final[Mapping[str, tuple[str, str]]] = {
    "nfe": ("nfe_mean", "evaluations"),
    "work": ("work", "evaluations and products"),
    "ms": ("ms_per_sample", "ms a sample"),
}
"""What a budget counts: its column, and its words."""

FIELD_ONLY: Final = frozenset(
    {"ode", "whitened-ode", "elbo", "peer-diffrax", "peer-flow-matching", "peer-torchode", "peer-zuko"}
)
"""Estimators that ask a model for nothing but a velocity field."""


@dataclass(frozen=True)
class Choice:
    """One method with its error: values in bits/dim, cost per sample."""

    label: str
    model: str
    estimator: str
    mae: float
    mae_lo: float
    mae_hi: float
    bias: float
    nfe: float
    work: float
    cost: float
    warnings: tuple[str, ...]
    note: str

    @property
    def field_only(self) -> bool:
        """Whether it asks for nothing but a velocity field."""
        return self.estimator.partition("[")[0] in FIELD_ONLY

    def told_apart_from(self, other: Choice) -> bool:
        """Whether the two intervals of the mean |error| leave no doubt which is the smaller one.

        The test of the difference of two independent means, from their 95 % intervals.
        """
        widths = math.hypot(self.mae_hi - self.mae_lo, other.mae_hi - other.mae_lo) / 2
        return not abs(self.mae - other.mae) <= widths

    def __str__(self) -> str:
        products = "" if self.work == self.nfe else f" ({self.work:.4g} with products)"
        return (
            f"{self.label} · {self.model}: |error| {self.error()}, bias {numbers.number(self.bias, 2)} bits/dim, "
            f"NFE {self.nfe:.4g}{products}"
        )

    def error(self) -> str:
        """The mean |error| with its 95 % interval, in words."""
        interval = f"[{numbers.number(self.mae_lo, 2)}, {numbers.number(self.mae_hi, 2)}]"
        return f"{numbers.number(self.mae, 2)} {interval}"


@dataclass(frozen=True)
class Advice:
    """What to use for a task, a split and a budget."""

    task: str
    split: str
    budget: float
    words: str
    control: float
    control_name: str
    best: Choice | None
    cheaper: Choice | None
    field_only: Choice | None

    def lines(self) -> list[str]:
        """The advice in words, a line each."""
        words = "evaluation" if (self.budget, self.words) == (1, "evaluations") else self.words
        at = "at any cost" if math.isinf(self.budget) else f"at most {self.budget:g} {words}"
        found = [f"{self.task}, {labels.split_title(self.split)}, {at}"]
        if self.best is None:
            return [*found, "  no method of these records fits this budget"]
        found.append(f"  {'best' if self.best.field_only else 'with a network trained for it'}: {self.best}")
        if self.cheaper is not None:
            found.append(f"  not told apart from it and cheaper: {self.cheaper}")
        if self.field_only is not None and self.field_only != self.best:
            found.append(f"  with a velocity field alone: {self.field_only}")
        found += [f"  beware: {warning}" for warning in (*self.warnings(), self.best.note) if warning]
        return [*found, f"  again: {self.command()}"]

    def warnings(self) -> tuple[str, ...]:
        """What a reader has to know of the best method before using it."""
        if self.best is None:
            return ()
        beaten = self.best.mae < self.control or math.isnan(self.control)
        worse = f"no better than {self.control_name}, {numbers.number(self.control, 2)}"
        return (*(() if beaten else (worse,)), *self.best.warnings)

    def command(self) -> str:
        """The command that runs the best method on this task again, on held-out data."""
        if self.best is None:
            return ""
        return f"flowlik run -t {self.task} -m {self.best.model} -e '{self.best.estimator}'"


def shipped() -> list[Path]:
    """The records that come with the package, a file for each suite."""
    return sorted((results_dir() / "records").glob("*.jsonl"))


def load(runs: Sequence[Path] = ()) -> pd.DataFrame:
    """Records of runs (folders or files), by default the shipped ones, ready for `recommend`.

    Raises:
        FileNotFoundError: there are no records.
    """
    found = list(runs) or shipped()
    if not found:
        raise FileNotFoundError("no records come with this package: name a run by --in")
    rows = pd.concat([read_records(file) for file in found], ignore_index=True)
    return judged(frames.averaged(frames.usable(frames.prepare(rows))))


def judged(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of a prepared frame that `recommend` chooses from: those with an error, with their times."""
    return frames.with_times(frame[frame["bpd_mae_all"].notna()])


def recommend(
    frame: pd.DataFrame, task: str, budget: float = math.inf, *, cost: str = "nfe", split: str | None = None
) -> Advice:
    """The best method for a task within a budget.

    Args:
        frame: what `load` or `judged` gives.
        task: a task's name; `tasks_of` finds those of a number of dimensions.
        budget: the most that one sample may cost.
        cost: what is counted: `nfe` (evaluations), `work` (evaluations and products), `ms`.
        split: by default the held-out data.

    Raises:
        ValueError: the records have no such task or split, no such cost exists, or the budget is no positive number.

    >>> from flowlik.report.recommend import load, recommend
    >>> recommend(load(), "gmm-64d", 8).best.model
    'direct-f2d2'
    """
    if cost not in COSTS:
        raise ValueError(unknown("cost", cost, COSTS))
    if not budget > 0:
        raise ValueError(f"a budget is a positive number, not {budget}")
    column, words = COSTS[cost]
    of_task = frame[frame["task"] == task]
    if of_task.empty:
        raise ValueError(unknown("task of these records", task, sorted(set(frame["task"]))))
    valid = labels.splits(of_task)
    at = valid[0] if split is None else split
    if at not in valid:
        raise ValueError(unknown(f"split of {task}", at, valid))
    rows = of_task[of_task["split"] == at]
    controls = rows[rows["method"] == "control"].sort_values("bpd_mae_all", kind="stable")
    if rows["spearman"].isna().all():  # the truth is constant, and a constant right by construction
        controls = controls[:0]
    within = usable_by_a_network(rows)
    within = within[within[column] <= budget] if math.isfinite(budget) else within
    choices = [
        _choice(row, column) for row in labels.as_dicts(within.sort_values("bpd_mae_all", kind="stable"))
    ]
    best = choices[0] if choices else None
    cheaper = [c for c in choices[1:] if best and not c.told_apart_from(best) and c.cost < 0.99 * best.cost]
    return Advice(
        task=task,
        split=at,
        budget=budget,
        words=words,
        control=float(controls["bpd_mae_all"].min()),
        control_name=str(controls["estimator"].iloc[0]) if len(controls) else "",
        best=best,
        cheaper=min(cheaper, key=lambda choice: choice.cost, default=None),
        field_only=next((choice for choice in choices if choice.field_only), None),
    )


def tasks_of(frame: pd.DataFrame, wanted: str) -> list[str]:
    """The task of this name or, for a number, those whose dimension is nearest on a logarithmic scale.

    Raises:
        ValueError: the records have no task of this name.
    """
    known = sorted(set(frame["task"]))
    if wanted in known:
        return [wanted]
    if not wanted.isdigit() or int(wanted) == 0:
        raise ValueError(unknown("task of these records", wanted, known))
    sizes = frame.groupby("task")["dim"].first()
    distance = sizes.map(lambda dim: abs(math.log(dim / int(wanted))))
    return [str(name) for name in distance[distance == distance.min()].index]


def usable_by_a_network(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of what a trained network can use: no control, no trace or map in closed form."""
    closed = (rows["trace"] == "closed") | (
        (rows["model"] == "closed-form") & ~rows["estimator"].isin(FIELD_ONLY)
    )
    return rows[(rows["method"] != "control") & ~closed]


def _choice(row: dict[str, Any], column: str) -> Choice:
    return Choice(
        label=row["row"],
        model=row["model"],
        estimator=row["estimator_label"],
        mae=row["bpd_mae_all"],
        mae_lo=row["bpd_mae_all_lo"],
        mae_hi=row["bpd_mae_all_hi"],
        bias=row["bpd_error"],
        nfe=row["nfe_mean"],
        work=row["work"],
        cost=row[column],
        warnings=tuple(warning for _, warning in beware_of(row)),
        note=row["reason"],
    )
