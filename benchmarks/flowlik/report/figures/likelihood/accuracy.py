"""bits/dim against NFE, and per-sample error against three costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from flowlik.records.columns import axis_label
from flowlik.report import frame as frames
from flowlik.report import labels, samples
from flowlik.report.figures import style
from flowlik.report.figures.grouping import in_panels, lines

COSTS: Final[dict[str, str]] = {
    name: axis_label(name, "\n") for name in ("nfe_mean", "forward_equivalents", "ms_per_sample")
}

CPU_COST: Final = {"cpu_ms_per_sample": axis_label("cpu_ms_per_sample", "\n")}
MOST_SERIES: Final = 20
"""More lines than this cannot be told apart; suites that sweep rules or probes have figures of their own."""

MANY_SERIES: Final = 8
"""Beyond it the legend needs a whole page's width."""

LINEAR: Final = 3.0
"""bits/dim within which the symlog axis is linear."""


def bpd_against_nfe(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean bits/dim of every method against its NFE, a panel per split, with the reference as a line."""
    shown = frame[np.isfinite(frame["bpd"]) & (frame["nfe_mean"] > 0) & (frame["method"] != "control")]
    shown = shown.assign(series=shown["series"].map(labels.brief))
    if shown.empty or lines(shown) > MOST_SERIES:
        return None
    panels = [(words, split, part) for words, part in in_panels(shown) for split in labels.splits(part)]
    width = style.PAGE if lines(shown) > MANY_SERIES or len(panels) > 1 else style.COLUMN + 1.5
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = style.new_figure(width, 0.3 + 2.4 * rows)
    axes = np.asarray(figure.subplots(rows, columns, sharey=True, squeeze=False)).ravel()
    several = len(labels.splits(shown)) > 1
    handles: dict[str, Line2D] = {}
    for ax, (words, split, part) in zip(axes, panels, strict=False):
        here = style.series_of(part[part["split"] == split], shown)
        handles |= _bpd_panel(ax, here, most=9 if len(panels) == 1 else 6) | handles
        ax.tick_params(labelleft=True)
        ax.set_title(": ".join(filter(None, (words, labels.split_title(split) if several else ""))))
    for ax in axes[len(panels) :]:
        ax.axis("off")
    _bpd_axis(axes[0], shown)
    for ax in axes[::columns]:
        ax.set_ylabel(axis_label("bpd"))
    _finish(figure, axes, f"{_task(frame)}: bits/dim against network evaluations")
    style.legend_below(figure, handles.values())
    return figure


def _bpd_panel(ax: Axes, drawn: list[style.Series], most: int) -> dict[str, Line2D]:
    part = pd.concat([series.frame for series in drawn])
    style.cost_axis(ax, part["nfe_mean"], most=most)
    handles: dict[str, Line2D] = {}
    for series, dodge in zip(drawn, style.dodges(len(drawn)), strict=True):
        bars = 2 * series.frame["bpd_se"].fillna(0).to_numpy()
        if style.draw_series(ax, series, "nfe_mean", "bpd", (bars, bars), dodge=dodge):
            handles[series.label] = style.handle(series)
    for name, value in _references(part).items():
        look: dict[str, Any] = {"color": "#8a8a8a", "linestyle": (0, (6, 2))}
        ax.axhline(value, linewidth=1.2, zorder=1, **look)
        handles.setdefault("reference", Line2D([], [], label=name, **look))
    ax.set_xlabel(axis_label("nfe_mean"))
    return handles


def error_against_cost(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean |error| per sample with its 95 % interval against NFE, forward-equivalents and time.

    A row of panels for every split that was timed; those that were not have one panel each, side by side.
    """
    frame = frames.with_times(frame)
    # beside other people's packages it is CPU time that can be compared
    costs = COSTS | (CPU_COST if frame["estimator"].str.startswith("peer-").any() else {})
    shown = frame[(frame["bpd_mae_all"] > 0) & (frame["method"] != "control")]
    costs = {cost: words for cost, words in costs.items() if cost == "nfe_mean" or _measured(shown, cost)}
    if len(samples.few_steps(frame)):  # their own figure has a line over the segments of a policy flow
        return None
    if shown.empty or lines(shown) > MOST_SERIES:
        return None
    rows = [(words, group, row) for words, group in in_panels(shown) for row in panels(group, list(costs))]
    widest = max(len(row) for _, _, row in rows)
    figure = style.new_figure(style.PAGE if widest > 1 else style.COLUMN + 1.5, 0.3 + 2.3 * len(rows))
    axes = np.asarray(figure.subplots(len(rows), widest, squeeze=False))
    for ax in axes.ravel():
        ax.axis("off")
    handles: dict[str, Line2D] = {}
    for line, (words, group, row) in zip(axes, rows, strict=True):
        for k, (ax, (split, cost)) in enumerate(zip(line, row, strict=False)):
            ax.axis("on")
            part = group[group["split"] == split]
            levels = style.controls_of(frame[frame["split"] == split]).set_index("estimator_label")[
                "bpd_mae_all"
            ]
            _limits(ax, part, levels)
            handles |= _cost_panel(ax, style.series_of(part, shown), cost, costs[cost]) | handles
            if not ax.axison:
                continue
            ax.set_xlabel(costs[cost])
            last = k + 1 == len(row) or (row[k + 1][0] == split and not _measured(part, row[k + 1][1]))
            style.control_lines(ax, dict(levels), labels=last)
            for text in ax.texts if len(row) < len(line) else ():
                text.set_in_layout(False)  # there is room beside it
            if k and row[k - 1][0] == split:
                ax.tick_params(labelleft=False)
            else:
                title = [words, labels.split_title(split) if len(labels.splits(shown)) > 1 else ""]
                ax.set_title(": ".join(word for word in title if word), loc="left")
        line[0].set_ylabel(axis_label("bpd_mae_all"))
    _finish(figure, axes.ravel(), f"{_task(frame)}: per-sample error against cost")
    front = Line2D([], [], color="#bdbdbd", linewidth=4, alpha=0.6, label="Pareto front")
    style.legend_below(figure, [*handles.values(), front])
    return figure


def panels(shown: pd.DataFrame, costs: list[str]) -> list[list[tuple[str, str]]]:
    """Rows of (split, cost): all costs of a timed split, NFE alone of the others."""
    splits = labels.splits(shown)
    timed = [s for s in splits if any(_measured(shown[shown["split"] == s], cost) for cost in costs[1:])]
    others = [(split, costs[0]) for split in splits if split not in timed]
    rest = [others[k : k + len(costs)] for k in range(0, len(others), len(costs))]
    return [[(split, cost) for cost in costs] for split in timed] + rest


def _measured(part: pd.DataFrame, cost: str) -> bool:
    return bool((part[cost] > 0).any())


def _cost_panel(ax: Axes, drawn: list[style.Series], cost: str, label: str) -> dict[str, Line2D]:
    part = pd.concat([series.frame for series in drawn])
    if not _measured(part, cost):
        style.note(ax, f"{'not counted' if cost == 'nfe_mean' else 'not timed'}:\n{label.splitlines()[0]}")
        return {}
    style.cost_axis(ax, part[cost])
    handles = {}
    for series in drawn:
        value, low, high = (
            series.frame[c].to_numpy() for c in ("bpd_mae_all", "bpd_mae_all_lo", "bpd_mae_all_hi")
        )
        bars = np.clip(value - low, 0, 0.999 * value), np.clip(high - value, 0, None)
        if style.draw_series(ax, series, cost, "bpd_mae_all", bars):
            handles[series.label] = style.handle(series)
    here = part[part[cost] > 0]
    if cost != "nfe_mean":
        handles |= style.impossible_times(ax, here, cost, "bpd_mae_all")
        style.not_timed(ax, len(part) - len(here))
    if here["bpd_mae_all"].min() > part["bpd_mae_all"].min():
        return handles  # a front without the best method would be none
    xs, ys = pareto_front(here[cost].to_numpy(), here["bpd_mae_all"].to_numpy())
    xs, ys = np.append(xs, ax.get_xlim()[1]), np.append(ys, ys[-1])
    ax.step(xs, ys, where="post", color="#bdbdbd", linewidth=4, alpha=0.6, zorder=0.5, solid_capstyle="butt")
    return handles


def pareto_front(cost: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Points that no other one beats in both cost and error, by rising cost (and falling error)."""
    keep = np.isfinite(cost) & np.isfinite(error) & (cost > 0) & (error > 0)
    cost, error = cost[keep], error[keep]
    order = np.lexsort((error, cost))
    best, chosen = np.inf, []
    for k in order:
        if error[k] < best:
            best = error[k]
            chosen.append(k)
    return cost[chosen], error[chosen]


def _limits(ax: Axes, part: pd.DataFrame, levels: pd.Series[float]) -> None:
    values = np.concatenate([part["bpd_mae_all"].to_numpy(), part["bpd_mae_all_hi"].to_numpy()])
    values = values[np.isfinite(values) & (values > 0)]
    near = levels[levels > values.min() / 5].to_numpy()
    values = np.concatenate([values, near])
    low, high = values.min(), values.max()
    pad = max((high / low) ** 0.06, 1.2)
    ax.set_yscale("log")
    ax.set_ylim(low / pad, high * pad)
    style.error_axis(ax)


def _references(part: pd.DataFrame) -> dict[str, float]:
    found: dict[str, float] = {}
    for ref in sorted(part["ref_id"].unique()):
        row = labels.reference(part[part["ref_id"] == ref])
        value = row["bpd_ref"] if row else np.nan
        if np.isfinite(value) and not any(abs(value - other) < 5e-3 for other in found.values()):
            found[f"reference ({ref})" if ref else "reference"] = float(value)
    return found


def _bpd_axis(ax: Axes, shown: pd.DataFrame) -> None:
    values = np.concatenate([shown["bpd"].to_numpy(), shown["bpd_ref"].dropna().to_numpy()])
    low, high = values.min(), values.max()
    if max(abs(low), abs(high)) <= 2 * LINEAR:
        return
    ax.set_yscale("symlog", linthresh=LINEAR, linscale=1.2)
    inside = [-3, -2, -1, 0, 1, 2, 3]
    outside = [s * m * 10.0**k for s in (-1, 1) for k in range(1, 7) for m in (1, 3)]
    ticks = [t for t in sorted([*inside, *outside]) if min(low, 0) * 1.5 <= t <= max(high, 0) * 1.5 + 1]
    if len(ticks) > 11:
        ticks = [t for t in ticks if abs(t) not in (1, 2)]
    ax.set_ylim(low * 1.4 if low < -LINEAR else low - 0.8, high * 1.4 if high > LINEAR else high + 0.8)
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("-", "−")))
    for tick in (-LINEAR, LINEAR):
        if low < tick < high:
            ax.axhline(tick, color="#dddddd", linewidth=0.7, zorder=0)


def _finish(figure: Figure, axes: np.ndarray, title: str) -> None:
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.axison:
            ax.grid(True, which="major", axis="both", zorder=0)
    figure.suptitle(title, fontsize=9)


def _task(frame: pd.DataFrame) -> str:
    return str(frame["task"].iloc[0])
