"""Few-step models of every kind side by side: their likelihoods against cost, and what their samples are worth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flowlik.records.columns import BY_NAME, axis_label
from flowlik.report import frame as frames
from flowlik.report import labels, numbers, samples
from flowlik.report.figures import style
from flowlik.report.figures.likelihood.accuracy import COSTS, panels
from flowlik.report.labels import distance_name

MARKERS: Final = "os^DvPX*<>hd"
MOST_LINES: Final = 8
"""More lines than this have rows of panels by the kind of model."""

KINDS_OF_MODEL: Final = {"pi-flow": "policy flows", "generator": "one-step generators"}
"""By method; all others are flow maps."""

OTHER_WAYS: Final = ("jacobian full", "route fake-flow", "route head")
"""An estimator's further ways of reading a model: dashed and hollow."""

ABLATION: Final = {
    "realuid-data-free": "without\nreal data",
    "realuid": "with\nreal data",
    "realuid-fine-tuned": "fine-tuned",
}
"""What the one-step generators of an ablation differ in, by model."""


@dataclass(frozen=True)
class _Line:
    """One way to a few-step likelihood: estimator and model, over numbers of segments or steps."""

    label: str
    frame: pd.DataFrame
    look: dict[str, Any]


def error_of_few_steps(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean |error| with its 95 % interval against three costs, a line per model and estimator; a row per split that was
    timed, one panel for each of the others."""
    frame = frames.with_times(samples.answered(frame))
    few = samples.few_steps(frame)
    if not (few["bpd_mae_all"] > 0).any():
        return None
    judged = frame[(frame["bpd_mae_all"] > 0) & (frame["nfe_mean"] > 0)]
    # the exact posterior as policy is a check of the substeps, not a model
    exact = judged[judged["estimator"].isin(["ode", "whitened-ode"])]
    lines = _lines(judged.loc[judged.index.isin(few.index)])
    rows = [(words, group, row) for words, group in _groups(lines) for row in _rows(group)]
    several = len({split for _, _, row in rows for split, _ in row}) > 1
    figure = style.new_figure(style.PAGE, 0.3 + 2.3 * len(rows))
    widest = max(len(row) for _, _, row in rows)
    axes = np.asarray(figure.subplots(len(rows), widest, sharey="row", squeeze=False))
    handles: dict[str, Line2D] = {}
    for line, (words, group, row) in zip(axes, rows, strict=True):
        for ax, (split, cost) in zip(line, row, strict=False):
            ax.set_yscale("log")
            handles |= _against_cost(ax, group, exact[exact["split"] == split], split, cost) | handles
            ax.set_xlabel(COSTS[cost])
            title = [words if ax is line[0] else "", labels.split_title(split) if several else ""]
            ax.set_title(": ".join(word for word in title if word), loc="left")
        style.error_axis(line[0])
        shown = [ax for ax in line[: len(row)] if ax.axison]
        for ax, (split, _) in zip(line, row, strict=False):
            levels = style.controls_of(frame[frame["split"] == split]).set_index("estimator_label")[
                "bpd_mae_all"
            ]
            if ax.axison:
                style.control_lines(ax, dict(levels), labels=ax is shown[-1])
        for ax in line[len(row) :]:
            ax.set_axis_off()
        line[0].set_ylabel(axis_label("bpd_mae_all"))
    figure.suptitle(f"{frame['task'].iloc[0]}: few-step likelihoods", fontsize=9)
    style.legend_below(figure, handles.values())
    return figure


def samples_against_error(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Distance, precision and recall of one-evaluation samples against the error of the same model's likelihood."""
    frame = samples.samples_measured(samples.answered(frame))
    few = samples.likelihood_of_samples(samples.few_steps(frame))
    shown = few[(few["sample_nfe"] == 1) & (few["bpd_mae_all"] > 0) & (few["split"] == "test")]
    panels = [name for name in ("distance", "precision", "recall") if shown[name].notna().any()]
    if shown.empty or not panels:
        return None
    lines = _lines(shown)
    figure = style.new_figure(style.PAGE, 2.6)
    axes = np.asarray(figure.subplots(1, len(panels), squeeze=False))[0]
    for ax, name in zip(axes, panels, strict=True):
        _levels(ax, frame, name)
        for line in lines:
            part = line.frame[line.frame[name].notna()]
            _draw(
                ax,
                part["bpd_mae_all"],
                part[name],
                _bars(part, name),
                _bars(part, "bpd_mae_all"),
                _point(line.look),
            )
        ax.set_xscale("log")
        _log_ticks(ax)
        _control_columns(ax, frame)
        _quality_axis(ax, shown, name)
        ax.set_xlabel(axis_label("bpd_mae_all"))
    figure.suptitle(f"{frame['task'].iloc[0]}: samples and likelihood of one evaluation", fontsize=9)
    entries = [Line2D([], [], label=one.label, **_point(one.look)) for one in lines]
    style.legend_below(figure, [*entries, *_level_handle(frame)])
    return figure


def real_data_ablation(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Distance, precision and recall of one-step generators distilled without, with, and finally on real data."""
    frame = samples.samples_measured(frame[frame["split"] == "test"])
    models = [model for model in ABLATION if model in set(frame.loc[frame["distance"].notna(), "model"])]
    if len(models) < 2:
        return None
    shown = frame[frame["model"].isin(models) & frame["distance"].notna() & (frame["sample_nfe"] == 1)]
    shown = shown.drop_duplicates("model").set_index("model").reindex(models)
    panels = [name for name in ("distance", "precision", "recall") if shown[name].notna().any()]
    if not panels:
        return None
    figure = style.new_figure(style.PAGE, 2.6)
    axes = np.asarray(figure.subplots(1, len(panels), squeeze=False))[0]
    colour = labels.method_named("generator").colour
    for ax, name in zip(axes, panels, strict=True):
        _levels(ax, frame, name)
        places = np.arange(len(models))
        ax.errorbar(
            places, shown[name], _bars(shown, name), color=colour, marker="o", linestyle="none", zorder=3
        )
        for place, value in zip(places, shown[name], strict=True):
            if np.isfinite(value):
                words: dict[str, Any] = {"fontsize": 6.5, "color": style.INK, "va": "center"}
                ax.annotate(
                    numbers.number(value, 2), (place, value), (6, 0), textcoords="offset points", **words
                )
        ax.set_xticks(places, [ABLATION[model] for model in models])
        ax.set_xlim(-0.5, len(models) - 0.2)
        _quality_axis(ax, shown.reset_index(), name)
    figure.suptitle(
        f"{frame['task'].iloc[0]}: RealUID with and without real data, one evaluation", fontsize=9
    )
    style.legend_below(figure, _level_handle(frame))
    return figure


# ------------------------------------------------------------------------------------------------------------- lines
def _groups(lines: list[_Line]) -> list[tuple[str, list[_Line]]]:
    """The lines that share panels, with words for them: all, or where they are many those of a kind of model."""
    if len(lines) <= MOST_LINES:
        return [("", lines)]
    found: dict[str, list[_Line]] = {}
    for line in lines:
        method = str(line.frame["method"].iloc[0])
        found.setdefault(KINDS_OF_MODEL.get(method, "flow maps"), []).append(line)
    return list(found.items())


def _rows(lines: Iterable[_Line]) -> list[list[tuple[str, str]]]:
    """The rows of panels; where one row was timed and one panel was not, this has its place beside the others."""
    rows = panels(pd.concat([line.frame for line in lines]), list(COSTS))
    return [rows[0] + rows[1]] if len(rows) == 2 and len(rows[1]) == 1 else rows


def _lines(frame: pd.DataFrame) -> list[_Line]:
    """A line per estimator and model, segments of a policy flow along it.

    A colour per method, a shade and a marker per model; an estimator's second way of reading a model (the full
    Jacobian, another route) is dashed and hollow.
    """
    frame = frame.assign(line=[labels.without_segments(model) for model in frame["model"]])
    groups = list(frame.groupby(["method", "line", "series"], sort=False))
    models: dict[str, dict[str, None]] = {}
    for (method, model, _), _part in groups:
        models.setdefault(str(method), {})[str(model)] = None
    found = []
    apart = style.dodges(len(groups))
    for k, ((method, model, series), part) in enumerate(groups):
        known = list(models[str(method)])
        place = known.index(str(model))
        other = any(way in str(series) for way in OTHER_WAYS)
        colour = style.shade(labels.method_named(str(method)).colour, place, len(known))
        look = {
            "color": colour,
            "marker": MARKERS[place % len(MARKERS)],
            "markersize": 4.5,
            "linestyle": "--" if other else "-",
            "markerfacecolor": "white" if other else colour,
            "markeredgewidth": 0.9 if other else 0.0,
        }
        found.append(_Line(_label(str(series), str(model)), part.assign(dodge=apart[k]), look))
    return found


def _label(series: str, model: str) -> str:
    """A line's name, short enough for two columns of them."""
    words = labels.brief(series).replace("One-step generator, route ", "Generator, ")
    return f"{words.replace(', jacobian full', ', full').replace(', Hutchinson ×1', '')} · {model}"


def _against_cost(
    ax: Axes, lines: Iterable[_Line], exact: pd.DataFrame, split: str, cost: str
) -> dict[str, Line2D]:
    """One panel: the few-step lines, and in grey the exact ODE."""
    handles: dict[str, Line2D] = {}
    costs: list[float] = []
    timed, untimed = [exact[exact[cost] > 0]], 0
    for line in lines:
        part = line.frame[(line.frame["split"] == split) & (line.frame[cost] > 0)].sort_values(cost)
        if part.empty:
            continue
        at = part[cost] * (part["dodge"] if cost == "nfe_mean" else 1.0)
        _draw(ax, at, part["bpd_mae_all"], _bars(part, "bpd_mae_all"), None, line.look)
        handles[line.label] = Line2D([], [], label=line.label, **line.look)
        costs += list(at)
        timed.append(part)
        untimed += int((line.frame["split"] == split).sum()) - len(part)
    for k, ((series, model), whole) in enumerate(exact.groupby(["series", "model"], sort=False)):
        part = whole[whole[cost] > 0]
        look: dict[str, Any] = {
            "color": style.MUTED,
            "marker": "_x|1"[k % 4],
            "markersize": 6,
            "linestyle": ":",
        }
        label = f"{labels.brief(str(series))} · {model}"
        _draw(ax, part[cost], part["bpd_mae_all"], _bars(part, "bpd_mae_all"), None, look)
        handles[label] = Line2D([], [], label=label, **look)
        costs += list(part[cost])
    if not costs:
        style.note(ax, f"not measured:\n{COSTS[cost].splitlines()[0]}")
        return {}
    if cost != "nfe_mean":
        handles |= style.impossible_times(ax, pd.concat(timed), cost, "bpd_mae_all")
        style.not_timed(ax, untimed)
    style.cost_axis(ax, costs)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)
    return handles


