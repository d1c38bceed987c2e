"""The figures of a run, drawn from its records and items alone: nothing here evaluates a model or a measure.

One figure per task and kind (per split as well where a panel shows one split), as PNG, PDF and SVG, named
`<task>--<kind>[--<split>]`. A kind whose columns are empty is left out; a panel without data says so in itself.
Other packages add kinds by the entry-point group `flowlik.figures`: name -> a `Kind`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final

import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.figures import drawn
from flowlik.report.figures.likelihood.accuracy import bpd_against_nfe, error_against_cost
from flowlik.report.figures.likelihood.bound_gap import gap_between_bound_and_ode
from flowlik.report.figures.likelihood.few_steps import (
    error_of_few_steps,
    real_data_ablation,
    samples_against_error,
)
from flowlik.report.figures.likelihood.joint_maps import joint_maps
from flowlik.report.figures.likelihood.overview import error_overview
from flowlik.report.figures.likelihood.probes import noise_of_probes
from flowlik.report.figures.likelihood.scaling import cost_scaling
from flowlik.report.figures.likelihood.scatter import estimated_against_reference
from flowlik.report.figures.likelihood.solvers import error_of_solvers
from flowlik.report.figures.likelihood.training_cost import error_against_training
from flowlik.report.figures.samples.density_and_samples import density_maps, sample_grids
from flowlik.report.figures.samples.extractors import extractor_agreement
from flowlik.report.figures.samples.frechet import frechet_against_steps
from flowlik.report.figures.samples.guidance import self_guidance
from flowlik.report.figures.style import paper
from flowlik.report.figures.uses.comparisons import (
    gradients,
    model_comparison,
    outlier_detection,
    rare_events,
)
from flowlik.report.figures.uses.training import training_curves
from flowlik_models.files import new_folder
from flowlik_models.plugins import load_plugins

__all__ = ["KINDS", "Kind", "all_kinds", "draw_all"]
PNG_DPI: Final = 170
SVG_DPI: Final = 115
"""Of what is rasterised in an SVG: clouds of points and images."""


@dataclass(frozen=True)
class Kind:
    """A kind of figure: what draws it, its title, how to read it, and whether each split has its own."""

    draw: Callable[[pd.DataFrame, Path], Figure | None]
    title: str
    how: str
    by_split: bool = False
    timed: bool = False
    """Shows times: each hardware of a run then has a figure of its own."""


KINDS: Final[dict[str, Kind]] = {
    "bpd": Kind(
        bpd_against_nfe,
        "bits/dim against network evaluations",
        "The grey dashed line is the reference: the truth of a closed-form task, the teacher's converged "
        "likelihood otherwise. A good estimator lies on the line; lower is not better. Where values leave the "
        "plausible range the vertical axis is linear inside ±3 and logarithmic outside, which is where the plain "
        "few-step map falls. Bars: two standard errors over the items. The line is the mean over the most items; a "
        "cell on fewer items has its own reference, in the tables. Points of equal NFE are set apart, to the "
        "right of their value by at most 11 %. More than ten lines have several panels.",
    ),
    "error": Kind(
        error_against_cost,
        "Per-sample error against cost",
        "Mean absolute difference to the reference, item by item, against three costs: network forwards, time in "
        "units of one forward pass, wall-clock time. Down and to the left is better; the grey staircase is the "
        "Pareto front (nothing in the panel is both cheaper and more accurate). More than ten lines have several "
        "rows of panels: exact fields and networks, then ODEs and other estimators. Bars: 95 % bootstrap intervals. "
        "Horizontal lines are the controls: a curve above control-median knows less about single samples than a "
        "constant (but where the truth is constant on the items, as on the checkerboard, a constant is right by "
        "construction).",
        timed=True,
    ),
    "few-steps": Kind(
        error_of_few_steps,
        "Few-step likelihoods of every kind",
        "Joint maps (F2D2), plain maps, policy flows (pi-Flow) and one-step generators (RealUID): mean absolute "
        "difference to the reference against three costs, with 95 % bootstrap intervals. A policy flow's line runs "
        "over models with 1, 2 and 4 segments; dashed ones take the full Jacobian. Points of equal NFE are set apart, "
        "to the right of their value by at most 11 %; many lines have a row of panels for each kind of model. In grey "
        "the exact ODE (dotted) and the controls, which look at no network. A red circle marks a time that cannot be.",
        timed=True,
    ),
    "samples-and-error": Kind(
        samples_against_error,
        "Samples and likelihood of one evaluation",
        "One point is one model whose samples cost one evaluation. Across: the error of its likelihood. Up: distance "
        "to real samples (lower is better), precision (are samples like real ones), recall (are all real ones "
        "covered). The lower left of the first panel and the upper left of the others is where to be. Grey: the "
        "converged sampler, and the error of a constant. Bars: 95 % intervals; those of precision and recall are "
        "those of a share of so many samples.",
    ),
    "real-data": Kind(
        real_data_ablation,
        "RealUID with and without real data",
        "The same one-step generator distilled without real data (a = b = 1), with it, and fine-tuned on it. Real data "
        "help where the intervals do not meet; the table says so in words. Grey: the converged sampler. Bars: 95 % "
        "intervals.",
    ),
    "rules": Kind(
        error_of_solvers,
        "Solvers that need no training",
        "Fixed-step solvers at equal numbers of forwards, a panel per time grid: solid in moment-whitened coordinates, "
        "dashed in plain ones, dotted with Richardson extrapolation. Down and to the left is better.",
    ),
    "probes": Kind(
        noise_of_probes,
        "Noise of the trace estimators",
        "The estimators' own mean standard error against the derivative products they spend, pilots included. Grey "
        "lines fall like one over the square root of the products: a choice on a lower line is quieter at equal cost. "
        "Whether the bars can be trusted stands in the tables, as coverage.",
    ),
    "ode-gap": Kind(
        gap_between_bound_and_ode,
        "Bound of the diffusion and likelihood of the ODE",
        "One point is one item: how many bits/dim the bound that diffusion papers report is above the likelihood of "
        "the same network's ODE, with two standard errors of its draws. Of the true field the points lie on zero. Of a "
        "trained one the two are different numbers, and what is left beyond the bars is their gap.",
        by_split=True,
    ),
    "joint-maps": Kind(
        joint_maps,
        "Joint flow maps",
        "Every trained joint map read by the same estimator. Left: the mean error, whose zero is the grey line; "
        "middle: how far the order of the items is from the reference's (down is better); right: the mean absolute "
        "error item by item, with the controls. A map that is near zero on the left and high on the right has the "
        "right mean and the wrong samples. Bars: 95 % bootstrap intervals.",
    ),
    "training-cost": Kind(
        error_against_training,
        "Error against training time",
        "One point is one trained model: the error of its likelihood by one evaluation (filled, with 95 % bootstrap "
        "interval) and by the best of at most eight (open, where more than one help), against the processor time that "
        "its card tells of its training and of the trajectories it learned from, without that of its teacher or of "
        "the map it started from. Down and to the left is better. In brackets: its parameters.",
    ),
    "scatter": Kind(
        estimated_against_reference,
        "Estimated against reference log-density",
        "One point is one item; the diagonal is exact. A cloud parallel to the diagonal is a bias, a wide one is "
        "noise, a flat one does not know which items are likely (Spearman ρ near 0). A panel marked “own scale” "
        "is so far off that the common axis would not show it. Where the truth is the same for all items (the "
        "checkerboard) the panels are histograms of the estimates around it. Biases are in bits/dim.",
        by_split=True,
    ),
    "density": Kind(
        density_maps,
        "Density maps",
        "log-density on the same grid with the same colour scale, clipped to eight nats below the highest value "
        "of the truth; red is more than one nat above it. Under each panel stands the mass, the "
        "integral of the density over the grid: 1 for a density, anything else is not one.",
    ),
    "frechet": Kind(
        frechet_against_steps,
        "Fréchet distance against steps",
        "Distance between features of generated and of real samples; lower is better. The extractor is named on "
        "the axis, and only the standard Inception network makes the distance an FID.",
    ),
    "extractors": Kind(
        extractor_agreement,
        "Feature networks held against each other",
        "One point is one sampler: its distance to real samples in the record's own features across, in another "
        "network up; lower is better in both. The rank correlation says how far the two agree on the order. Samplers "
        "that one network alone prefers have pleased that network. Bars: 95 % intervals over the samples.",
    ),
    "guidance": Kind(
        self_guidance,
        "Self-guidance",
        "Few-step samples from noise that was moved towards a higher predicted likelihood, against the step size of "
        "the move. Left: distance to real samples, lower is better. Middle: precision (are the samples like real ones) "
        "and recall (are all real ones covered). Right: bits/dim of the samples under the exact density or the "
        "converged teacher; lower is likelier, not better. Guidance is worth something where its curve leaves those of "
        "the controls. Bars and bands: 95 % intervals.",
    ),
    "comparison": Kind(
        model_comparison,
        "Ranking models by their likelihood",
        "Rank correlation (Kendall's tau) between estimated and exact mean likelihoods of variants of a model that "
        "differ by less than the bias of a few Euler steps: 1 is the exact order, 0 a random one. Bars: 95 % "
        "bootstrap intervals over the test points. A bias that is the same for all models does no harm here, one "
        "that differs does.",
    ),
    "outliers": Kind(
        outlier_detection,
        "Out-of-distribution detection",
        "Probability that a test image gets a higher likelihood than one of another data set: 1 tells them apart, 0.5 "
        "is chance, less means that the others look likelier. The estimator with the most evaluations is nearest to "
        "what the model itself says. Bars: 95 % intervals.",
    ),
    "importance": Kind(
        rare_events,
        "Rare events by importance sampling",
        "Points of a known proposal weighed by the estimated density. The dashed lines are the values of the exact "
        "density at the same points, the grey band is the noise that exact weights would have. A constant bias shows "
        "in the mass and in P(A); the odds of two rare events need the right ratio between the tails.",
    ),
    "gradient": Kind(
        gradients,
        "Gradient of the estimate",
        "The gradient of the estimate against that of the exact likelihood: in x, where 1 is the right direction "
        "(bars reach down to the 5th percentile), and in the weights of a network, against the converged likelihood of "
        "its own field. An estimate whose gradient in the weights points elsewhere is no objective for training.",
    ),
    "training": Kind(
        training_curves,
        "Bits/dim along training",
        "The averages kept along a model's training, each by the same estimator on the same items, against the "
        "processor time spent until then; the finished model is the last point. Lower is a better model here, as far "
        "as the estimator is near its converged value. Bars: two standard errors over the items, most of which is "
        "common to all points: the table has the errors of the differences.",
    ),
    "samples": Kind(
        sample_grids,
        "Samples",
        "Samples of the same few-step maps, from the same noise: the map whose likelihood is reported should also "
        "be one that samples.",
    ),
}


@cache
def all_kinds() -> dict[str, Kind]:
    """All kinds by name: those above, then those of other packages.

    Raises:
        ValueError: two packages give the same name, or one that of a kind above.
    """
    return KINDS | load_plugins("flowlik.figures", KINDS, _admitted)


def _admitted(name: str, loaded: Any) -> Kind:
    """The kind that an entry point gives; a figure that fails is left out with a warning, and the others are drawn.

    Raises:
        TypeError: it is no `Kind`. ValueError: files cannot bear the name.
    """
    if not isinstance(loaded, Kind):
        raise TypeError(f"expected a flowlik.report.figures.kinds.Kind, got {loaded!r}")
    if labels.slug(name) != name:
        raise ValueError(f"files cannot bear that name; {labels.slug(name)!r} would do")

    def draw(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
        try:
            return loaded.draw(frame, run_dir)
        except Exception as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())
            message = f"figure {name!r} is left out: {why}"
            warnings.warn_explicit(message, UserWarning, filename="flowlik.figures", lineno=1)
            return None

    return replace(loaded, draw=draw)


OVERVIEW: Final = "overview"
SCALING: Final = "scaling"


def draw_all(run_dir: Path) -> list[Path]:
    """Draw every figure that the records of `run_dir` support into `run_dir/figures`; paths of PNG, PDF and SVG.

    An empty run gives an empty list. Figures of an earlier call that the records no longer support are removed, so
    that the folder never shows two runs; files that were not drawn here stay (`flowlik.report.figures.drawn`). Nothing
    changes before all of them are drawn.
    """
    records = frames.load(run_dir)
    folder = run_dir / "figures"
    paths: list[Path] = []
    inside = folder / drawn.LIST if folder.is_dir() else folder  # which may lie on another disk
    with paper(), new_folder(beside=inside) as made:
        for name, figure in _figures(records, run_dir):
            _lay_out(figure)
            png, pdf, svg = (made / f"{name}.{kind}" for kind in ("png", "pdf", "svg"))
            save_png(figure, png)
            figure.savefig(pdf, dpi=PNG_DPI, metadata={"CreationDate": None})
            # with text, for the page; without a date the same figure is the same file
            figure.savefig(svg, dpi=SVG_DPI, metadata={"Date": None}, transparent=True)
            paths += [png, pdf, svg]
        return drawn.put_into(folder, paths)


def save_png(figure: Figure, path: Path) -> None:
    """In 256 colours: a figure in full colour takes three times the room and looks the same."""
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=PNG_DPI)
    # no dithering, which would speckle even areas
    with Image.open(whole) as picture:
        reduced = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    reduced.save(path, format="png", optimize=True)


def _lay_out(figure: Figure) -> None:
    """Find the layout once: by itself matplotlib would find it again for each file and draw twice for it."""
    FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)
        figure.set_layout_engine("none")


def _figures(records: pd.DataFrame, run_dir: Path) -> Iterator[tuple[str, Figure]]:
    usable = frames.averaged(frames.usable(records))
    figure = error_overview(usable)
    if figure is not None:
        yield OVERVIEW, figure
    for tail, part in _by_machine(usable):
        figure = cost_scaling(part)
        if figure is not None:
            yield SCALING + tail, figure
    for task, of_task in usable.groupby("task", sort=True):
        for kind, what in all_kinds().items():
            parts = labels.splits(of_task) if what.by_split else [None]
            for split in parts:
                frame = of_task if split is None else of_task[of_task["split"] == split]
                tail = f"--{labels.slug(split)}" if split is not None and len(parts) > 1 else ""
                for machine, part in _by_machine(frame) if what.timed else [("", frame)]:
                    figure = what.draw(part, run_dir)
                    if figure is not None:
                        yield f"{labels.slug(str(task))}--{kind}{tail}{machine}", figure


def _by_machine(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The frame, or where its times come from several machines a part for each, with the end of its file's name."""
    machines = frames.machines(frame)
    if len(machines) < 2:
        return [("", frame)]
    return [(f"--{labels.slug(machine)}", frames.of_machine(frame, machine)) for machine in machines]
