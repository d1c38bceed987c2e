"""What more training gives: bits/dim along a model's training, against processor hours."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import axis_label
from flowlik.report import labels, numbers
from flowlik.report.figures import style

LINES: Final = {"test": "-", "train": "--"}


def training_curves(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Bits/dim of a model's averages on its first items, and what the Gaussian control has.

    The bars are two standard errors of the change from the average before, item by item: all stand on the same items,
    whose own spread would hide what training brings.
    """
    shown = frame[[bool(extra.get("training")) for extra in frame["extra"]]]
    if shown.empty:
        return None
    figure = style.new_figure(style.PAGE * 0.7, 2.6)
    ax = figure.subplots()
    handles: dict[str, Line2D] = {}
    hours: list[float] = []
    for series in style.series_of(shown):
        for row in labels.as_dicts(series.frame):
            curve = row["extra"]["training"]
            look = {**series.style, "linestyle": LINES.get(row["split"], ":")}
            spent = np.asarray(curve["cpu_hours"], dtype=float)  # None: a card that does not tell
            bars = 2 * np.nan_to_num(np.asarray(curve["gain_se"], dtype=float))
            ax.errorbar(spent, curve["bpd"], bars, elinewidth=0.8, capthick=0.8, **look)
            label = f"{series.label} ({labels.split_title(row['split'])})"
            handles[label] = Line2D([], [], label=label, **look)
            hours += spent.tolist()
    style.cost_axis(ax, hours)
    ax.set_xlabel("processor hours of training")
    ax.set_ylabel(axis_label("bpd"))
    controls = style.controls_of(frame[frame["split"] == "test"]).set_index("estimator_label")["bpd"]
    if "control-gaussian" in controls:
        value = numbers.number(float(controls["control-gaussian"]), 3)
        ax.text(
            0.99,
            0.97,
            f"control-gaussian: {value}",
            transform=ax.transAxes,
            ha="right",
            va="top",
            fontsize=6.5,
            color=style.MUTED,
        )
    ax.grid(True, zorder=0)
    ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{frame['task'].iloc[0]}: bits/dim along training", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure
