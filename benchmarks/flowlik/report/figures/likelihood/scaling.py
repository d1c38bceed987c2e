"""Cost against dimension, batch, probes and steps, with the slope of each line that is straight."""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.report import labels, numbers
from flowlik.report.figures import style

FEWEST: Final = 3
STRAIGHT: Final = 0.1
"""A line is straight where no time is further than this share from that of the fit."""

SUITE_TASK: Final = "gaussian-"

SWEEPS: Final = {
    "dim": "dimensions",
    "batch": "items in the batch",
    "probes": "probes",
    "steps": "steps",
}

WORK: Final[dict[str, Any]] = {"linestyle": ":", "linewidth": 0.9}

_TITLES: Final = {"dim": "dimension", "batch": "batch", "probes": "probes", "steps": "steps"}
_PALETTE: Final = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#882255")


def cost_scaling(frame: pd.DataFrame) -> Figure | None:
    """CPU time of a call against four sizes; None unless the run sweeps dimension and batch.

    Batch: seconds of the whole call. Otherwise: seconds per sample. A line that is straight in the logarithms has the
    slope of its least-squares fit, a bent one has none. A cost proportional to the size has slope 1. Dotted, in the
    line's colour, stands its work: each counted forward and product for the time of one forward, which with one probe
    is two forwards an evaluation. Products in batches may cost less.
    """
    timed = _timed(frame)
    if timed.empty:
        return None
    sweeps = {
        "dim": _sweep(timed[timed["task"].str.startswith(SUITE_TASK)], "dim", ("row", "model")),
        "batch": _sweep(timed, "batch", ("task", "row", "model")),
        "probes": _sweep(timed, "probes", ("task", "wide", "model", "batch", "steps")),
        "steps": _sweep(timed, "steps", ("task", "series", "model", "batch")),
    }
    if not sweeps["dim"] or not sweeps["batch"]:
        return None
    figure = style.new_figure(style.PAGE, 6.4)
    for ax, (size, label) in zip(np.asarray(figure.subplots(2, 2)).ravel(), SWEEPS.items(), strict=True):
        _panel(ax, sweeps[size], size, label)
    title = "Cost against size: CPU seconds; dotted: the time of one forward for each forward and product"
    figure.suptitle(title, fontsize=9)
    return figure


def slope(x: np.ndarray, y: np.ndarray) -> float:
    """Least-squares slope of log y against log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def slope_words(x: np.ndarray, y: np.ndarray) -> str:
    """The slope of a straight line, `slope 1.00`; a bent one has none, `no slope`."""
    across, up = np.log(x), np.log(y)
    fit = np.polyfit(across, up, 1)
    if float(np.abs(up - np.polyval(fit, across)).max()) <= math.log1p(STRAIGHT):
        return f"slope {numbers.fixed(float(fit[0]), 2)}"
    return "no slope"


def _work(line: pd.DataFrame) -> np.ndarray:
    """What is counted over what was measured, both in forwards; NaN where either is not known."""
    return (line["work"].where(line["work"] > 0) / line["forward_equivalents"]).to_numpy()


def _timed(frame: pd.DataFrame) -> pd.DataFrame:
    batch = pd.Series([e.get("timing_batch", np.nan) for e in frame["extra"]], index=frame.index, dtype=float)
    timed = frame.assign(
        batch=batch,
        wide=[labels.without_probes(row) for row in labels.as_dicts(frame)],
        seconds=frame["cpu_s_median"],
        per_sample=frame["cpu_s_median"] / batch,
    )
    return timed[(timed["per_sample"] > 0) & (timed["method"] != "control")]


def _sweep(
    frame: pd.DataFrame, size: str, fixed: tuple[str, ...]
) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    found: list[tuple[dict[str, Any], pd.DataFrame]] = []
    if frame.empty:
        return found
    for _, part in frame[frame[size] > 0].groupby(list(fixed), dropna=False, sort=False):
        line = part.sort_values(size).drop_duplicates(size)
        if len(line) >= FEWEST:
            found.append((labels.as_dicts(line)[0], line))
    return found


def _panel(ax: Axes, lines: list[tuple[dict[str, Any], pd.DataFrame]], size: str, label: str) -> None:
    ax.set_title(f"against {_TITLES[size]}")
    if not lines:
        style.note(ax, "not swept in this run")
        return
    ax.set_yscale("log")
    handles = []
    for k, (row, line) in enumerate(lines[: len(_PALETTE)]):
        xs, ys = line[size].to_numpy(), line["seconds" if size == "batch" else "per_sample"].to_numpy()
        look: dict[str, Any] = {"color": _PALETTE[k], "marker": "os^vDPXh"[k], "markersize": 4}
        ax.plot(xs, ys, **look)
        ax.plot(xs, ys * _work(line), color=_PALETTE[k], **WORK)
        words = {"dim": row["row"], "batch": row["row"], "probes": row["wide"], "steps": row["series"]}[size]
        if size != "dim":
            words = f"{row['task']}: {words}"
        handles.append(Line2D([], [], label=style.wrapped(f"{words} ({slope_words(xs, ys)})"), **look))
    style.cost_axis(ax, np.concatenate([line[size].to_numpy() for _, line in lines]))
    style.error_axis(ax)
    ax.set_xlabel(label)
    ax.set_ylabel("CPU s per call" if size == "batch" else "CPU s per sample")
    ax.legend(handles=handles, loc="upper left", fontsize=6, bbox_to_anchor=(0, -0.2), borderaxespad=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)
