"""Style shared by all figures: fonts and sizes, series, axes, legends and control lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from flowlik.records.columns import BY_NAME
from flowlik.report import labels as method_labels
from flowlik.report import numbers

COLUMN: Final = 3.45
"""Width of a text column, inches."""

PAGE: Final = 7.1
"""Width of a page of two columns, inches."""

LEGEND_ROW: Final = 0.16
"""Inches of a line of a legend."""

LEAST_OF_NFE: Final = 0.9
"""Forward-equivalents below this share of NFE cannot be: the forward that they are measured in was timed wrongly."""

INK: Final = "#222222"
MUTED: Final = "#6b6b6b"
ALTERNATE_MARKERS: Final = ("", "<", ">", "d", "H", "8")
MODEL_MARKERS: Final = ("", "P", "*", "p", "h")


@contextmanager
def paper() -> Iterator[None]:
    """Draw in the paper's style, whatever the caller's matplotlib settings, which come back afterwards."""
    settings: Any = {
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 8,
        "axes.titlesize": 8.5,
        "axes.labelsize": 8,
        "xtick.labelsize": 7,
        "ytick.labelsize": 7,
        "legend.fontsize": 7,
        "legend.frameon": False,
        "legend.handlelength": 2.4,
        "axes.edgecolor": "#8a8a8a",
        "axes.linewidth": 0.7,
        "axes.labelcolor": INK,
        "axes.titlecolor": INK,
        "text.color": INK,
        "xtick.color": "#8a8a8a",
        "ytick.color": "#8a8a8a",
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "xtick.major.width": 0.7,
        "ytick.major.width": 0.7,
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.minor.size": 1.5,
        "ytick.minor.size": 1.5,
        "grid.color": "#e6e6e6",
        "grid.linewidth": 0.6,
        "lines.linewidth": 1.3,
        "lines.markersize": 4.5,
        "errorbar.capsize": 1.6,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "pdf.fonttype": 42,
        "svg.fonttype": "none",
        "svg.hashsalt": "flowlik",
        "axes.unicode_minus": True,
        "text.parse_math": False,
    }
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update({**sns.axes_style("ticks"), **settings})
        yield


@dataclass(frozen=True)
class Series:
    """A line of a figure: one method with one set of parameters on one model, over steps or tolerances."""

    label: str
    method: str
    model: str
    frame: pd.DataFrame
    style: dict[str, Any]


def new_figure(width: float, height: float) -> Figure:
    """A figure with constrained layout and no tie to pyplot's state."""
    return Figure(figsize=(width, height), layout="constrained")


def panel_title(row: dict[str, Any]) -> str:
    """Two lines for a small panel: what was run, and on which model; other parameters move to the second line."""
    first, second = row["brief"], row["model"]
    if len(first) > 27 and ", " in first:
        words = first.split(", ")
        keep = 2 if len(words) > 2 else 1
        first, second = ", ".join(words[:keep]), ", ".join([*words[keep:], second])
    return f"{shorten(first, 34)}\n{shorten(second, 36)}"


def panels(
    rows: int,
    columns: int,
    *,
    size: tuple[float, float],
    gaps: tuple[float, float],
    margins: tuple[float, float, float, float],
    title: str,
) -> tuple[Figure, np.ndarray[Any, Any]]:
    """A figure of equal panels (rows, columns) laid out by hand, for many panels much faster than a layout engine.

    `size` of a panel, `gaps` across and down, `margins` left, right, top and bottom: all in inches. A title stands
    on top.
    """
    left, right, top, bottom = margins
    width = left + columns * size[0] + (columns - 1) * gaps[0] + right
    height = top + rows * size[1] + (rows - 1) * gaps[1] + bottom
    figure = Figure(figsize=(width, height))
    axes = np.empty((rows, columns), dtype=object)
    for i, j in np.ndindex(rows, columns):
        x, y = left + j * (size[0] + gaps[0]), bottom + (rows - 1 - i) * (size[1] + gaps[1])
        axes[i, j] = figure.add_axes((x / width, y / height, size[0] / width, size[1] / height))
    figure.suptitle(title, fontsize=9, y=1 - 0.06 / height, va="top")
    return figure, axes


def series_of(frame: pd.DataFrame) -> list[Series]:
    """Lines of a frame without its controls, in the order of METHODS.

    Colour and marker are the method's. A closed-form model is drawn dashed with hollow markers, a `-plain` network
    dotted; where a method has several variants on one model, later ones are paler and take other markers; where it is
    shown on several trained models, later ones are darker and take other markers.
    """
    found: list[Series] = []
    seen: dict[tuple[str, str], int] = {}
    trained: dict[str, list[str]] = {}
    for names, part in _without_controls(frame).groupby(["method", "series", "model"], sort=False):
        method, label, model = (str(name) for name in names)
        alternate = seen.get((method, model), 0)
        seen[method, model] = alternate + 1
        words = f"{label} · {model}" if model else label
        models = trained.setdefault(method, [])
        if _line(model) == "-" and model not in models:
            models.append(model)
        other = models.index(model) if model in models else 0
        found.append(Series(words, method, model, part, _style(method, model, alternate, other)))
    return found


