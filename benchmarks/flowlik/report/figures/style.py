"""Style shared by all figures: fonts and sizes, series, axes, legends and control lines."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, Locator, MaxNLocator, NullFormatter, NullLocator

from flowlik.records.columns import BY_NAME
from flowlik.report import labels as method_labels
from flowlik.report import numbers

COLUMN: Final = 3.45
"""Width of a text column, inches."""

PAGE: Final = 7.1
"""Width of a page of two columns, inches."""

LEGEND_LETTERS: Final = 56
"""Letters of a legend's line: longer labels go on in a second one, so that none is cut."""

DODGE: Final = 0.035
"""Lines that would lie on one another are set apart by so many doublings of a cost."""

DODGED: Final = 0.15
"""The most doublings that a line is set apart from its values, to their right: no point costs less than it does."""

LEAST_OF_NFE: Final = 0.9
"""Forward-equivalents below this share of NFE cannot be: the forward that they are measured in was timed wrongly."""

LINE: Final = ["method", "series", "model"]
"""What rows of one line have in common."""

MODEL_COLOURS: Final = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#882255"),
    *("#A68A00", "#5E4FA2", "#44AA99", "#767676"),
)
EVERY_MARKER: Final = "os^DvPX*<>hd"
"""Of models that are compared with one another, whatever the method."""

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
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06))


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


def series_of(frame: pd.DataFrame, among: pd.DataFrame | None = None) -> list[Series]:
    """Lines of a frame without its controls, in the order of METHODS.

    They look as they do among those of a larger frame, where it is given: one line is the same in every panel.

    Colour and marker are the method's. A closed-form model is drawn dashed with hollow markers, a `-plain` network
    dotted; where a method has several variants on one model, later ones are paler and take other markers; where it is
    shown on several trained models, others are darker and paler in turn and take other markers.
    """
    looks = _looks(frame if among is None else among)
    found: list[Series] = []
    for names, part in _without_controls(frame).groupby(LINE, sort=False):
        method, label, model = (str(name) for name in names)
        words = f"{label} · {model}" if model else label
        found.append(Series(words, method, model, part, looks[method, label, model]))
    return found


