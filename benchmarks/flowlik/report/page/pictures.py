"""Figures as they stand in the page: inlined, sized and described."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pandas as pd

from flowlik.report import frame as frames
from flowlik.report import labels, numbers, samples
from flowlik.report.figures.kinds import all_kinds
from flowlik.report.page import svg

PIXEL: Final = 0.78
"""CSS pixels a pixel of a figure is shown at, at most."""

PIXELS_A_POINT: Final = 1.84
"""The same of a point of an SVG."""


@dataclass(frozen=True)
class Picture:
    """A figure as it stands in the page: SVG or PNG inlined, its words, its size in CSS pixels, and whether it follows
    a dark page or stands on white."""

    title: str
    how: str
    alt: str
    source: str
    width: int
    height: int
    follows: bool = False


def _pictures(run_dir: Path, task: str, frame: pd.DataFrame) -> Iterator[Picture]:
    for kind, what in all_kinds().items():
        for split in [None, *labels.splits(frame)] if what.by_split else [None]:
            for machine in ["", *frames.machines(frame)] if what.timed else [""]:
                tail = "".join(f"--{labels.slug(part)}" for part in (split, machine) if part)
                path = run_dir / "figures" / f"{labels.slug(task)}--{kind}{tail}.png"
                title = what.title + (f", {labels.split_title(split)}" if split else "")
                title += f", times of {machine}" if machine else ""
                picture = _picture(path, title, what.how, f"{title}, task {task}. {_alt(kind, frame, split)}")
                if picture is not None:
                    yield picture


def _overview(run_dir: Path, usable: pd.DataFrame) -> Picture | None:
    how = (
        "Mean absolute error per sample in bits/dim, darker is worse: a row is a method on exact fields or on networks "
        "(by name where a task has several; of several tolerances the most exact), with its fewest and its most steps; "
        "one column per task, its first split, or of a single task one per split. "
        "† marks traces by Hutchinson's probes. Rows of one task alone, other tolerances and splits "
        "stand in the figures of the task."
    )
    tasks = ", ".join(sorted(usable["task"].unique()))
    alt = f"Heat map of the mean absolute error of every method on {tasks}; the same numbers stand in the tables."
    return _picture(
        run_dir / "figures" / "overview.png",
        "Per-sample error of every method on every task",
        how,
        alt,
        follow=False,  # words on coloured cells
    )


def _scaling(run_dir: Path, usable: pd.DataFrame) -> list[Picture]:
    how = (
        "CPU seconds of a call against the number of dimensions, items in the batch, probes and steps; in brackets the "
        "slope of a straight line (1: proportional), or the slopes of both ends of a bent one. "
        "The dimensions are those of Gaussians with an image-like "
        "spectrum, whose field costs two d x d products. CPU time varies between machines and hours, slopes less."
    )
    alt = "Four panels of lines on logarithmic axes; the slopes stand in the legends."
    folder, title = run_dir / "figures", "Cost against size"
    found = [_picture(folder / "scaling.png", title, how, alt)]
    for machine in frames.machines(usable):
        path = folder / f"scaling--{labels.slug(machine)}.png"
        found.append(_picture(path, f"{title}, times of {machine}", how, alt))
    return [picture for picture in found if picture is not None]


def _picture(path: Path, title: str, how: str, alt: str, *, follow: bool = True) -> Picture | None:
    """The figure of this name as SVG, or as PNG where there is no SVG; on white without `follow`."""
    words = (title, how, alt.strip())
    try:
        text = path.with_suffix(".svg").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    points = svg.size(text)
    if points is not None:
        width, height = (round(PIXELS_A_POINT * one) for one in points)
        return Picture(*words, svg.for_the_page(text, follow=follow), width, height, follow)
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24:
        return None
    width, height = struct.unpack(">II", data[16:24])
    source = "data:image/png;base64," + base64.b64encode(data).decode("ascii")
    return Picture(*words, source, round(width * PIXEL), round(height * PIXEL))


def _alt(kind: str, frame: pd.DataFrame, split: str | None) -> str:
    """In words what the figure shows; the tables of the section hold every number."""
    part = frame if split is None else frame[frame["split"] == split]
    methods = part[part["method"] != "control"]
    names = ", ".join(dict.fromkeys(methods["series"]))
    if kind in ("bpd", "error", "few-steps") and methods["bpd_mae_all"].notna().any():
        ranked = methods[methods["bpd_mae_all"].notna()].sort_values("bpd_mae_all", kind="stable")
        best, worst = ranked.iloc[0], ranked.iloc[-1]
        return (
            f"Methods: {names}. Reference {numbers.fixed(methods['bpd_ref'].median())} bits/dim. "
            f"Smallest mean error {numbers.number(best['bpd_mae_all'], 2)} ({best['row']}), "
            f"largest {numbers.number(worst['bpd_mae_all'], 2)} ({worst['row']})."
        )
    if kind == "density":
        shown = methods[methods["mass"].notna()]
        masses = (f"{row['row']} mass {numbers.number(row['mass'])}" for row in labels.as_dicts(shown))
        return f"Panels: the truth where it is known; {'; '.join(masses)}."
    if kind in ("frechet", "samples"):
        shown = methods[methods["frechet"].notna()]
        values = (f"{row['row']} {numbers.number(row['frechet'])}" for row in labels.as_dicts(shown))
        return f"{labels.distance_names(shown)}: {'; '.join(values)}."
    if kind in ("samples-and-error", "real-data"):
        few = samples.few_steps(samples.samples_measured(methods))
        shown = few[few["distance"].notna() & (few["sample_nfe"] == 1)].drop_duplicates(["method", "model"])
        values = (f"{row['model']} {numbers.number(row['distance'])}" for row in labels.as_dicts(shown))
        return f"Distances of one-evaluation samples: {'; '.join(values)}."
    return f"Methods: {names}."
