"""Fréchet distance of few-step samples against the number of steps."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.report import samples
from flowlik.report.figures import style
from flowlik.report.figures.grouping import in_panels, lines
from flowlik.report.labels import distance_name

MANY_LINES: Final = 6
"""Beyond it the figure is as wide as a page."""


def frechet_against_steps(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Fréchet distance against sampling steps, a panel per extractor; adaptive samplers are horizontal lines."""
    # guided samplers have a figure of their own: a line per step size would bury the maps themselves
    shown = frame[(frame["frechet"] > 0) & (frame["estimator"] != "self-guidance")]
    if shown.empty:
        return None
    shown = samples.one_a_sampler(shown)
    extractors = sorted(shown["extractor"].unique())
    parts = in_panels(shown)
    many = lines(shown) > MANY_LINES
    width = style.COLUMN + 1.2 if len(extractors) == 1 and not many else style.PAGE
    figure = style.new_figure(width, 0.4 + 2.2 * len(parts))
    axes = np.asarray(figure.subplots(len(parts), len(extractors), squeeze=False))
    handles: dict[str, Line2D] = {}
    for ax, ((words, group), extractor) in zip(axes.ravel(), product(parts, extractors), strict=True):
        part = group[group["extractor"] == extractor]
        ax.set_title(words, loc="left")
        if part.empty:
            style.note(ax, "not measured")
            continue
        values = part["frechet"].to_numpy()
        spread = 2 * part["frechet_se"].fillna(0).to_numpy()
        values = np.concatenate([values + spread, np.maximum(values - spread, values / 2)])
        ax.set_yscale("log")
        pad = max((values.max() / values.min()) ** 0.08, 1.25)
        ax.set_ylim(values.min() / pad, values.max() * pad)
        style.cost_axis(ax, part["steps"] if part["steps"].notna().any() else [1, 8])
        style.error_axis(ax)
        drawn = style.series_of(part, shown)
        for series, dodge in zip(drawn, style.dodges(len(drawn)), strict=True):
            bars = series.frame["frechet_se"].fillna(0).to_numpy()
            down = np.minimum(2 * bars, 0.999 * series.frame["frechet"].to_numpy())
            if style.draw_series(ax, series, "steps", "frechet", (down, 2 * bars), dodge=dodge):
                handles.setdefault(series.label, style.handle(series))
            adaptive = series.frame[series.frame["steps"].isna()]
            if len(adaptive):
                colour = series.style["color"]
                finest = adaptive.sort_values("nfe_mean").iloc[-1]
                ax.axhline(finest["frechet"], color=colour, linewidth=1.0, linestyle="-.", zorder=1)
                label = f"{series.label} (NFE {finest['nfe_mean']:.0f})"
                handles.setdefault(label, Line2D([], [], color=colour, linestyle="-.", label=label))
        controls = style.controls_of(shown[shown["extractor"] == extractor]).set_index("estimator_label")[
            "frechet"
        ]
        style.control_lines(ax, dict(controls), labels=True)
        name = distance_name(extractor)
        ax.set_ylabel(f"{name}\n({style.shorten(extractor, 40)})" if extractor else name)
        ax.set_xlabel("steps of the sampler")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, zorder=0)
    figure.suptitle(f"{frame['task'].iloc[0]}: samples of the same maps", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure
