"""A figure of one's own: a measure against a cost, a panel a task, with chosen methods, width, font and legend."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import BY_NAME, axis_label
from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.figures import style
from flowlik_models.files import write_atomically
from flowlik_models.names import unknown

COSTS: Final = {
    "nfe": "nfe_mean",
    "work": "work",
    "forwards": "forward_equivalents",
    "ms": "ms_per_sample",
}
MEASURES: Final = {
    "error": "bpd_mae_all",
    "bias": "bpd_error",
    "bpd": "bpd",
    "spearman": "spearman",
    "mass": "mass",
    "frechet": "frechet",
}
WIDTHS: Final = {"single": style.COLUMN, "double": style.PAGE}
LEGENDS: Final = ("below", "right", "none")
FORMATS: Final = ("png", "pdf", "svg")
LARGEST_FONT: Final = 24.0
WIDEST: Final = 500.0
"""Millimetres."""


def inches(width: str) -> float:
    """`single`, `double` or millimetres (`85mm`, `85`) in inches.

    Raises:
        ValueError: anything else, or less than 30 or more than `WIDEST` mm.

    >>> round(inches("85mm"), 2)
    3.35
    """
    if width in WIDTHS:
        return WIDTHS[width]
    found = re.fullmatch(r"(\d{1,4}(?:\.\d+)?)\s*(?:mm)?", width.strip())
    if found is None or not 30 <= float(found[1]) <= WIDEST:
        raise ValueError(
            f"unknown width {width!r}: expected single, double or millimetres from 30 to 500, such as 85mm"
        )
    return float(found[1]) / 25.4


def figure_of(
    run_dir: Path | str,
    *,
    methods: Sequence[str] = (),
    tasks: Sequence[str] = (),
    measure: str = "error",
    cost: str = "nfe",
    width: str = "double",
    font_size: float = 8.0,
    legend: str = "below",
) -> Figure:
    """A measure of a run's methods on held-out data against a cost, a panel a task.

    Args:
        run_dir: folder of the run. methods: estimators or methods (`f2d2`, `ode-euler`); all by default. tasks: all by
            default. measure: a key of `MEASURES`. cost: a key of `COSTS`. width: `single` (a column), `double` (a
            page) or millimetres. font_size: points. legend: `below`, `right` or `none`.

    Returns:
        The matplotlib figure, for further changes and `savefig`.

    Raises:
        ValueError: an unknown method, task, measure, cost, width or legend, or a run without results of that kind.
    """
    for name, value, valid in (
        ("measure", measure, MEASURES),
        ("cost", cost, COSTS),
        ("legend", legend, LEGENDS),
    ):
        if value not in valid:
            raise ValueError(unknown(name, value, valid))
    if not 4 <= font_size <= LARGEST_FONT:
        raise ValueError(f"font size {font_size:g}: expected points from 4 to {LARGEST_FONT:g}")
    wide = inches(width)
    frame = frames.chosen(frames.load(Path(run_dir)), methods, tasks)
    frame = frames.with_times(frames.averaged(frames.usable(frame)))
    x, y = COSTS[cost], MEASURES[measure]
    shown = frame[np.isfinite(frame[y]) & (frame["method"] != "control")]
    first = {task: labels.splits(part)[0] for task, part in frame.groupby("task")}
    shown = shown[shown["split"] == shown["task"].map(first)]
    if shown.empty:
        of_these = f" of {', '.join(methods)} (controls are not drawn)" if methods else ""
        others = ", ".join(name for name in MEASURES if name != measure)
        raise ValueError(f"{run_dir} has no results{of_these} with {axis_label(y)}; other measures: {others}")
    with style.paper(), mpl.rc_context(_fonts(font_size)):
        return _panels(frame, shown, x, y, wide, font_size, legend)


def write_own(run_dir: Path, formats: Sequence[str], **options: Any) -> list[Path]:
    """Draw `figure_of` a run into `own-MEASURE-COST.FORMAT` in its folder; the paths.

    Raises:
        ValueError: an unknown format, or what `figure_of` refuses.
    """
    for name in formats:
        if name not in FORMATS:
            raise ValueError(unknown("format", name, FORMATS))
    figure = figure_of(run_dir, **options)
    stem = f"own-{options.get('measure', 'error')}-{options.get('cost', 'nfe')}"
    written = []
    with style.paper():
        for name in dict.fromkeys(formats):
            path = run_dir / f"{stem}.{name}"
            date: Any = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}[name]
            drawn = io.BytesIO()
            figure.savefig(drawn, format=name, dpi=300, metadata=date)
            write_atomically(path, drawn.getvalue())
            written.append(path)
    return written


def _fonts(size: float) -> Any:
    names = (
        "font.size",
        "axes.titlesize",
        "axes.labelsize",
        "xtick.labelsize",
        "ytick.labelsize",
        "legend.fontsize",
    )
    return dict.fromkeys(names, size) | {"xtick.labelsize": 0.9 * size, "ytick.labelsize": 0.9 * size}


def _panels(
    frame: pd.DataFrame, shown: pd.DataFrame, x: str, y: str, wide: float, size: float, legend: str
) -> Figure:
    names = list(dict.fromkeys(shown["task"]))
    columns = max(1, min(len(names), round(wide / 2.2)))
    rows = -(-len(names) // columns)
    figure = style.new_figure(wide, rows * max(0.75 * wide / columns, 1.7))
    handles: dict[str, Line2D] = {}
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False)).ravel()
    for ax, name in zip(axes, names, strict=False):
        part = shown[shown["task"] == name]
        handles = _panel(ax, part, x, y) | handles
        ax.set_title(name)
        ax.set_xlabel(axis_label(x, "\n"))
        ax.set_ylabel(axis_label(y).removesuffix(" ()"))
        ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    if legend == "right":
        figure.legend(handles=list(handles.values()), loc="outside right upper")
    elif legend == "below":
        style.legend_below(figure, handles.values())
    return figure


def _panel(ax: Axes, part: pd.DataFrame, x: str, y: str) -> dict[str, Line2D]:
    timed = part[part[x] > 0]
    if timed.empty:
        style.note(ax, "not timed" if BY_NAME[x].measured != "counted" else "not counted")
        return {}
    style.cost_axis(ax, timed[x])
    if y in ("bpd_mae_all", "frechet"):
        positive = timed[timed[y] > 0][y]
        ax.set_yscale("log")
        ax.set_ylim(0.7 * positive.min(), 1.4 * positive.max())
        style.error_axis(ax)
    handles = {}
    for series in style.series_of(timed):
        if style.draw_series(ax, series, x, y, _bars(series.frame, y)):
            handles[series.label] = style.handle(series)
    if x in ("forward_equivalents", "ms_per_sample"):
        handles |= style.impossible_times(ax, timed, x, y)
        style.not_timed(ax, len(part) - len(timed))
    return handles


def _bars(frame: pd.DataFrame, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    if f"{y}_lo" not in frame:
        return None
    value, low, high = (frame[f"{y}{end}"].to_numpy() for end in ("", "_lo", "_hi"))
    return np.clip(value - low, 0, 0.999 * np.abs(value)), np.clip(high - value, 0, None)
