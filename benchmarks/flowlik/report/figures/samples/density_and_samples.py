"""Density heat maps of the 2-D tasks, and grids of sampled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowlik.report import items, labels, numbers
from flowlik.report.figures import style

COLUMNS: Final = 4
MOST_LINES: Final = 7
FEW: Final = 16
"""Fixed steps from which a solution stands with the adaptive ones."""

ADAPTIVE: Final = ("adaptive",)
PREFERRED: Final = ("f2d2", "f2d2-corrected", "meanflow", "ode-euler")
BELOW: Final = 8.0
"""Nats below the highest value of the truth at which the colour scale ends."""

ABOVE: Final = 1.0
"""Nats above it from which a panel is drawn red."""

TOO_HIGH: Final = "#E5383B"
UNDEFINED: Final = "#d9d9d9"
T = TypeVar("T")
_Row = dict[str, Any]


@dataclass(frozen=True)
class _Map:
    title: str
    below: str
    log_density: NDArray[np.float64]
    extent: tuple[float, float, float, float]


def density_maps(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """log-density of the truth and of the estimators that have one on the task's grid, with its mass below.

    The first line holds the truth, the adaptive solutions and what has no steps, then a line per method and model by
    rising steps.
    """
    lines, truth = _lines(frame, run_dir)
    tops = [
        float(known.max())
        for line in lines
        for m in line
        if (known := m.log_density[np.isfinite(m.log_density)]).size
    ]
    if not tops:
        return None
    top = tops[0] if truth else float(np.median(tops))
    norm = Normalize(top - BELOW, top + ABOVE)
    colours = mpl.colormaps["viridis"].with_extremes(bad=UNDEFINED, over=TOO_HIGH)
    columns = max(len(line) for line in lines)
    left, right, bottom, upper = lines[0][0].extent
    width = (style.PAGE - 0.85 - 3 * 0.1) / COLUMNS
    height = width * min(max((upper - bottom) / (right - left), 0.4), 1.6)
    figure, axes = style.panels(
        len(lines),
        columns,
        size=(width, height),
        gaps=(0.1, 0.52),
        margins=(0.05, 0.8, 0.55, 0.25),
        title=f"{frame['task'].iloc[0]}: log-density{_eps_words(frame)}",
    )
    for line, row in zip(lines, axes, strict=True):
        for ax, item in zip(row, line, strict=False):
            _draw_map(ax, item, norm, colours)
        for ax in row[len(line) :]:
            ax.set_axis_off()
    first, last = axes[0, -1].get_position(), axes[min(1, len(lines) - 1), -1].get_position()
    place = (
        first.x1 + 0.12 / figure.get_figwidth(),
        last.y0,
        0.1 / figure.get_figwidth(),
        first.y1 - last.y0,
    )
    bar = figure.colorbar(mpl.cm.ScalarMappable(norm, colours), cax=figure.add_axes(place), extend="both")
    bar.set_label("log-density (nats)", fontsize=7)
    bar.ax.tick_params(labelsize=6.5)
    return figure


def sample_grids(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Up to 64 sampled images of every cell that kept some, tiled 8 x 8; lines as in `density_maps`.

    Of guided samplers only those with the default options, which differ in steps alone.
    """
    groups: dict[tuple[str, ...], list[tuple[_Row, NDArray[np.float64]]]] = {}
    guided = frame["estimator"] == "self-guidance"
    for row in labels.as_dicts(frame[~(guided & frame["estimator_label"].str.contains(","))]):
        samples = items.items(run_dir, row["cell_id"]).get("samples")
        if samples is not None and samples.ndim == 4 and len(samples) and samples.shape[1] in (1, 3):
            groups.setdefault(_line_key(row), []).append((row, tiled(samples)))
    lines = _in_lines(groups)
    if not lines:
        return None
    columns = max(len(line) for line in lines)
    side = (style.PAGE - 0.1 - 3 * 0.12) / COLUMNS
    title = f"{frame['task'].iloc[0]}: samples"
    figure, axes = style.panels(
        len(lines),
        columns,
        size=(side, side),
        gaps=(0.12, 0.5),
        margins=(0.05, 0.05, 0.72, 0.08),
        title=title,
    )
    for line, row_of_axes in zip(lines, axes, strict=True):
        for ax, (row, image) in zip(row_of_axes, line, strict=False):
            colour: dict[str, Any] = {"cmap": "gray_r", "vmin": 0.0, "vmax": 1.0} if image.ndim == 2 else {}
            ax.imshow(image, interpolation="nearest", **colour)
            distance = f"\nFréchet {numbers.number(row['frechet'])}" if np.isfinite(row["frechet"]) else ""
            ax.set_title(f"{_title(row)}{distance}", fontsize=6.6, pad=3)
    for ax in axes.ravel():
        ax.set_axis_off()
    return figure


