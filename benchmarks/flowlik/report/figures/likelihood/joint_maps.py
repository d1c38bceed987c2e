"""Joint maps side by side: what each way of training one costs in bias, per-sample error and rank correlation."""

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

FEWEST: Final = 3
"""Different joint maps a task needs for this figure."""

LABELS: Final = {name: axis_label(name) for name in ("bpd_error", "bpd_mae_all")} | {
    "unranked": f"1 − {axis_label('spearman')}"
}


def joint_maps(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Signed error, 1 - Spearman and mean |error| against steps, a line per joint map, a row per split."""
    shown = frame[(frame["estimator"] == "f2d2") & (frame["bpd_mae_all"] > 0)]
    models = sorted(set(shown["model"]))
    if len(models) < FEWEST:
        return None
    splits = labels.splits(shown)
    ranked = bool(shown["spearman"].notna().any())
    columns = (
        "bpd_error",
        *(("unranked",) if ranked else ()),
        "bpd_mae_all",
    )  # the controls' names stand on the right
    figure = style.new_figure(style.PAGE, 0.5 + 2.2 * len(splits))
    axes = np.asarray(figure.subplots(len(splits), len(columns), squeeze=False))
    looks = style.looks_of_models(models, markersize=4)
    for row, split in zip(axes, splits, strict=True):
        part = shown[shown["split"] == split]
        for ax, column in zip(row, columns, strict=True):
            _panel(ax, part.assign(unranked=1 - part["spearman"]), column, looks)
        controls = style.controls_of(frame[frame["split"] == split])
        levels = dict(controls.set_index("estimator_label")["bpd_mae_all"])
        highest = max([*levels.values(), row[-1].get_ylim()[1]])
        row[-1].set_ylim(top=1.2 * highest)
        style.control_lines(row[-1], levels, labels=True)
        if len(splits) > 1:
            row[0].set_ylabel(f"{LABELS['bpd_error']}\n{labels.split_title(split)}")
    for ax in axes[-1]:
        ax.set_xlabel("steps (NFE)")
    figure.suptitle(f"{frame['task'].iloc[0]}: joint flow maps", fontsize=9)
    style.legend_below(figure, [Line2D([], [], label=model, **look) for model, look in looks.items()])
    return figure


def _panel(ax: Axes, part: pd.DataFrame, column: str, looks: dict[str, dict[str, Any]]) -> None:
    """One measure against steps."""
    ax.set_ylabel(LABELS[column])
    if column == "bpd_error":
        ax.axhline(0, color="#8a8a8a", linewidth=0.8, zorder=1)
        if float(part[column].abs().max()) > 0.5:
            style.symlog_axis(ax, 0.1)
    else:
        ax.set_yscale("log")
    apart = dict(zip(looks, style.dodges(len(looks)), strict=True))
    for model, line in part.groupby("model"):
        line = line.sort_values("nfe_mean")
        _with_bars(ax, apart[str(model)] * line["nfe_mean"], line, column, looks[str(model)])
    if column != "bpd_error":
        style.error_axis(ax)
    style.cost_axis(ax, part["nfe_mean"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)


def _with_bars(ax: Axes, at: pd.Series[float], line: pd.DataFrame, column: str, look: dict[str, Any]) -> None:
    bars = None
    if column != "unranked":
        value = line[column].to_numpy()
        low, high = line[f"{column}_lo"].to_numpy(), line[f"{column}_hi"].to_numpy()
        bars = np.clip(np.stack((value - low, high - value)), 0, None)
    ax.errorbar(at, line[column], bars, linewidth=1.1, elinewidth=0.8, **look)