def _bars(part: pd.DataFrame, name: str) -> np.ndarray[Any, Any]:
    """Lengths of the error bars down and up, (2, n); none where the interval is not known."""
    value = part[name].to_numpy()
    ends: np.ndarray[Any, Any] = np.stack(
        [value - part[f"{name}_lo"].to_numpy(), part[f"{name}_hi"].to_numpy() - value]
    )
    ends = np.maximum(np.nan_to_num(ends), 0.0)
    if name == "bpd_mae_all":  # on a logarithmic axis
        ends[0] = np.minimum(ends[0], 0.999 * value)
    return ends


def _draw(
    ax: Axes,
    x: pd.Series[float],
    y: pd.Series[float],
    up: np.ndarray[Any, Any],
    across: np.ndarray[Any, Any] | None,
    look: dict[str, Any],
) -> None:
    """A line with its error bars, whose caps keep the line's colour where markers have an edge of their own."""
    ax.errorbar(x, y, up, across, fmt="none", ecolor=look["color"], elinewidth=0.8, capthick=0.8, zorder=2.5)
    ax.plot(x, y, zorder=3, **look)


def _point(look: dict[str, Any]) -> dict[str, Any]:
    return {**look, "linestyle": "none", "markersize": 5.5}


# -------------------------------------------------------------------------------------------------- quality of samples
def _level(frame: pd.DataFrame) -> dict[str, Any] | None:
    """The converged sampler that few-step ones are held against: the ODE with the most evaluations."""
    known = frame[(frame["estimator"] == "ode") & frame["distance"].notna()].sort_values("sample_nfe")
    return labels.as_dicts(known.tail(1))[0] if len(known) else None


