"""One picture of a whole run: per-sample error of every method on every task."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from flowlik.records.columns import axis_label
from flowlik.report import labels, numbers
from flowlik.report.figures import style

MOST_ROWS: Final = 48


def error_overview(frame: pd.DataFrame) -> Figure | None:
    """Mean |error| in bits/dim (colour: decades) of methods and steps (rows) on tasks and splits (columns).

    A row holds one method on exact fields or on networks, by name where a task has several; of several exact traces
    the one of most items; of many steps the fewest and the most are shown. None where fewer than two tasks or splits
    have errors.
    """
    shown = _ends(frame[np.isfinite(frame["bpd_mae_all"])]).sort_values("n_items", kind="stable")
    if shown.empty or len(shown.groupby(["task", "split"])) < 2:
        return None
    names = _rows(shown)
    rows = list(dict.fromkeys(_ordered(shown, names)))[:MOST_ROWS]
    columns = [
        (t, s) for t in sorted(shown["task"].unique()) for s in labels.splits(shown[shown["task"] == t])
    ]
    several = {t: sum(c[0] == t for c in columns) > 1 for t, _ in columns}
    values = np.full((len(rows), len(columns)), np.nan)
    for name, task, split, error in zip(
        names, shown["task"], shown["split"], shown["bpd_mae_all"], strict=True
    ):
        if name in rows:
            values[rows.index(name), columns.index((task, split))] = error
    figure = style.new_figure(style.PAGE, 1.2 + 0.2 * len(rows))
    ax = figure.subplots()
    exponents = np.log10(np.where(values > 0, values, np.nan))
    exponents = np.where(values == 0, -4.0, exponents)
    sns.heatmap(
        exponents,
        ax=ax,
        annot=[[_short(v) for v in line] for line in values],
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
        xticklabels=[f"{t}, {s}" if several[t] else t for t, s in columns],
        yticklabels=[style.shorten(r, 76) for r in rows],
    )
    bar = ax.collections[0].colorbar
    if bar is not None:
        bar.ax.set_yticklabels(["1e-4", "1e-3", "0.01", "0.1", "1", "10"], fontsize=6.5)
    methods = dict(zip(names, shown["method"], strict=True))
    for k in range(1, len(rows)):
        if methods[rows[k]] != methods[rows[k - 1]]:
            ax.axhline(k, color="white", linewidth=3.5)
    ax.tick_params(length=0, labelsize=6.6)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=28, ha="right", rotation_mode="anchor")
    figure.suptitle("Per-sample error of every method on every task", fontsize=9)
    return figure


def _rows(frame: pd.DataFrame) -> list[str]:
    """Row names: method, steps and parameters (an exact trace is the same by any way), and the kind of model.

    Networks are named where a task has several for one method.
    """
    rows = labels.as_dicts(frame)
    names = [f"{row['brief']}{_kind(row)}" for row in rows]
    trained = [row["method"] != "control" and row["model"] != "closed-form" for row in rows]
    models: dict[tuple[str, str, str], set[str]] = {}
    for name, row in zip(names, rows, strict=True):
        models.setdefault((name, row["task"], row["split"]), set()).add(row["model"])
    several = {name for (name, _, _), found in models.items() if len(found) > 1}
    return [
        f"{row['brief']} · {row['model']}" if network and name in several else name
        for name, row, network in zip(names, rows, trained, strict=True)
    ]


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
