"""A figure: drawn from the records of one task alone, it evaluates nothing. It gets a place in every report."""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from flowlik.report.figures.kinds import Kind


def draw(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    """Mean error and its 95th percentile of every method; None where the records do not say.

    `frame` has the columns of docs/records.md and labels: `method` (`control` for control rows), `row` (one a line).
    What was kept of single items lies in `run_dir / "items"`.
    """
    shown = frame[frame["bpd_err_p95"].notna() & (frame["method"] != "control")]
    if shown.empty:
        return None
    figure = Figure(
        figsize=(7.1, 0.9 + 0.22 * len(shown)), layout="constrained"
    )  # inches; saved by the caller
    ax = figure.subplots()
    names = shown["row"] + ", " + shown["model"]
    ax.hlines(names, shown["bpd_mae"], shown["bpd_err_p95"], color="0.6")
    ax.plot(shown["bpd_mae"], names, "o", label="mean")
    ax.plot(shown["bpd_err_p95"], names, "|", label="95th percentile")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")  # pages set text as it is: no formulas
    ax.set_xlabel("|error| per sample, bits/dim")
    ax.legend()
    return figure


ERROR_TAIL = Kind(
    draw,
    title="Tail of the error",
    how="Mean error of single samples and its 95th percentile. A long line is a method that is far off on a few.",
    by_split=True,  # one figure a split; `timed=True`: one a machine
)
