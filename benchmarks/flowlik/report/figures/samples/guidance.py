"""Self-guidance: what the samples gain and lose over step sizes, beside the controls and the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import axis_label
from flowlik.report import samples
from flowlik.report.figures import style
from flowlik.report.labels import as_dicts, distance_name

DIRECTIONS: Final = {"likelihood": "#0072B2", "prior": "#D55E00", "random": "#767676"}

WORDS: Final = {
    "likelihood": "towards higher likelihood",
    "prior": "noise shrunk (control)",
    "random": "as far, anywhere (control)",
}

LEVELS: Final[dict[str, tuple[str, Any]]] = {"unguided": ("#56B4E9", "--"), "teacher": ("#000000", "-.")}


def self_guidance(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Distance, precision and recall, and bits/dim of guided samples against the step size; a row per model.

    Bands are 95 % intervals of what is not guided: the same map, and the teacher in its most steps.
    """
    guided = frame[(frame["estimator"] == "self-guidance") & (frame["n_samples"] > 0)]
    if guided.empty:
        return None
    frame = with_intervals(frame)
    guided = frame.loc[guided.index]
    steps = guided["steps"].mode().iloc[0]
    guided = guided[guided["steps"] == steps]
    panels = [name for name in ("distance", "overlap", "samples_bpd") if _has(guided, name)]
    models = list(dict.fromkeys(guided["model"]))
    figure = style.new_figure(style.PAGE, 0.4 + 2.2 * len(models))
    axes = np.asarray(figure.subplots(len(models), len(panels), sharex=True, squeeze=False))
    for line, model in zip(axes, models, strict=True):
        of_model = guided[guided["model"] == model]
        levels = _levels(frame, str(model), float(steps))
        for ax, name in zip(line, panels, strict=True):
            _panel(ax, of_model, levels, name)
        line[0].set_title(str(model), loc="left")
    for ax in axes[-1]:
        ax.set_xlabel("step size")
    words = f"{steps:.0f}-step samples from guided noise"
    figure.suptitle(f"{frame['task'].iloc[0]}: {words}", fontsize=9)
    style.legend_below(figure, _legend(guided, frame))
    return figure


def with_intervals(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with what `samples_measured` adds and the guidance's `direction`, `updates` and `step_size`."""
    found = samples.samples_measured(frame)
    for name in ("direction", "updates", "step_size"):
        found[name] = [params.get(name) for params in frame["params"]]
    return found


def _has(frame: pd.DataFrame, name: str) -> bool:
    return bool(frame["precision" if name == "overlap" else name].notna().any())


def _levels(frame: pd.DataFrame, model: str, steps: float) -> dict[str, dict[str, Any]]:
    """Rows that guidance is held against: the same map as it is, and the teacher in its most steps."""
    same = frame[(frame["estimator"] == "f2d2") & (frame["model"] == model) & (frame["steps"] == steps)]
    teacher = frame[frame["estimator"] == "ode"].sort_values("nfe_mean")
    rows = {"unguided": same.tail(1), "teacher": teacher.tail(1)}
    return {name: as_dicts(row)[0] for name, row in rows.items() if len(row)}


def _panel(ax: Axes, of_model: pd.DataFrame, levels: dict[str, dict[str, Any]], name: str) -> None:
    columns = ("precision", "recall") if name == "overlap" else (name,)
    for column in columns:
        groups = list(of_model.groupby(["direction", "updates"], sort=False))
        for (names, line), dodge in zip(groups, style.dodges(len(groups)), strict=True):
            direction, updates = (str(name) for name in names)
            line = line.sort_values("step_size")
            look = _look(direction, float(updates), hollow=column == "recall")
            bars = None
            if f"{column}_lo" in line:
                bars = np.abs(
                    np.stack([line[column] - line[f"{column}_lo"], line[f"{column}_hi"] - line[column]])
                )
            ax.errorbar(
                dodge * line["step_size"],
                line[column],
                yerr=bars,
                elinewidth=0.8,
                capthick=0.8,
                zorder=3,
                **look,
            )
        for level, row in levels.items():
            colour, dashes = LEVELS[level]
            ax.axhline(row[column], color=colour, linestyle=dashes, linewidth=1.0, zorder=1)
            if f"{column}_lo" in row and np.isfinite(row[f"{column}_lo"]):
                ax.axhspan(row[f"{column}_lo"], row[f"{column}_hi"], color=colour, alpha=0.12, linewidth=0)
    extractor = str(of_model["extractor"].iloc[0])
    labels = {
        "distance": distance_name(extractor) if extractor else axis_label("energy_distance"),
        "overlap": "precision (filled), recall (hollow)",
        "samples_bpd": axis_label("samples_bpd"),
    }
    ax.set_ylabel(labels[name])
    if name == "overlap":
        style.within_limits(ax, "precision")
    ax.set_xscale("log")
    sizes = sorted(set(of_model["step_size"]))
    ax.set_xticks(sizes, [style.plain(size) for size in sizes])
    ax.minorticks_off()
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)


def _look(direction: str, updates: float, *, hollow: bool = False) -> dict[str, Any]:
    colour = DIRECTIONS.get(direction, "#5E4FA2")
    return {
        "color": colour,
        "marker": "o" if updates == 1 else "D",
        "linestyle": "-" if updates == 1 else ":",
        "markerfacecolor": "white" if hollow else colour,
        "markersize": 4,
    }


def _legend(guided: pd.DataFrame, frame: pd.DataFrame) -> list[Line2D]:
    found = []
    for direction, updates in dict.fromkeys(zip(guided["direction"], guided["updates"], strict=True)):
        words = WORDS.get(direction, direction) + (f", {updates:.0f} updates" if updates > 1 else "")
        found.append(Line2D([], [], label=words, **_look(str(direction), float(updates))))
    most = frame.loc[frame["estimator"] == "ode", "nfe_mean"].max()
    words_of = {"unguided": "the same map, not guided"}
    if np.isfinite(most):
        words_of["teacher"] = f"exact field or teacher, {most:.0f} evaluations"
    for name, label in words_of.items():
        colour, dashes = LEVELS[name]
        found.append(Line2D([], [], color=colour, linestyle=dashes, linewidth=1.0, label=label))
    return found
