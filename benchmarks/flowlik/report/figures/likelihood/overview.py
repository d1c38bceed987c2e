"""One picture of a whole run: per-sample error of every method on every task."""

from __future__ import annotations

import re
import textwrap
from typing import Any, Final

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from flowlik.records.columns import axis_label
from flowlik.report import labels, numbers
from flowlik.report.figures import style

MOST_ROWS: Final = 48
WORDS: Final = 52
"""Letters of a line of a row's name."""


def error_overview(frame: pd.DataFrame) -> Figure | None:
    """Mean |error| in bits/dim (colour: decades) of methods and steps (rows) on tasks (columns).

    A row holds one method on exact fields or on networks, by name where a task has several; of several traces or
    tolerances the most exact one, by probes with a dagger; of many steps the fewest and the most are shown. A column
    is a task's first split, or every split of a run of one task. Rows of one task alone stand in that task's figures.
    None where fewer than two tasks or splits have errors.
    """
    shown = frame[np.isfinite(frame["bpd_mae_all"])]
    if shown.empty or len(shown.groupby(["task", "split"])) < 2:
        return None
    tasks = sorted(shown["task"].unique())
    columns = [(t, s) for t in tasks for s in _splits(shown, t, len(tasks))]
    shown = shown[[pair in columns for pair in zip(shown["task"], shown["split"], strict=True)]]
    shown = _most_exact_last(_ends(shown))
    names = _rows(shown)
    cells: dict[str, dict[tuple[str, str], str]] = {}
    values: dict[str, dict[tuple[str, str], float]] = {}
    for name, row in zip(names, labels.as_dicts(shown), strict=True):
        place = (row["task"], row["split"])
        values.setdefault(name, {})[place] = row["bpd_mae_all"]
        cells.setdefault(name, {})[place] = _short(row["bpd_mae_all"]) + ("†" if _by_probes(row) else "")
    methods = dict(zip(names, shown["method"], strict=True))
    rows = _common(list(dict.fromkeys(_ordered(shown, names))), values, methods)[:MOST_ROWS]
    numbers_of = np.array([[values[name].get(place, np.nan) for place in columns] for name in rows])
    words = [[cells[name].get(place, "") for place in columns] for name in rows]
    several = len(tasks) == 1
    across = [f"{t}, {s}" if several else t for t, s in columns]
    return _drawn(numbers_of, words, across, rows, [methods[name] for name in rows])


def _drawn(
    values: np.ndarray, words: list[list[str]], across: list[str], rows: list[str], methods: list[str]
) -> Figure:
    """The table of coloured cells."""
    names = [textwrap.fill(row, WORDS) for row in rows]
    lines = max(name.count("\n") + 1 for name in names)
    figure = style.new_figure(style.PAGE, 1.3 + (0.1 + 0.1 * lines) * len(rows))
    ax = figure.subplots()
    exponents = np.log10(np.where(values > 0, values, np.nan))
    exponents = np.where(values == 0, -4.0, exponents)
    sns.heatmap(
        exponents,
        ax=ax,
        annot=words,
        fmt="",
        cmap="rocket_r",
        vmin=-4,
        vmax=1,
        linewidths=0.8,
        annot_kws={"fontsize": 6.3},
        cbar_kws={
            "label": axis_label("bpd_mae_all"),
            "ticks": [-4, -3, -2, -1, 0, 1],
            "extend": "both",
            "aspect": 45,
            "pad": 0.02,
        },
        xticklabels=across,
        yticklabels=names,
    )
    bar = ax.collections[0].colorbar
    if bar is not None:
        bar.ax.set_yticklabels(["1e-4", "1e-3", "0.01", "0.1", "1", "10"], fontsize=6.5)
    for k in range(1, len(rows)):
        if methods[k] != methods[k - 1]:
            ax.axhline(k, color="white", linewidth=3.5)
    ax.tick_params(length=0, labelsize=6.6)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=28, ha="right", rotation_mode="anchor")
    figure.suptitle("Per-sample error of every method on every task", fontsize=9)
    if any("†" in word for line in words for word in line):
        figure.supxlabel("† trace by Hutchinson's probes", fontsize=7, color=style.MUTED)
    return figure


