"""The gap between the diffusion's bound and the likelihood of the same network's ODE, item by item."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from flowlik.report import items, labels, numbers
from flowlik.report.figures import style
from flowlik.report.numbers import from_extra

MOST_PANELS: Final = 4


def gap_between_bound_and_ode(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """The gap of each item in bits/dim with its error, against the ODE's log p, a panel for each number of draws."""
    shown = frame[from_extra(frame, "ode_gap").notna()].sort_values("nfe_mean", kind="stable")
    shown = shown.drop_duplicates(["brief", "model"], keep="last").tail(MOST_PANELS)
    found = [(row, items.items(run_dir, row["cell_id"])) for row in labels.as_dicts(shown)]
    found = [(row, stored) for row, stored in found if items.estimate_and_reference(stored)[0].size]
    if not found:
        return None
    task, split = frame["task"].iloc[0], labels.split_title(str(frame["split"].iloc[0]))
    figure, axes = style.panels(
        1,
        len(found),
        size=(2.2, 1.7),
        gaps=(0.25, 0.0),
        margins=(0.7, 0.1, 0.75, 0.5),
        title=f"{task}: bound of the diffusion less the ODE, {split}",
    )
    for ax, (row, stored) in zip(axes[0], found, strict=True):
        estimate, ode = (values[0] for values in items.estimate_and_reference(stored))
        unit = float(row["dim"]) * math.log(2.0)
        error = stored.get("stderr", np.zeros(len(ode))) / unit
        look = {
            "fmt": ".",
            "markersize": 3,
            "linewidth": 0.5,
            "color": labels.method_named(row["method"]).colour,
        }
        ax.errorbar(ode, (ode - estimate) / unit, yerr=2 * error, **look)
        ax.axhline(0.0, color="#8a8a8a", linewidth=0.9, zorder=1)
        gap, se = (numbers.number(row["extra"][name], 2) for name in ("ode_gap", "ode_gap_se"))
        ax.set_title(f"{style.panel_title(row)}\nmean {gap} ± {se}", fontsize=6.6, pad=3)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=6)
        ax.sharey(axes[0][0])
    figure.supxlabel(
        "log-density of the ODE (nats)", fontsize=8, y=0.06 / figure.get_figheight(), va="bottom"
    )
    axes[0][0].set_ylabel("gap (bits/dim)", fontsize=8)
    return figure
