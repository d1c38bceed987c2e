"""Probe noise: the standard error of the trace estimators against the derivative products they spend."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import BY_NAME, axis_label
from flowlik.report import labels
from flowlik.report.figures import style

FEWEST: Final = 3
"""Different choices of probes a task needs for this figure."""

_PALETTE: Final = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#882255"),
    *("#44AA99", "#A68A00", "#767676", "#5E4FA2"),
)

_MARKERS: Final = "osD^vPX*<>hd"


def noise_of_probes(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean standard error in nats against derivative products per sample, a line per choice, a panel per model.

    The grey lines fall like one over the square root of the products: along one of them nothing is gained.
    """
    shown = frame[(frame["stderr_mean"] > 0) & (frame["vjp_mean"] > 0) & (frame["trace"] == "hutchinson")]
    if shown.empty:
        return None
    shown = shown.assign(
        choice=[_words(p) for p in shown["params"]],
        nats=shown["stderr_mean"] * shown["dim"] * math.log(2.0),
        models=[f"{m}, {labels.split_title(s)}" for m, s in zip(shown["model"], shown["split"], strict=True)],
    )
    choices = list(dict.fromkeys(shown["choice"]))
    if len(choices) < FEWEST:
        return None
    models = list(dict.fromkeys(shown["models"]))
    figure = style.new_figure(style.PAGE if len(models) > 1 else style.COLUMN + 1.5, 2.8)
    axes = np.asarray(figure.subplots(1, len(models), sharey=True, squeeze=False))[0]
    handles: dict[str, Line2D] = {}
    apart = style.dodges(len(choices))
    for ax, model in zip(axes, models, strict=True):
        part = shown[shown["models"] == model]
        ax.set_yscale("log")
        for choice, line in part.groupby("choice", sort=False):
            k = choices.index(str(choice))
            look: dict[str, Any] = {
                "color": _PALETTE[k % len(_PALETTE)],
                "marker": _MARKERS[k % len(_MARKERS)],
                "markersize": 4,
            }
            line = line.sort_values("vjp_mean")
            ax.plot(apart[k] * line["vjp_mean"], line["nats"], **look)
            handles.setdefault(str(choice), Line2D([], [], label=str(choice), **look))
        _guides(ax, part)
        style.cost_axis(ax, part["vjp_mean"])
        ax.set_title(model)
        ax.set_xlabel(axis_label("vjp_mean"))
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, zorder=0)
    style.error_axis(axes[0])
    axes[0].set_ylabel(f"{BY_NAME['stderr_mean'].label} (nats)")
    figure.suptitle(f"{frame['task'].iloc[0]}: noise of the trace estimators", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure


def _words(params: dict[str, object]) -> str:
    """A choice of probes in words, what is default left out."""
    nodes = ["fresh at the nodes"] if params.get("divergence") == "quadrature" else ["fixed along the path"]
    if params.get("allocation") == "uniform":
        nodes.append("evenly")
    law = [str(params["noise"])] if params.get("noise") not in (None, "rademacher") else []
    plain = {"basis": "pixel", "control": "none"}
    law += [f"{key} {params[key]}" for key in plain if params.get(key) not in (None, plain[key])]
    return ", ".join([*(law or ["pixel Rademacher"]), *nodes])


def _guides(ax: Axes, part: pd.DataFrame) -> None:
    low, high = float(part["vjp_mean"].min()), float(part["vjp_mean"].max())
    if high <= low:
        return
    bottom, top = float(part["nats"].min()), float(part["nats"].max())
    start = bottom * math.sqrt(high / low) / 4
    while start < 4 * top * math.sqrt(high / low):
        ax.plot([low, high], [start, start * math.sqrt(low / high)], color="#e3e3e3", linewidth=0.8, zorder=0)
        start *= 2
    ax.set_ylim(bottom / 1.3, top * 1.3)