def tiled(samples: NDArray[Any], side: int = 8) -> NDArray[np.float64]:
    """(n, C, H, W) in [-1, 1] -> one image in [0, 1] of side x side tiles with a pixel between them."""
    shown = np.clip(np.nan_to_num(samples[: side * side].astype(float)) / 2 + 0.5, 0, 1)
    count, channels, height, width = shown.shape
    rows = -(-count // side)
    sheet = np.ones((channels, rows * (height + 1) - 1, side * (width + 1) - 1))
    if channels == 1:
        sheet *= 0.2
    for k in range(count):
        top, left = (k // side) * (height + 1), (k % side) * (width + 1)
        sheet[:, top : top + height, left : left + width] = shown[k]
    return sheet[0] if channels == 1 else np.moveaxis(sheet[:3], 0, -1)


def _lines(frame: pd.DataFrame, run_dir: Path) -> tuple[list[list[_Map]], bool]:
    """Lines of maps, and whether the very first map is the truth (`density_ref` of a cell that keeps it)."""
    groups: dict[tuple[str, ...], list[_Map]] = {}
    truth: _Map | None = None
    for row in labels.as_dicts(frame):
        stored = items.items(run_dir, row["cell_id"])
        density, xs, ys = stored.get("density"), stored.get("grid_x"), stored.get("grid_y")
        if (
            density is None
            or xs is None
            or ys is None
            or density.shape != (len(ys), len(xs))
            or density.size < 4
        ):
            continue
        extent = (*_edges(xs), *_edges(ys))
        known = stored.get("density_ref")
        if truth is None and known is not None and known.shape == density.shape:
            truth = _Map("truth", "exact", known.astype(float), extent)
        groups.setdefault(_line_key(row), []).append(
            _Map(_title(row), _mass_words(row), density.astype(float), extent)
        )
    return _in_lines(groups, [truth] if truth is not None else []), truth is not None


def _title(row: _Row) -> str:
    return style.panel_title(row)


def _line_key(row: _Row) -> tuple[str, ...]:
    """Which line a panel stands in: solutions by many steps share one, others stand with their method and model."""
    if row["method"] in ("ode-adaptive", "ode-fixed", "whitened-ode") and not row["steps"] < FEW:
        return ADAPTIVE
    return (row["method"], row["series"], row["model"])


def _in_lines(groups: dict[tuple[str, ...], list[T]], lead: Sequence[T] = ()) -> list[list[T]]:
    """Groups as lines of at most COLUMNS panels: what leads, adaptive solutions (the tightest first) and groups of one
    panel together, then PREFERRED."""
    rank = {name: k for k, name in enumerate(PREFERRED)}
    keys = sorted(
        groups.keys() - {ADAPTIVE}, key=lambda key: (rank.get(key[0], len(rank)), list(groups).index(key))
    )
    adaptive = list(reversed(groups.get(ADAPTIVE, [])))[: COLUMNS - len(lead)]
    first = [*lead, *adaptive, *(groups[key][0] for key in keys if len(groups[key]) == 1)]
    lines = [first, *(groups[key] for key in keys if len(groups[key]) > 1)]
    return [line[k : k + COLUMNS] for line in lines for k in range(0, len(line), COLUMNS)][:MOST_LINES]


def _edges(centres: NDArray[Any]) -> tuple[float, float]:
    half = float(centres[-1] - centres[0]) / (len(centres) - 1) / 2
    return float(centres[0]) - half, float(centres[-1]) + half


def _mass_words(row: dict[Any, Any]) -> str:
    if not np.isfinite(row["mass"]):
        return "mass –"
    spread = f" ± {numbers.number(row['mass_se'], 1)}" if row["mass_se"] > 0 else ""
    return f"mass {numbers.number(row['mass'], 4 if 0.1 < row['mass'] < 10 else 3)}{spread}"


def _eps_words(frame: pd.DataFrame) -> str:
    eps = labels.eps_words(frame)
    return f" at t = 1 − eps, eps = {eps}" if eps not in ("", "0") else ""


def _draw_map(ax: Axes, item: _Map, norm: Normalize, colours: Colormap) -> None:
    values = np.where(
        np.isneginf(item.log_density), norm.vmin - 1.0 if norm.vmin is not None else 0.0, item.log_density
    )
    ax.imshow(
        np.ma.masked_invalid(values),
        origin="lower",
        extent=item.extent,
        norm=norm,
        cmap=colours,
        interpolation="nearest",
        aspect="equal",
    )
    ax.set_title(item.title, fontsize=6.8, pad=3)
    ax.set_xlabel(item.below, fontsize=6.8, labelpad=2)
    ax.set_xticks([])
    ax.set_yticks([])
