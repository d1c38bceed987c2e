"""Training-free solvers side by side: solver x grid x coordinates at equal numbers of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import axis_label
from flowlik.report import labels
from flowlik.report.figures import style

FEWEST: Final = 4
"""Different rules (solver, grid, coordinates) a task needs for this figure."""

COLOURS: Final = {
    "euler": "#E69F00",
    "midpoint": "#56B4E9",
    "heun": "#009E73",
    "heun3": "#CC79A7",
    "rk4": "#0072B2",
}


def error_of_solvers(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean |error| of fixed-step rules against forwards: a column per grid, a row per model and split.

    Colour is the solver; whitened coordinates are solid, plain ones dashed, Richardson extrapolation dotted.
    """
    # probes would add their noise to the rule's error
    known = frame["estimator"].isin(["ode", "whitened-ode"]) & (frame["trace"] != "hutchinson")
    fixed = frame[known & frame["steps"].notna() & (frame["bpd_mae_all"] > 0)]
    fixed = fixed.assign(
        grid=[_grid(p) for p in fixed["params"]],
        richardson=[bool(p.get("richardson")) for p in fixed["params"]],
    )
    rules = fixed.groupby(["estimator", "solver", "grid", "richardson"]).ngroups if len(fixed) else 0
    if rules < FEWEST or fixed["estimator"].nunique() + fixed["grid"].nunique() < 3:
        return None
    rows = list(dict.fromkeys(zip(fixed["model"], fixed["split"], strict=True)))
    usual = ("uniform grid", "cosine grid", "logsnr grid", "stretched clock")
    grids = [grid for grid in usual if grid in set(fixed["grid"])]
    grids += sorted(set(fixed["grid"]) - set(grids))
    figure = style.new_figure(style.PAGE, 0.8 + 1.9 * len(rows))
    axes = np.asarray(figure.subplots(len(rows), len(grids), sharex=True, sharey="row", squeeze=False))
    handles: dict[str, Line2D] = {}
    for row, (line, (model, split)) in enumerate(zip(axes, rows, strict=True)):
        part = fixed[(fixed["model"] == model) & (fixed["split"] == split)]
        for ax, grid in zip(line, grids, strict=True):
            handles |= _panel(ax, part[part["grid"] == grid]) | handles
            ax.set_title(grid.replace(", ", ",\n") if row == 0 else "")
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(True, zorder=0)
        style.error_axis(line[0])
        words = model if split == "test" else f"{model}, {labels.split_title(split)}"
        line[0].set_ylabel(f"{axis_label('bpd_mae_all')}\n{words}")
        style.cost_axis(line[0], part["nfe_mean"])
        levels = style.controls_of(frame[frame["split"] == split]).set_index("estimator_label")["bpd_mae_all"]
        for ax in line:
            style.control_lines(ax, dict(levels), labels=ax is line[-1])
    axes[-1][len(grids) // 2].set_xlabel(axis_label("nfe_mean"))  # one for all: side by side they would meet
    figure.suptitle(f"{frame['task'].iloc[0]}: rules that need no training", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure


def _grid(params: dict[str, Any]) -> str:
    """Where the steps end: uniform in a stretched clock, or on a grid of t."""
    grid = str(params.get("grid") or "uniform")
    if params.get("clock") == "stretched":
        return "stretched clock" if grid == "uniform" else f"stretched clock, {grid}"
    return f"{grid} grid"


def _panel(ax: Axes, part: pd.DataFrame) -> dict[str, Line2D]:
    handles = {}
    ax.set_yscale("log")
    rules = list(part.groupby(["estimator", "solver", "richardson"], sort=True))
    for (key, of_rule), dodge in zip(rules, style.dodges(len(rules)), strict=True):
        name, solver, richardson = (str(key[0]), str(key[1]), bool(key[2]))
        best = of_rule.sort_values(["nfe_mean", "bpd_mae_all"])
        look: dict[str, Any] = {
            "color": COLOURS.get(solver, "#5E4FA2"),
            "linestyle": ":" if richardson else "-" if name == "whitened-ode" else "--",
            "marker": "D" if name == "whitened-ode" else "o",
            "markersize": 3.2,
        }
        ax.plot(dodge * best["nfe_mean"], best["bpd_mae_all"], **look)
        words = (
            f"{'whitened ' if name == 'whitened-ode' else ''}{solver}{', Richardson' if richardson else ''}"
        )
        handles[words] = Line2D([], [], label=words, **look)
    return handles
