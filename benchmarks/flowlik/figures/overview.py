"""One picture of a whole run: per-sample error of every method on every task."""

from __future__ import annotations

from typing import Final

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from flowlik import view
from flowlik.figures import style

MOST_ROWS: Final = 26


def error_overview(frame: pd.DataFrame) -> Figure | None:
    """Mean |error| in bits/dim (colour: decades) of methods and steps (rows) on tasks and splits (columns).

    Models of one method are joined by their best value; None where fewer than two tasks or splits have errors.
    """
    shown = frame[np.isfinite(frame["bpd_mae"])]
    if shown.empty or len(shown.groupby(["task", "split"])) < 2:
        return None
    rows = list(dict.fromkeys(_rows(shown)))[:MOST_ROWS]
    columns = [(t, s) for t in sorted(shown["task"].unique()) for s in view.splits(shown[shown["task"] == t])]
    several = {t: sum(c[0] == t for c in columns) > 1 for t, _ in columns}
    values = np.full((len(rows), len(columns)), np.nan)
    for name, task, split, error in zip(
        _rows(shown), shown["task"], shown["split"], shown["bpd_mae"], strict=True
    ):
        if name in rows:
            i, j = rows.index(name), columns.index((task, split))
            values[i, j] = np.nanmin([values[i, j], error])
    figure = style.new_figure(style.PAGE, 1.2 + 0.2 * len(rows))
    ax = figure.subplots()
    exponents = np.log10(np.where(values > 0, values, np.nan))
    exponents = np.where(values == 0, -4.0, exponents)
    sns.heatmap(
        exponents,
        ax=ax,
        annot=[[view.number(v, 2) if np.isfinite(v) else "" for v in line] for line in values],
        fmt="",
        cmap="rocket_r",
        vmin=-4,
        vmax=1,
        linewidths=0.8,
        annot_kws={"fontsize": 6.3},
        cbar_kws={"label": "mean |error| (bits/dim)", "ticks": [-4, -3, -2, -1, 0, 1], "extend": "both"},
        xticklabels=[f"{t}, {s}" if several[t] else t for t, s in columns],
        yticklabels=[style.shorten(r, 46) for r in rows],
    )
    bar = ax.collections[0].colorbar
    if bar is not None:
        bar.ax.set_yticklabels(["1e-4", "1e-3", "0.01", "0.1", "1", "10"], fontsize=6.5)
    methods = dict(zip(_rows(shown), shown["method"], strict=True))
    for k in range(1, len(rows)):
        if methods[rows[k]] != methods[rows[k - 1]]:
            ax.axhline(k, color="white", linewidth=3.5)
    ax.tick_params(length=0, labelsize=6.6)
    ax.set_xticklabels(ax.get_xticklabels(), rotation=28, ha="right", rotation_mode="anchor")
    figure.suptitle("Per-sample error of every method on every task", fontsize=9)
    return figure


def _rows(frame: pd.DataFrame) -> list[str]:
    return [str(row) for row in frame["row"]]
