"""Estimated against reference log-density, one panel per method and number of steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from flowlik.report import items, labels, numbers
from flowlik.report.figures import style

MOST_PANELS: Final = 8
PREFERRED: Final = ("f2d2", "meanflow", "ode-adaptive", "ode-euler", "f2d2-corrected")
MOST_POINTS: Final = 800
COLUMNS: Final = 4
CONSTANT: Final = 1e-6
"""Nats within which nine tenths of a reference must lie to count as constant: no scatter then, but histograms."""

BINS: Final = 41
AROUND: Final = 1.5
"""Nats on both sides of a constant reference that a histogram shows."""


@dataclass(frozen=True)
class _Panel:
    row: dict[str, Any]
    estimate: NDArray[np.float64]
    reference: NDArray[np.float64]


def estimated_against_reference(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """log p of every item against its reference, in nats, with Spearman's rho and the bias in the panel."""
    frame = (
        frame.sort_values("n_items", kind="stable")
        .drop_duplicates(["brief", "model"], keep="last")
        .sort_index()
    )
    found = [panel for row in _chosen(frame) if (panel := _panel(row, run_dir)) is not None]
    if not found:
        return None
    columns, rows = min(COLUMNS, len(found)), -(-len(found) // COLUMNS)
    task, split = frame["task"].iloc[0], labels.split_title(str(frame["split"].iloc[0]))
    figure, axes = style.panels(
        rows,
        columns,
        size=(1.33, 1.33),
        gaps=(0.4, 0.48),
        margins=(0.6, 0.1, 0.68, 0.48),
        title=f"{task}: estimated against reference, {split}",
    )
    constant = all(np.ptp(np.quantile(panel.reference, [0.05, 0.95])) < CONSTANT for panel in found)
    low, high = _range(found)
    for k, ax in enumerate(axes.ravel()):
        if k >= len(found):
            ax.set_axis_off()
            continue
        own = _draw_constant(ax, found[k]) if constant else _draw(ax, found[k], low, high)
        ax.tick_params(labelsize=6, labelbottom=k + columns >= len(found), labelleft=own or k % columns == 0)
    across, up = "reference log-density (nats)", "estimated log-density (nats)"
    if constant:
        across, up = (
            "estimated log-density (nats; the reference is the grey line)",
            "items (each panel scaled to its highest bar)",
        )
    figure.supxlabel(across, fontsize=8, y=0.06 / figure.get_figheight(), va="bottom")
    figure.supylabel(up, fontsize=8, x=0.06 / figure.get_figwidth(), ha="left")
    return figure


def _chosen(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """At most MOST_PANELS rows in the order of the tables: of the lines in PREFERRED order the cheapest and the
    dearest cell (of adaptive ones the dearest), then what lies between.
    """
    ends: list[int] = []
    between: list[int] = []
    rank = {name: k for k, name in enumerate(PREFERRED)}
    lines = style.series_of(frame[frame["bpd_mae_all"].notna() & (frame["bpd_ref"].notna())])
    for series in sorted(lines, key=lambda line: rank.get(line.method, len(rank))):
        index = list(series.frame.index)
        ends += [index[-1]] if series.frame["steps"].isna().all() else [index[0], index[-1]]
        between += index
    keep = list(dict.fromkeys([*ends, *between]))[:MOST_PANELS]
    return labels.as_dicts(frame.loc[sorted(keep)])


def _panel(row: dict[str, Any], run_dir: Path) -> _Panel | None:
    stored = items.items(run_dir, row["cell_id"])
    estimate, reference = (values.ravel() for values in items.estimate_and_reference(stored))
    keep = np.flatnonzero(np.isfinite(estimate) & np.isfinite(reference))
    if len(keep) < 2:
        return None
    keep = keep[np.linspace(0, len(keep) - 1, min(len(keep), MOST_POINTS)).astype(int)]
    return _Panel(row, estimate[keep], reference[keep])


def _range(found: list[_Panel]) -> tuple[float, float]:
    reference = np.concatenate([p.reference for p in found])
    low, high = np.quantile(reference, [0.002, 1.0])
    if low - reference.min() < high - low:
        low = reference.min()
    pad = max(0.12 * (high - low), 0.5)
    return float(low - pad), float(high + pad)


def _draw(ax: Axes, panel: _Panel, low: float, high: float) -> bool:
    """Draw a panel; True where it needed a vertical axis of its own."""
    colour = labels.method_named(panel.row["method"]).colour
    size = 3.0 if len(panel.reference) > 300 else 6.0
    ax.plot([low, high], [low, high], color="#8a8a8a", linewidth=0.9, zorder=1)
    ax.scatter(
        panel.reference,
        panel.estimate,
        s=size,
        color=colour,
        alpha=0.35,
        linewidths=0,
        rasterized=True,
        zorder=2,
    )
    ax.set_xlim(low, high)
    outside = np.mean((panel.estimate < low) | (panel.estimate > high + 0.12 * (high - low)))
    own = bool(outside > 0.25)
    if own:
        bottom, top = np.quantile(panel.estimate, [0.01, 0.99])
        bottom, top = min(bottom, low), max(top, high)
        ax.set_ylim(bottom - 0.08 * (top - bottom), top + 0.22 * (top - bottom))
    else:
        ax.set_ylim(low, high + 0.12 * (high - low))
    _write(ax, panel, ["own scale"] if own else [] if outside == 0 else [_outside_words(float(outside))])
    ax.set_title(style.panel_title(panel.row), fontsize=6.6, pad=3)
    ax.locator_params(nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
    return own


def _draw_constant(ax: Axes, panel: _Panel) -> bool:
    """A histogram of the estimates around a reference that is the same for all items."""
    at = float(np.median(panel.reference))
    edges = at + AROUND * np.linspace(-1, 1, BINS + 1)
    kept = panel.estimate[(panel.estimate >= edges[0]) & (panel.estimate <= edges[-1])]
    heights, _ = np.histogram(kept, bins=edges)
    colour = labels.method_named(panel.row["method"]).colour
    ax.stairs(heights / max(heights.max(), 1), edges, color=colour, fill=True, alpha=0.75, zorder=2)
    ax.axvline(at, color="#8a8a8a", linewidth=1.0, zorder=1)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, 1.35)
    outside = 1 - len(kept) / len(panel.estimate)
    _write(ax, panel, [_outside_words(outside)] if outside > 0 else [])
    ax.set_title(style.panel_title(panel.row), fontsize=6.6, pad=3)
    ax.set_yticks([])
    ax.locator_params(axis="x", nbins=4)
    ax.spines[["top", "right"]].set_visible(False)
    return False


def _outside_words(share: float) -> str:
    return f"{100 * share:.0f} % outside" if share >= 0.005 else "< 1 % outside"


def _write(ax: Axes, panel: _Panel, more: list[str]) -> None:
    """Rank correlation, bias and what else there is to say, in the panel's upper left corner."""
    rank = f"ρ {numbers.fixed(panel.row['spearman'], 2)}   " if np.isfinite(panel.row["spearman"]) else ""
    ax.text(
        0.04,
        0.97,
        "\n".join([f"{rank}bias {numbers.number(panel.row['bpd_error'], 2)}", *more]),
        transform=ax.transAxes,
        fontsize=6.3,
        va="top",
        zorder=4,
        bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1.0},
    )