def _splits(shown: pd.DataFrame, task: str, tasks: int) -> list[str]:
    """The splits that have a column: the held-out one, or all of a run of one task."""
    found = labels.splits(shown[shown["task"] == task])
    return found if tasks == 1 else found[:1]


def _by_probes(row: dict[str, Any]) -> bool:
    return bool(row["method"] != "control" and row["trace"] == "hutchinson")


def _most_exact_last(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows in such an order that of those with one name and place the last stands for them."""
    keys = frame.assign(
        exact=frame["trace"] != "hutchinson",
        tight=-frame["rtol"].fillna(0.0),
        probed=frame["probes"].fillna(0),
    )
    order = keys.sort_values(["exact", "tight", "probed", "n_items"], kind="stable").index
    return frame.loc[order]


def _common(
    rows: list[str], values: dict[str, dict[tuple[str, str], float]], methods: dict[str, str]
) -> list[str]:
    """The rows with values in two columns and more, or all where that would leave no method."""
    kept = [name for name in rows if len(values[name]) > 1]
    return kept if any(methods[name] != "control" for name in kept) else rows


def _rows(frame: pd.DataFrame) -> list[str]:
    """Row names: method, steps and parameters (an exact trace is the same by any way), and the kind of model.

    Networks are named where a task has several for one method.
    """
    rows = labels.as_dicts(frame)
    names = [f"{_brief(row)}{_kind(row)}" for row in rows]
    trained = [row["method"] != "control" and row["model"] != "closed-form" for row in rows]
    models: dict[tuple[str, str, str], set[str]] = {}
    for name, row in zip(names, rows, strict=True):
        models.setdefault((name, row["task"], row["split"]), set()).add(row["model"])
    several = {name for (name, _, _), found in models.items() if len(found) > 1}
    return [
        f"{_brief(row)} · {row['model']}" if network and name in several else name
        for name, row, network in zip(names, rows, trained, strict=True)
    ]


def _brief(row: dict[str, Any]) -> str:
    """A row's method, steps and options, without its tolerance and how its trace was taken."""
    return re.sub(r", (tol [^,]+|Hutchinson ×\d+|divergence quadrature)(?=,|$)", "", str(row["brief"]))


def _short(value: float) -> str:
    """As narrow as a cell: two digits, one below a thousandth."""
    return numbers.number(value, 2 if value >= 1e-3 else 1) if np.isfinite(value) else ""


def _kind(row: dict[str, Any]) -> str:
    if row["method"] == "control":
        return ""
    return " · exact field" if row["model"] == "closed-form" else " · network"


def _ends(frame: pd.DataFrame) -> pd.DataFrame:
    """Of every line over steps the fewest and the most."""
    groups = frame.groupby(["task", "split", "series", "model"])["steps"]
    least, most = groups.transform("min"), groups.transform("max")
    return frame[frame["steps"].isna() | (frame["steps"] == least) | (frame["steps"] == most)]


def _ordered(frame: pd.DataFrame, names: list[str]) -> list[str]:
    """Row names in the order of the methods, exact fields before networks, by steps."""
    rank = {name: k for k, name in enumerate(labels.METHODS)}
    keys = [
        (
            rank.get(row["method"], len(rank) - 1.5),
            row["model"] != "closed-form",
            row["series"],
            row["model"] if name.endswith(f" · {row['model']}") else "",
            row["steps"],
        )
        for name, row in zip(names, labels.as_dicts(frame), strict=True)
    ]
    return [name for _, name in sorted(zip(keys, names, strict=True), key=lambda pair: pair[0])]