def _without_controls(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[frame["method"] != "control"]


def controls_of(frame: pd.DataFrame) -> pd.DataFrame:
    """Control rows of a frame."""
    return frame[frame["method"] == "control"]


def _line(model: str) -> str:
    """Line style that says what kind of model it is."""
    return ":" if model.endswith("-plain") else "--" if model == "closed-form" else "-"


def _style(method: str, model: str, alternate: int, other: int) -> dict[str, Any]:
    """``alternate``: which variant of the method on this model; ``other``: which of the trained models."""
    known = method_labels.method_named(method)
    colour = _faded(known.colour) if alternate else _darker(known.colour, other)
    line = known.line or _line(model)
    hollow = _line(model) != "-"
    marker = ALTERNATE_MARKERS[alternate % len(ALTERNATE_MARKERS)]
    return {
        "color": colour,
        "marker": marker or MODEL_MARKERS[other % len(MODEL_MARKERS)] or known.marker,
        "linestyle": line,
        "markerfacecolor": "white" if hollow else colour,
        "markeredgecolor": colour if hollow else "white",
        "markeredgewidth": 0.9 if hollow else 0.4,
    }


def _darker(colour: str, times: int) -> str:
    rgb = 0.62**times * np.array(to_rgb(colour))
    return to_hex((float(rgb[0]), float(rgb[1]), float(rgb[2])))


def _faded(colour: str) -> str:
    rgb = 0.6 * np.array(to_rgb(colour)) + 0.4
    return to_hex((float(rgb[0]), float(rgb[1]), float(rgb[2])))


def draw_series(
    ax: Axes, series: Series, x: str, y: str, bars: tuple[np.ndarray, np.ndarray] | None = None
) -> bool:
    """Draw `y` against `x`, sorted by x, with lengths of error bars (down, up); False where there is no point."""
    frame = series.frame
    keep = np.isfinite(frame[x].to_numpy()) & np.isfinite(frame[y].to_numpy())
    if ax.get_xscale() == "log":
        keep &= frame[x].to_numpy() > 0
    if ax.get_yscale() == "log":
        keep &= frame[y].to_numpy() > 0
    if not keep.any():
        return False
    order = np.flatnonzero(keep)[np.argsort(frame[x].to_numpy()[keep], kind="stable")]
    xs, ys = frame[x].to_numpy()[order], frame[y].to_numpy()[order]
    yerr = None if bars is None else np.nan_to_num(np.abs(np.stack([b[order] for b in bars])))
    ax.errorbar(xs, ys, yerr=yerr, elinewidth=0.8, capthick=0.8, zorder=3, **series.style)
    return True


def legend_below(figure: Figure, handles: Iterable[Line2D], *, room: int | None = None) -> None:
    """One legend for the whole figure, under it, in as many columns as fit.

    With `room` the figure grows by what the legend has more than so many rows, which otherwise the panels would lose.
    """
    entries = list(handles)
    if not entries:
        return
    longest = max(len(str(entry.get_label())) for entry in entries)
    columns = min(max(int(figure.get_figwidth() // (0.051 * longest + 0.45)), 1), 3, len(entries))
    figure.legend(handles=entries, loc="outside lower center", ncols=columns)
    if room is not None:
        more = max(math.ceil(len(entries) / columns) - room, 0)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW * more)


def handle(series: Series) -> Line2D:
    """Legend entry of a series."""
    return Line2D([], [], label=shorten(series.label, 52), **series.style)


def shorten(text: str, length: int) -> str:
    """Text of at most `length` characters, an ellipsis where some were cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def cost_axis(ax: Axes, values: Iterable[float], *, most_doublings: int = 5) -> None:
    """A logarithmic axis for a cost, labelled with plain numbers: powers of two, every other one on a long axis."""
    finite = np.array([v for v in values if np.isfinite(v) and v > 0])
    ax.set_xscale("log")
    if not len(finite):
        return
    low, high = finite.min(), finite.max()
    pad = max((high / low) ** 0.06, 1.15)
    ax.set_xlim(low / pad, high * pad)
    doublings = np.log2(high / low)
    if low >= 1 and doublings <= 11:
        stride = 1 if doublings <= most_doublings else 2
        ticks = 2.0 ** np.arange(np.floor(np.log2(low)), np.ceil(np.log2(high)) + 1, stride)
        ax.xaxis.set_major_locator(FixedLocator(list(ticks)))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        subs = (1.0, 2.0, 5.0) if high / low < 30 else (1.0, 3.0) if high / low < 250 else (1.0,)
        ax.xaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
        ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


def plain(value: float) -> str:
    """A tick label: 0.001 to 9,999 as it is, thousands with k."""
    if value == 0:
        return "0"
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def error_axis(ax: Axes) -> None:
    """A logarithmic axis for an error, labelled with plain numbers where decades allow."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = np.log10(high / low)
    subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 2.6 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def within_limits(ax: Axes, name: str) -> None:
    """Let a vertical axis end where the column's values can at most be, but for the room that markers need."""
    low, high = ax.get_ylim()
    room = 0.05 * (high - low)
    least, most = BY_NAME[name].low, BY_NAME[name].high
    ax.set_ylim(
        low if least is None else max(low, least - room), high if most is None else min(high, most + room)
    )


def symlog_axis(ax: Axes, threshold: float) -> None:
    """A vertical axis linear up to the threshold and logarithmic beyond, either sign, with plain numbers."""
    ax.set_yscale("symlog", linthresh=threshold)
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: ("−" if value < 0 else "") + plain(abs(value)))
    )


def control_lines(ax: Axes, levels: dict[str, float], *, labels: bool, height: float = 1.5) -> None:
    """Horizontal lines at the controls' values; with `labels` their names right of the axes, kept apart.

    `height` is about that of the axes, in inches.
    """
    merged: dict[float, list[str]] = {}
    low, high = ax.get_ylim()
    for name, value in sorted(levels.items(), key=lambda pair: pair[1]):
        if not np.isfinite(value) or (ax.get_yscale() == "log" and value <= 0):
            continue
        if value < low:
            name, value = f"{name} ↓ {numbers.number(value, 1)}", low
        near = next((v for v in merged if abs(v - value) <= 5e-3 * abs(value)), value)
        merged.setdefault(near, []).append(name)
    for value in merged:
        if value == low:
            continue
        ax.axhline(
            value,
            color=method_labels.METHODS["control"].colour,
            linewidth=0.9,
            linestyle=(0, (5, 2)),
            zorder=1,
        )
    if not labels or not merged:
        return
    scale = np.log if ax.get_yscale() == "log" else np.asarray
    where = [float((scale(v) - scale(low)) / (scale(high) - scale(low))) for v in merged]
    names = ["\n".join(names) for names in merged.values()]
    for name, at, value in zip(names, _apart(where, names, 0.12 / height), merged, strict=True):
        ax.annotate(
            name,
            xy=(1.0, value),
            xycoords=ax.get_yaxis_transform(),
            xytext=(1.03, at),
            textcoords="axes fraction",
            fontsize=6.5,
            color=MUTED,
            va="center",
            annotation_clip=False,
        )


def _apart(where: list[float], names: list[str], line: float) -> list[float]:
    """Positions (ascending) moved up as far as labels of so many lines need to stay clear of one another."""
    placed: list[float] = []
    floor = -np.inf
    for at, name in zip(where, names, strict=True):
        half = line * (name.count("\n") + 1) / 2
        placed.append(max(at, floor + half))
        floor = placed[-1] + half
    excess = max(0.0, (floor - 1.02) if placed else 0.0)
    return [
        at - min(excess, at - first) if at - first > 0 else at
        for at, first in zip(placed, where, strict=True)
    ]


def note(ax: Axes, text: str) -> None:
    """Words in an otherwise empty panel."""
    ax.set_axis_off()
    ax.text(
        0.5, 0.5, text, ha="center", va="center", fontsize=7.5, color=MUTED, transform=ax.transAxes, wrap=True
    )


def impossible_times(ax: Axes, timed: pd.DataFrame, x: str, y: str) -> dict[str, Line2D]:
    """Circles round points whose time cannot be, with their entry of a legend; none where there is none."""
    wrong = timed[cannot_be(timed)]
    if wrong.empty:
        return {}
    look: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 9.0, "markerfacecolor": "none"}
    look |= {"markeredgecolor": "#b3261e", "markeredgewidth": 1.0}
    words = f"time cannot be: below {LEAST_OF_NFE:g} of the forwards"
    ax.plot(wrong[x], wrong[y], zorder=4, **look)
    return {words: Line2D([], [], label=words, **look)}


def cannot_be(frame: pd.DataFrame) -> pd.Series[bool]:
    """Whether a row's time is less than that of the forwards it counts, by more than noise."""
    return frame["forward_equivalents"] < LEAST_OF_NFE * frame["nfe_mean"]


def not_timed(ax: Axes, count: int) -> None:
    """Say in a panel how many results have no time and so no point."""
    if count:
        words: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 6.5, "color": MUTED}
        ax.text(0.99, 0.99, f"{count} not timed", transform=ax.transAxes, **words)