def _looks(frame: pd.DataFrame) -> dict[tuple[str, ...], dict[str, Any]]:
    """The style of each line of a frame."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    seen: dict[tuple[str, str], int] = {}
    trained: dict[str, list[str]] = {}
    for names, _ in _without_controls(frame).groupby(LINE, sort=False):
        method, label, model = (str(name) for name in names)
        alternate = seen.get((method, model), 0)
        seen[method, model] = alternate + 1
        models = trained.setdefault(method, [])
        if _line(model) == "-" and model not in models:
            models.append(model)
        other = models.index(model) if model in models else 0
        found[method, label, model] = _style(method, model, alternate, other)
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
    colour = _faded(known.colour) if alternate else shade(known.colour, other)
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


def shade(colour: str, place: int, of: int = 5) -> str:
    """The colour itself for the first of so many, then darker and paler ones in turn."""
    depth = min(0.75 * ((place + 1) // 2) / (of // 2 + 0.5), 0.75)
    towards = 0.0 if place % 2 else 1.0
    rgb = np.array(to_rgb(colour)) * (1 - depth) + depth * towards
    return to_hex((float(rgb[0]), float(rgb[1]), float(rgb[2])))


def _faded(colour: str) -> str:
    rgb = 0.6 * np.array(to_rgb(colour)) + 0.4
    return to_hex((float(rgb[0]), float(rgb[1]), float(rgb[2])))


def draw_series(
    ax: Axes,
    series: Series,
    x: str,
    y: str,
    bars: tuple[np.ndarray, np.ndarray] | None = None,
    *,
    dodge: float = 1.0,
) -> bool:
    """Draw `y` against `x` times `dodge`, sorted by x, with lengths of error bars (down, up); False where there is no
    point.
    """
    frame = series.frame
    keep = np.isfinite(frame[x].to_numpy()) & np.isfinite(frame[y].to_numpy())
    if ax.get_xscale() == "log":
        keep &= frame[x].to_numpy() > 0
    if ax.get_yscale() == "log":
        keep &= frame[y].to_numpy() > 0
    if not keep.any():
        return False
    order = np.flatnonzero(keep)[np.argsort(frame[x].to_numpy()[keep], kind="stable")]
    xs, ys = dodge * frame[x].to_numpy()[order], frame[y].to_numpy()[order]
    yerr = None if bars is None else np.nan_to_num(np.abs(np.stack([b[order] for b in bars])))
    ax.errorbar(xs, ys, yerr=yerr, elinewidth=0.8, capthick=0.8, zorder=3, **series.style)
    return True


def looks_of_models(models: Iterable[str], *, markersize: float) -> dict[str, dict[str, Any]]:
    """Colour and marker of each model, where models and not methods are told apart."""
    return {
        model: {
            "color": MODEL_COLOURS[k % len(MODEL_COLOURS)],
            "marker": EVERY_MARKER[k % len(EVERY_MARKER)],
            "markersize": markersize,
        }
        for k, model in enumerate(models)
    }


def dodges(count: int) -> list[float]:
    """Factors of a cost, 1 and a little more, that set so many lines apart; many lines stand closer."""
    step = min(DODGE, DODGED / max(count - 1, 1))
    return [float(2 ** (step * k)) for k in range(count)]


def legend_below(figure: Figure, handles: Iterable[Line2D]) -> None:
    """One legend for the whole figure, under it, in as many columns as fit; the figure grows by its height.

    Labels are whole: long ones take two lines.
    """
    entries = list(handles)
    if not entries:
        return
    size = FontProperties(size=mpl.rcParams["legend.fontsize"]).get_size_in_points()
    letters = min(LEGEND_LETTERS, max(int((figure.get_figwidth() - 0.7) / (0.0085 * size)), 8))
    for entry in entries:
        entry.set_label(wrapped(str(entry.get_label()), letters))
    renderer: Any = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    for columns in range(min(3, len(entries)), 0, -1):
        legend = figure.legend(handles=entries, loc="outside lower center", ncols=columns)
        box = legend.get_window_extent(renderer)
        if columns == 1 or box.width < 0.98 * figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def wrapped(text: str, letters: int = LEGEND_LETTERS) -> str:
    """Text in lines of at most so many letters."""
    return "\n".join(textwrap.wrap(text, letters)) or text


def handle(series: Series) -> Line2D:
    """Legend entry of a series."""
    return Line2D([], [], label=series.label, **series.style)


def shorten(text: str, length: int) -> str:
    """Text of at most `length` characters, an ellipsis where some were cut."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def cost_axis(ax: Axes, values: Iterable[float], *, most: int = 6) -> None:
    """A logarithmic axis for a cost, labelled with plain numbers: at most so many, powers of two from 1 on."""
    finite = np.array([v for v in values if np.isfinite(v) and v > 0])
    ax.set_xscale("log")
    if not len(finite):
        return
    low, high = finite.min(), finite.max()
    pad = max((high / low) ** 0.06, 1.15)
    ax.set_xlim(low / pad, high * pad)
    ax.xaxis.set_major_locator(PlainTicks(most, tuple(finite)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())


class PlainTicks(Locator):
    """Round numbers along a logarithmic axis: at most `most`, and two at least wherever the axis ends.

    Values from 1 over two doublings and more, or powers of two all, have powers of two.
    """

    def __init__(self, most: int, values: tuple[float, ...] = ()) -> None:
        self.most = most
        self.values = values

    def __call__(self) -> Any:
        """Ticks of the axis as it is."""
        return self.tick_values(*self.axis.get_view_interval()) if self.axis is not None else []

    def tick_values(self, vmin: float, vmax: float) -> Any:
        """Ticks between two ends."""
        low, high = sorted((vmin, vmax))
        if not 0 < low < high < np.inf:
            return []
        twos = self._twos(low, high)
        return twos if len(twos) else _round_numbers(low, high, self.most)

    def _twos(self, low: float, high: float) -> Any:
        if not self.values or min(self.values) < 1:
            return ()
        powers = 2.0 ** np.arange(np.ceil(np.log2(low)), np.floor(np.log2(high)) + 1)
        powers = powers[powers >= 1]
        few = set(self.values) <= set(powers)
        if len(powers) > 12 or (len(powers) < 3 and not few):
            return ()
        stride = -(-len(powers) // self.most)
        return powers[::stride]


def _round_numbers(low: float, high: float, most: int) -> Any:
    """The most round numbers of one kind within the ends, at most so many; over less than a factor 5 evenly spaced."""
    if high / low < 5:  # 2, 5, 10: less than that may hold one of them alone
        even = np.asarray(MaxNLocator(min(most, 4), steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
        return even[(even >= low) & (even <= high)]
    decades = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    for leading in ((1.0, 2.0, 5.0), (1.0, 3.0), (1.0,)):
        ticks = np.array([m * 10.0**k for k in decades for m in leading])
        ticks = ticks[(ticks >= low * (1 - 1e-9)) & (ticks <= high * (1 + 1e-9))]
        if len(ticks) <= most:
            return ticks
    return ticks[:: -(-len(ticks) // most)]


def plain(value: float) -> str:
    """A tick label: 0.001 to 9,999 as it is, thousands with k."""
    if value == 0:
        return "0"
    if value >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def error_axis(ax: Axes) -> None:
    """A logarithmic axis for an error, labelled with plain numbers."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(PlainTicks(8))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def within_limits(ax: Axes, name: str) -> None:
    """Let a vertical axis end where the column's values can at most be, but for the room that markers need."""
    low, high = ax.get_ylim()
    room = 0.05 * (high - low)
    least, most = BY_NAME[name].low, BY_NAME[name].high
    low = low if least is None else max(low, least - room)
    high = high if most is None else min(high, most + room)
    ax.set_ylim(low, high)
    ends = (-np.inf if least is None else least, np.inf if most is None else most)
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ax.set_yticks([tick for tick in ticks if max(low, ends[0]) <= tick <= min(high, ends[1])])


def up_to_one(ax: Axes) -> None:
    """Let a vertical axis of what is 1 at most end there, but for the room that markers need, and begin at 0.9."""
    low = min(ax.get_ylim()[0], 0.9)
    high = 1 + 0.06 * (1 - low)
    ax.set_ylim(low, high)
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    ax.set_yticks([tick for tick in ticks if low <= tick <= 1 + 1e-9])


def symlog_axis(ax: Axes, threshold: float) -> None:
    """A vertical axis linear up to the threshold and logarithmic beyond, either sign, with plain numbers."""
    ax.set_yscale("symlog", linthresh=threshold)
    ax.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: ("−" if value < 0 else "") + plain(abs(value)))
    )


def control_lines(ax: Axes, levels: dict[str, float], *, labels: bool, height: float = 1.5) -> None:
    """Horizontal lines at the controls' values; with `labels` their names right of the axes, kept apart, each with a
    thin line to its level.

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
    leader = {
        "arrowstyle": "-",
        "color": MUTED,
        "linewidth": 0.4,
        "shrinkA": 1,
        "shrinkB": 0,
        "relpos": (0, 0.5),
    }
    scale = np.log if ax.get_yscale() == "log" else np.asarray
    where = [float((scale(v) - scale(low)) / (scale(high) - scale(low))) for v in merged]
    names = ["\n".join(names) for names in merged.values()]
    for name, at, value in zip(names, _apart(where, names, 0.115 / height), merged, strict=True):
        ax.annotate(
            name,
            xy=(1.0, value),
            xycoords=ax.get_yaxis_transform(),
            xytext=(1.07, at),
            textcoords="axes fraction",
            fontsize=6.5,
            color=MUTED,
            va="center",
            arrowprops=leader,
            annotation_clip=False,
        )


def _apart(where: list[float], names: list[str], line: float) -> list[float]:
    """Positions (ascending) moved as little as labels of so many lines need to stay clear of one another.

    Labels that would lie on one another are stacked about their middle, and no stack passes the top.
    """
    halves = [line * (name.count("\n") + 1) / 2 for name in names]
    stacks: list[tuple[list[int], float]] = []  # labels of a stack, and its middle
    for k, at in enumerate(where):
        stacks.append(([k], min(at, 1.04 - halves[k])))
        while len(stacks) > 1 and _overlap(stacks[-2], stacks[-1], halves):
            (upper, high), (lower, low) = stacks.pop(), stacks.pop()
            both, size = lower + upper, sum(halves[i] for i in lower + upper)
            middle = (len(lower) * low + len(upper) * high) / len(both)
            stacks.append((both, min(middle, 1.04 - size)))
    placed = []
    for members, middle in stacks:
        floor = middle - sum(halves[i] for i in members)
        for i in members:
            placed.append(floor + halves[i])
            floor += 2 * halves[i]
    return placed


def _overlap(lower: tuple[list[int], float], upper: tuple[list[int], float], halves: list[float]) -> bool:
    room = sum(halves[i] for i in lower[0] + upper[0])
    return lower[1] + room > upper[1] + 1e-9


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