def _levels(ax: Axes, frame: pd.DataFrame, name: str) -> None:
    """The converged sampler as a grey line with its interval as a band."""
    row = _level(frame)
    if row is None or not np.isfinite(row[name]):
        return
    ax.axhline(row[name], color=style.MUTED, linestyle=":", linewidth=1.0, zorder=1)
    if np.isfinite(row[f"{name}_lo"]):
        ax.axhspan(row[f"{name}_lo"], row[f"{name}_hi"], color=style.MUTED, alpha=0.15, linewidth=0)


def _level_handle(frame: pd.DataFrame) -> list[Line2D]:
    row = _level(frame)
    if row is None:
        return []
    label = f"{row['brief']} · {row['model']}, NFE {row['sample_nfe']:.0f}"
    return [Line2D([], [], color=style.MUTED, linestyle=":", linewidth=1.0, label=label)]


def _control_columns(ax: Axes, frame: pd.DataFrame) -> None:
    """The error of a constant as a grey vertical line: right of it a likelihood tells nothing of single items."""
    controls = style.controls_of(frame[frame["split"] == "test"]).set_index("estimator_label")["bpd_mae_all"]
    name = next((name for name in ("control-median", "control-mean") if name in controls), "")
    value = controls.get(name, np.nan)
    if np.isfinite(value) and value > 0:
        colour = labels.METHODS["control"].colour
        ax.axvline(value, color=colour, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1)
        words: dict[str, Any] = {"fontsize": 6.5, "color": style.MUTED, "ha": "center", "va": "bottom"}
        ax.text(value, 1.01, name, transform=ax.get_xaxis_transform(), **words)


def _quality_axis(ax: Axes, shown: pd.DataFrame, name: str) -> None:
    extractor = next((one for one in shown["extractor"] if one), "")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, zorder=0)
    if name != "distance":
        ax.set_ylabel(f"{BY_NAME[name].label} ({'features' if extractor else 'data space'})")
        style.within_limits(ax, name)
        return
    words = f"{distance_name(extractor)}\n({style.shorten(extractor, 32)})"
    ax.set_ylabel(words if extractor else axis_label("energy_distance"))
    values = shown["distance"].dropna().to_numpy()
    if values.max() > 20 * max(values.min(), 1e-12):
        if values.min() > 0 and extractor:
            ax.set_yscale("log")
            style.error_axis(ax)
        else:  # unbiased, so that it may fall below zero
            style.symlog_axis(ax, max(float(np.quantile(np.abs(values), 0.25)), 1e-4))


def _log_ticks(ax: Axes) -> None:
    """Plain numbers along a logarithmic horizontal axis."""
    low, high = ax.get_xlim()
    style.cost_axis(ax, [low, high])
    ax.set_xlim(low, high)
