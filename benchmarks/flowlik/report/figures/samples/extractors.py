"""How far feature networks agree on which samples are nearer to real ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy.stats import spearmanr

from flowlik.report.figures import style
from flowlik.report.labels import distance_name

FEWEST: Final = 3
"""Samplers of which an order is told."""


def extractor_agreement(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """The distance of every sampler in the record's own features (across) and in each further network (up)."""
    shown = in_further_features(frame)
    if shown.empty:
        return None
    names = list(dict.fromkeys(shown["further"]))
    figure = style.new_figure(style.COLUMN + 1.2 if len(names) == 1 else style.PAGE, 2.8)
    axes = np.atleast_1d(np.asarray(figure.subplots(1, len(names))))
    handles: dict[str, Line2D] = {}
    for ax, name in zip(axes, names, strict=True):
        part = shown[shown["further"] == name]
        for series in style.series_of(part):
            _points(ax, series)
            handles.setdefault(series.label, style.handle(series))
        _axes(ax, part)
        ax.set_title(agreement(part), loc="left", fontsize=8)
    figure.suptitle(f"{frame['task'].iloc[0]}: samples in several feature networks", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure


def in_further_features(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each sampler and each further network: `further` its name, `distance`, `distance_se` in it."""
    rows: list[dict[str, Any]] = []
    for index, row in frame.iterrows():
        found = row["extra"].get("in_features") if isinstance(row["extra"], dict) else None
        if not isinstance(found, dict) or not row["frechet"] > 0:
            continue
        for columns in found.values():
            values = {"distance": columns["frechet"], "distance_se": columns["frechet_se"]}
            rows.append({"index": index, "further": columns["extractor"], **values})
    if not rows:
        return frame.iloc[:0].assign(further="", distance=np.nan, distance_se=np.nan)
    return pd.DataFrame(rows).join(frame, on="index").reset_index(drop=True)


def agreement(part: pd.DataFrame) -> str:
    """The rank correlation of the two distances over samplers, in words."""
    if len(part) < FEWEST:
        return f"{len(part)} samplers"
    rho = float(spearmanr(part["frechet"], part["distance"]).statistic)
    return f"Spearman ρ {rho:.2f}, {len(part)} samplers" if math.isfinite(rho) else f"{len(part)} samplers"


def _points(ax: Axes, series: style.Series) -> None:
    look = {
        key: value for key, value in series.style.items() if key in ("color", "marker", "markerfacecolor")
    }
    own, other = (series.frame[name].to_numpy() for name in ("frechet", "distance"))
    bars = [1.96 * series.frame[name].fillna(0).to_numpy() for name in ("frechet_se", "distance_se")]
    down = [np.minimum(bar, 0.9 * values) for bar, values in zip(bars, (own, other), strict=True)]
    ax.errorbar(
        own,
        other,
        xerr=(down[0], bars[0]),
        yerr=(down[1], bars[1]),
        linestyle="none",
        markersize=4,
        elinewidth=0.8,
        zorder=3,
        **look,
    )


def _axes(ax: Axes, part: pd.DataFrame) -> None:
    own = next(iter(part["extractor"]))
    ax.set_xlabel(f"{distance_name(own)} ({style.shorten(own, 30)})")
    ax.set_ylabel(f"{distance_name(part['further'].iloc[0])}\n({style.shorten(part['further'].iloc[0], 30)})")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)
