"""What a fast likelihood is for: one figure per use, the answer against network evaluations, a line per method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import BY_NAME
from flowlik.report import numbers
from flowlik.report.figures import style
from flowlik.report.figures.grouping import in_panels

FAMILIES: Final = {
    "rescaled": "rescalings of the model",
    "displaced": "displaced mixtures",
    "rounded": "copies with noisy weights",
}

WIDE: Final = 10.0
"""Errors beyond this have an axis that is linear inside 1 and logarithmic outside."""

Panel = tuple[str, pd.Series, pd.Series | None, pd.Series | None, float | None]
"""Label of the axis, values, lower and upper ends of their intervals, and the value that is right."""


def model_comparison(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Kendall's tau of estimated with exact likelihoods of the variants of a model, a panel per family of them."""
    shown = frame[[bool(extra.get("comparison")) for extra in frame["extra"]]]
    panels: list[Panel] = []
    for family, title in FAMILIES.items():
        tau = [numbers.from_extra(shown, "comparison", family, f"kendall{end}") for end in ("", "_lo", "_hi")]
        if tau[0].notna().any():
            spread = numbers.from_extra(shown, "comparison", family, "spread")
            words = f"{title}\n{numbers.number(spread.min(), 2)} to {numbers.number(spread.max(), 2)} bits/dim apart"
            panels.append((words, tau[0], tau[1], tau[2], 1.0))
    return _drawn(shown, panels, "variants of a model in order", "Kendall's tau", titles=True)


def outlier_detection(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """AUROC of the likelihood against each out-of-distribution set."""
    shown = frame[[bool(extra.get("outliers")) for extra in frame["extra"]]]
    sets = dict.fromkeys(name for extra in shown["extra"] for name in extra["outliers"])
    panels: list[Panel] = []
    for name in sets:
        ends = [numbers.from_extra(shown, "outliers", name, f"auroc{end}") for end in ("", "_lo", "_hi")]
        if ends[0].notna().any():
            panels.append((f"{name} images", ends[0], ends[1], ends[2], 1.0))
    return _drawn(shown, panels, "test images against other data", "AUROC of log p", titles=True)


def rare_events(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Effective sample size, error of a rare probability and of an odds ratio, and mass, under estimated weights."""
    shown = frame[[bool(extra.get("importance")) for extra in frame["extra"]]]

    def of(name: str) -> pd.Series:
        return numbers.from_extra(shown, "importance", name)

    exact, error = of("ess_exact").max(), of("log_odds_se").max()
    noise = pd.Series(1.96 * error, index=shown.index)
    panels: list[Panel] = [
        ("effective sample size (share)", of("ess"), None, None, exact),
        ("log of mass", np.log(of("mass")), None, None, 0.0),
        ("error of log P(A), P(A) = 0.001", of("log_p_error"), None, None, 0.0),
        ("error of log odds of A and B", of("log_odds_error"), -noise, noise, 0.0),
    ]
    return _drawn(shown, panels, "rare events by importance sampling", bands=True)


def gradients(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Cosine and relative error of the estimate's gradient in x, and the cosine in the weights."""
    shown = frame[[bool(extra.get("gradient")) for extra in frame["extra"]]]

    def of(name: str) -> pd.Series:
        return numbers.from_extra(shown, "gradient", name)

    panels: list[Panel] = [
        ("cosine with the exact score", of("cosine"), of("cosine_p05"), of("cosine"), 1.0),
        ("relative error of the score", of("error"), None, None, 0.0),
        ("cosine, gradient in the weights", of("weight_cosine"), None, None, 1.0),
    ]
    return _drawn(shown, panels, "gradient of the estimate")


def _drawn(
    shown: pd.DataFrame,
    panels: Sequence[Panel],
    title: str,
    ylabel: str = "",
    *,
    titles: bool = False,
    bands: bool = False,
) -> Figure | None:
    """The panels; their words stand above them (`titles`) or along their axes; an interval as bars or as one band."""
    panels = [panel for panel in panels if panel[1].notna().any()]
    if shown.empty or not panels:
        return None
    columns = min(len(panels), 3 if len(panels) != 4 else 2)
    rows = -(-len(panels) // columns)
    parts = in_panels(shown)
    figure = style.new_figure(style.PAGE, 0.4 + 2.1 * rows * len(parts))
    axes = np.asarray(figure.subplots(rows * len(parts), columns, squeeze=False)).ravel()
    handles: dict[str, Line2D] = {}
    for ax in axes:
        ax.set_visible(False)
    places = [(k + rows * columns * of, panel) for of in range(len(parts)) for k, panel in enumerate(panels)]
    for k, (words, value, low, high, right) in places:
        ax, (group, part) = axes[k], parts[k // (rows * columns)]
        ax.set_visible(True)
        ends = (None, None) if bands else (low, high)
        handles |= _panel(ax, part, shown, value, *ends) | handles
        if bands and low is not None and high is not None:
            ax.axhspan(float(low.min()), float(high.max()), color="#e6e6e6", zorder=0)
        if np.nanmax(np.abs(value)) > WIDE:
            style.symlog_axis(ax, 1.0)
        if right == 1.0:
            style.up_to_one(ax)
        if right is not None:
            ax.axhline(right, color=style.MUTED, linewidth=0.9, linestyle="--", zorder=1)
        ax.set_title(f"{group}: {words}" if titles and group else words if titles else group)
        ax.set_ylabel(words if not titles else ylabel if k % columns == 0 else "")
        ax.set_xlabel(BY_NAME["nfe_mean"].label)
    figure.suptitle(f"{shown['task'].iloc[0]}: {title}", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure


def _panel(
    ax: Axes,
    frame: pd.DataFrame,
    among: pd.DataFrame,
    value: pd.Series,
    low: pd.Series | None,
    high: pd.Series | None,
) -> dict[str, Line2D]:
    style.cost_axis(ax, among["nfe_mean"])
    handles: dict[str, Line2D] = {}
    frame = frame.assign(value=value, low=value if low is None else low, high=value if high is None else high)
    lines = style.series_of(frame, among)
    for series, dodge in zip(lines, style.dodges(len(lines)), strict=True):
        part = series.frame
        bars: Any = (
            (part["value"] - part["low"]).to_numpy().clip(0.0),
            (part["high"] - part["value"]).to_numpy().clip(0.0),
        )
        if style.draw_series(ax, series, "nfe_mean", "value", bars, dodge=dodge):
            handles[series.label] = style.handle(series)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)
    return handles
