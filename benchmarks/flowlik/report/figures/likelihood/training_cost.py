"""What the training of a few-step likelihood costs, against its error."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import axis_label
from flowlik.report import numbers
from flowlik.report.figures import style

FEWEST: Final = 3
"""Models whose cards tell their training that a task needs for this figure."""

MOST_EVALUATIONS: Final = 8


def error_against_training(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean |error| of a model by one evaluation, and by the best of at most eight, against its training's time."""
    shown = frame.assign(
        trained=numbers.from_extra(frame, "train_cpu_seconds"),
        parameters=numbers.from_extra(frame, "parameters"),
    )
    split = "test" if (shown["split"] == "test").any() else shown["split"].iloc[0]
    few = (shown["nfe_mean"] <= MOST_EVALUATIONS) & ~(shown["vjp_mean"] + shown["jvp_mean"] > 0)
    shown = shown[few & (shown["split"] == split) & (shown["trained"] > 0) & (shown["bpd_mae_all"] > 0)]
    if shown["model"].nunique() < FEWEST:
        return None
    figure = style.new_figure(style.PAGE * 0.7, 3.0)
    ax = figure.subplots()
    ax.set_yscale("log")
    looks = style.looks_of_models(sorted(set(shown["model"])), markersize=5)
    handles = []
    for model, look in looks.items():
        rows = shown[shown["model"] == model]
        one, best = (rows.sort_values(by).iloc[0] for by in ("nfe_mean", "bpd_mae_all"))
        minutes, error = one["trained"] / 60, one["bpd_mae_all"]
        ends = error - one["bpd_mae_all_lo"], one["bpd_mae_all_hi"] - error
        ax.plot([minutes] * 2, [error, best["bpd_mae_all"]], linewidth=1.0, color=look["color"])
        ax.errorbar(minutes, error, np.clip(ends, 0, None)[:, None], elinewidth=0.8, **look)
        if best["nfe_mean"] > one["nfe_mean"]:
            ax.plot(minutes, best["bpd_mae_all"], markerfacecolor="white", linestyle="", **look)
        size = f" ({one['parameters'] / 1000:,.0f} k)" if one["parameters"] > 0 else ""
        handles.append(Line2D([], [], linestyle="", label=f"{model}{size}", **look))
    style.cost_axis(ax, shown["trained"] / 60)
    style.error_axis(ax)
    ax.set_xlabel("processor minutes of training, trajectories included")
    ax.set_ylabel(axis_label("bpd_mae_all"))
    ax.grid(True, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{frame['task'].iloc[0]}: error against training time", fontsize=9)
    style.legend_below(figure, handles)
    return figure
