"""Every kind of figure can be read: nothing lies on anything else, nothing is cut, no panel is squeezed."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_run import record, write_fake_run, write_rows
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from test_few_steps import few_steps_run
from test_use_figures import USES, guided_run, used_run

from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.figures import grouping, kinds, own, style
from flowlik.report.figures.likelihood.scaling import slope_words

LEAST_HEIGHT = 1.0
"""Inches of a panel's axes."""

ROOM = 0.5
"""Pixels by which boxes of text may meet: they are round glyphs' frames."""


def timed(**known: Any) -> dict[str, Any]:
    """A closed-form cell with an error, its interval and every cost."""
    nfe, error = known["nfe_mean"], known["bpd_mae"]
    costs = {"forward_equivalents": 9.0 * nfe, "items_per_s": 1e3 / nfe, "bpd": 1.0, "bpd_ref": 1.0}
    ends = {"bpd_mae_lo": 0.5 * error, "bpd_mae_hi": 1.5 * error, "model": "closed-form", "family": "ode"}
    return record(**(costs | ends | known))


def controls(task: str) -> list[dict[str, Any]]:
    levels = {
        "control-mean": 0.132,
        "control-median": 0.131,
        "control-component": 0.1,
        "control-gaussian": 0.6,
    }
    return [
        record(
            task=task,
            estimator=name,
            estimator_label=name,
            family="control",
            bpd=1.0,
            bpd_ref=1.0,
            bpd_mae=value,
        )
        for name, value in levels.items()
    ]


def rules() -> list[dict[str, Any]]:
    rows = []
    plain = itertools.product(
        ("ode", "whitened-ode"),
        ("euler", "midpoint", "heun", "rk4"),
        ("uniform", "cosine", "logsnr"),
        (4, 8, 16),
    )
    stretched = itertools.product(("whitened-ode",), ("rk4",), ("uniform,clock=stretched",), (4, 8, 16))
    ramped = itertools.product(("whitened-ode",), ("adams_pec",), ("ramped,clock=stretched",), (4, 8, 16))
    for name, solver, grid, n in (*plain, *stretched, *ramped):
        known = dict(part.split("=") for part in f"grid={grid}".split(","))
        label = f"{name}[solver={solver},steps={n},grid={grid}]"
        rows.append(
            timed(
                estimator=name,
                estimator_label=label,
                params=known,
                solver=solver,
                steps=n,
                nfe_mean=n,
                bpd_mae=1 / n,
            )
        )
    return rows


def peers() -> list[dict[str, Any]]:
    """Costs within less than a factor of three: no two powers of two lie among them."""
    rows = []
    for k, name in enumerate(("ode", "peer-zuko", "peer-torchode", "peer-flow-matching")):
        for tol, nfe in ((1e-3, 90.0 + 7 * k), (1e-4, 130.0 + 7 * k), (1e-5, 190.0 + 7 * k)):
            known = {"rtol": tol, "bpd_mae": tol, "nfe_mean": nfe, "cpu_s_median": 1e-2 * nfe}
            label = f"{name}[rtol={tol:g}]"
            rows.append(timed(estimator=name, estimator_label=label, steps=None, solver="dopri5", **known))
    return rows


def probes() -> list[dict[str, Any]]:
    choices = [
        {"noise": n, "basis": b, "control": c}
        for n in ("rademacher", "orthogonal")
        for b in ("pixel", "pca")
        for c in ("none", "gaussian")
    ]
    rows = []
    for choice, count in itertools.product(choices, (1, 2, 4)):
        label = f"ode[probes={count},{','.join(f'{k}={v}' for k, v in choice.items())}]"
        known = {
            "trace": "hutchinson",
            "probes": count,
            "vjp_mean": 35.0 * count,
            "stderr_mean": 0.1 / count**0.5,
        }
        rows.append(
            record(
                estimator="ode",
                estimator_label=label,
                family="ode",
                params=choice,
                steps=None,
                **known,
                bpd=1.0,
            )
        )
    return rows


def joint_maps() -> list[dict[str, Any]]:
    rows = []
    for k, n in itertools.product(range(6), (1, 2, 4, 8)):
        error = 0.3 ** (k + 1) / n
        ends = {
            "bpd_error": -error,
            "bpd_error_lo": -1.2 * error,
            "bpd_error_hi": -0.8 * error,
            "spearman": 1 - error,
        }
        ends |= {"bpd_mae": error, "bpd_mae_lo": 0.9 * error, "bpd_mae_hi": 1.1 * error}
        rows.append(
            record(
                estimator_label=f"f2d2[steps={n}]",
                model=f"shortcut-distill-f2d2-{k}",
                steps=n,
                nfe_mean=n,
                **ends,
            )
        )
    return rows


def scaling() -> list[dict[str, Any]]:
    """Time that is proportional to the batch, but to the dimension only where it is high."""

    def cell(task: str, dim: int, batch: int, n: int = 4) -> dict[str, Any]:
        label = f"ode[solver=euler,steps={n},trace=hutchinson]"
        seconds = 1e-4 * batch * (1 + (dim / 64) ** 2) * n
        known = {"model": "closed-form", "trace": "hutchinson", "probes": 1, "nfe_mean": n, "steps": n}
        known |= {"cpu_s_median": seconds, "extra": {"timing_batch": batch}, "n_items": batch, "dim": dim}
        return record(task=task, estimator="ode", estimator_label=label, solver="euler", **known)

    rows = [cell(f"gaussian-{d}d", d, 64) for d in (2, 16, 64, 256, 1024)]
    return (
        rows + [cell("digits", 64, b) for b in (1, 4, 16, 64)] + [cell("digits", 64, 2, n) for n in (1, 2, 8)]
    )


def extractors() -> list[dict[str, Any]]:
    """Samplers of many names whose distances in two further networks lie close together."""
    rows = []
    for k, model in enumerate(
        ("direct-f2d2", "meanflow-f2d2", "shortcut-distill-f2d2", "meanflow", "shortcut")
    ):
        further = {
            name: {"extractor": name, "frechet": 10.0 + k, "frechet_se": 1.0} for name in ("pixels", "lite-0")
        }
        own = {"frechet": 1.0 + 0.1 * k, "frechet_se": 0.1, "extractor": "digits-cnn-64"}
        rows.append(
            timed(model=model, task="digits", nfe_mean=1, bpd_mae=0.1, **own, extra={"in_features": further})
        )
    return rows


def training() -> list[dict[str, Any]]:
    curve = {"cpu_hours": [0.5, 1.0, 2.0], "bpd": [3.0, 2.5, 2.4], "gain_se": [0.1, 0.1, 0.1]}
    return [record(cell_id=s, split=s, bpd=2.4, extra={"training": curve}) for s in ("test", "train")]


def training_cost() -> list[dict[str, Any]]:
    """Models of long names whose trainings take nearly the same."""
    rows = joint_maps()
    for row in rows:
        row["extra"] = {"train_cpu_seconds": 60.0 + 5.0 * int(row["model"][-1]), "parameters": 1e6}
    return rows


def bounds_run(folder: Path) -> None:
    """Bounds by many draws beside their ODE, with their items."""
    gaps = {"ode_gap": 0.02, "ode_gap_se": 0.001, "ode_gap_sd": 0.0}
    rows, log_prob = [], np.linspace(-90.0, -60.0, 20)
    (folder / "items").mkdir(parents=True)
    for draws in (8, 16, 32, 64):
        label, known = f"elbo[draws={draws}]", {"dim": 64, "nfe_mean": draws, "bpd": 2.0, "family": "bound"}
        rows.append(record(cell_id=label, estimator="elbo", estimator_label=label, extra=gaps, **known))
        values = {
            "ref": log_prob,
            "log_prob": log_prob - 1.0,
            "stderr": np.ones(20),
            "valid": np.ones(20, bool),
        }
        np.savez(folder / "items" / f"{label}.npz", **values)
    write_rows(folder, rows)


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    f.__name__: f for f in (rules, peers, probes, joint_maps, scaling, extractors, training, training_cost)
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    """Every kind of figure, laid out as for its files."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rows in ROWS.items():
        write_rows(folder / name, [*rows(), *controls("gmm-2d")])
    write_fake_run(folder / "fake", tasks=("gmm-2d", "digits"), n=20, splits=("test", "train"))
    few_steps_run(folder / "few-steps")
    bounds_run(folder / "bounds")
    guided_run(folder / "guided")
    for use in USES:
        used_run(folder / f"use-{use}", use)
    found: dict[str, Figure] = {}
    with style.paper():
        for run in sorted(folder.iterdir()):
            for name, figure in kinds._figures(frames.load(run), run):
                kinds._lay_out(figure)
                figure.draw_without_rendering()  # legends have their places only then
                found[f"{run.name}: {name}"] = figure
    return found


def test_every_kind_is_among_them(drawn: dict[str, Figure]) -> None:
    shown = {name.split(": ")[1].split("--")[min(1, name.count("--"))] for name in drawn}
    assert shown >= {*kinds.KINDS, kinds.OVERVIEW, kinds.SCALING}


def boxes(figure: Figure, texts: list[Text]) -> list[tuple[str, Bbox]]:
    renderer = FigureCanvasAgg(figure).get_renderer()
    shown = [text for text in texts if text.get_visible() and text.get_text().strip()]
    # of a label with a line to what it names, the words alone
    return [(text.get_text(), Text.get_window_extent(text, renderer)) for text in shown]


def ticks(ax: Axes) -> Iterator[Text]:
    if not ax.axison or not ax.get_visible():
        return
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if low <= tick.get_loc() <= high and tick.label1.get_visible():
                yield tick.label1


def words(figure: Figure) -> list[Text]:
    """All text but the ticks': titles, labels of axes, controls, legends."""
    found = [text for text in figure.texts if text.get_text()]
    for legend in figure.legends:
        found += legend.get_texts()
    for ax in figure.axes:
        if not ax.get_visible():
            continue
        found += [ax.title, ax._left_title]
        if ax.axison:
            found += [ax.xaxis.label, ax.yaxis.label]
        found += [t for t in ax.texts if not ax.collections or ax.get_title() or t.get_fontsize() > 6.4]
        legend = ax.get_legend()
        found += legend.get_texts() if legend else []
    return found


def overlaps(found: list[tuple[str, Bbox]]) -> list[tuple[str, str]]:
    def meet(a: Bbox, b: Bbox) -> bool:
        across = min(a.x1, b.x1) - max(a.x0, b.x0)
        return across > ROOM and min(a.y1, b.y1) - max(a.y0, b.y0) > ROOM

    return [(a, b) for (a, first), (b, second) in itertools.combinations(found, 2) if meet(first, second)]


def test_no_two_texts_lie_on_one_another(drawn: dict[str, Figure]) -> None:
    wrong = {}
    for name, figure in drawn.items():
        texts = [*(tick for ax in figure.axes for tick in ticks(ax)), *words(figure)]
        if found := overlaps(boxes(figure, texts)):
            wrong[name] = found
    assert not wrong


def test_no_text_leaves_the_figure(drawn: dict[str, Figure]) -> None:
    wrong = []
    for name, figure in drawn.items():
        width, height = figure.bbox.width, figure.bbox.height
        texts = [*(tick for ax in figure.axes for tick in ticks(ax)), *words(figure)]
        for text, box in boxes(figure, texts):
            if box.x0 < -ROOM or box.y0 < -ROOM or box.x1 > width + ROOM or box.y1 > height + ROOM:
                wrong.append((name, text, box.extents.round(), (width, height)))
    assert not wrong


def test_no_legend_is_cut_or_wider_than_its_figure(drawn: dict[str, Figure]) -> None:
    for name, figure in drawn.items():
        legends = [*figure.legends, *(legend for ax in figure.axes if (legend := ax.get_legend()))]
        for legend in legends:
            assert not [text for text in legend.get_texts() if "…" in text.get_text()], name
            assert (
                legend.get_window_extent(FigureCanvasAgg(figure).get_renderer()).width <= figure.bbox.width
            ), name


def test_panels_keep_their_height_whatever_the_legend_takes(drawn: dict[str, Figure]) -> None:
    heights = {
        name: min(
            ax.get_position().height * figure.get_figheight()
            for ax in figure.axes
            if ax.axison and ax.get_visible()
        )
        for name, figure in drawn.items()
        if name.split("--")[-1] not in ("samples",)
    }
    assert {name: height for name, height in heights.items() if height < LEAST_HEIGHT} == {}


def test_every_logarithmic_axis_has_two_numbers_at_least(drawn: dict[str, Figure]) -> None:
    wrong = []
    for name, figure in drawn.items():
        for ax in figure.axes:
            for axis in (ax.xaxis, ax.yaxis) if ax.axison and ax.get_visible() and ax.lines else ():
                low, high = sorted(axis.get_view_interval())
                shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
                if (
                    axis.get_scale() == "log"
                    and len(shown) < 2
                    and high / low > 1.5
                    and not one_value(ax, axis)
                ):
                    wrong.append((name, axis.axis_name, low, high))
    assert not wrong


def one_value(ax: Axes, axis: Axis) -> bool:
    """Whether all points of a panel lie at one place of an axis; what runs across the panel has no place on it."""
    of = {"x": Line2D.get_xdata, "y": Line2D.get_ydata}[axis.axis_name]
    drawn = [line for line in ax.lines if line.get_transform().contains_branch(ax.transData)]
    return len({float(at) for line in drawn if across(line) for at in np.atleast_1d(of(line))}) <= 1


def across(line: Line2D) -> bool:
    return list(np.atleast_1d(line.get_xdata())) != [0, 1]


def test_no_panel_holds_more_lines_than_can_be_told_apart(drawn: dict[str, Figure]) -> None:
    wrong = {}
    for name, figure in drawn.items():
        for ax in figure.axes:
            looks = {
                (line.get_color(), line.get_marker(), line.get_linestyle())
                for line in ax.lines
                if points(line) and np.size(line.get_xdata()) > 1
            }
            if len(looks) > grouping.MOST:
                wrong[name] = len(looks)
    assert not wrong


def points(line: Line2D) -> bool:
    """Whether a line is one of points, no level, bar or guide."""
    return line.get_marker() not in ("None", None, "", "_", "|") and len(np.atleast_1d(line.get_xdata())) > 0


def test_no_point_costs_less_than_one_evaluation(drawn: dict[str, Figure]) -> None:
    least = {
        name: min(np.min(np.atleast_1d(line.get_xdata())) for line in ax.lines if points(line))
        for name, figure in drawn.items()
        for ax in figure.axes
        if re.match("NFE|steps", ax.get_xlabel()) and any(map(points, ax.lines))
    }
    assert least
    assert {name: at for name, at in least.items() if at < 1} == {}


@pytest.mark.parametrize("count", [1, 2, 8, 23])
def test_points_set_apart_stay_near_and_never_left_of_their_cost(count: int) -> None:
    apart = style.dodges(count)
    assert len(set(apart)) == count
    assert min(apart) == 1.0
    assert max(apart) <= 2**style.DODGED + 1e-12


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ({"closed-form": 4, "direct-f2d2": 6}, [""]),
        ({"closed-form": 4, "direct-f2d2": 7}, ["exact field", "networks"]),
        ({"direct-f2d2": 6, "ode teacher": 6}, ["other estimators", "ODE"]),
        ({"direct-f2d2": 23}, ["(1 of 3)", "(2 of 3)", "(3 of 3)"]),
        ({"closed-form": 1, "direct-f2d2": 12}, ["exact field", "networks (1 of 2)", "networks (2 of 2)"]),
    ],
)
def test_many_lines_have_panels_of_at_most_ten(models: dict[str, int], words: list[str]) -> None:
    rows = [
        timed(
            estimator="ode" if model.startswith("ode") else "f2d2",
            estimator_label=f"f2d2[kind={k}]",
            model=model,
            cell_id=f"{model}{k}",
            nfe_mean=1,
            bpd_mae=0.1,
        )
        for model, count in models.items()
        for k in range(count)
    ]
    frame = frames.prepare(pd.DataFrame(rows))
    parts = grouping.in_panels(frame)
    assert sorted(name for name, _ in parts) == sorted(words)
    assert sum(len(part) for _, part in parts) == len(frame)
    assert max(grouping.lines(part) for _, part in parts) <= grouping.MOST


def test_one_line_looks_the_same_in_every_panel() -> None:
    rows = [
        timed(estimator_label=f"f2d2[kind={k}]", cell_id=f"{k}", model="m", nfe_mean=1, bpd_mae=0.1)
        for k in range(3)
    ]
    frame = frames.prepare(pd.DataFrame(rows))
    whole = {series.label: series.style for series in style.series_of(frame)}
    last = style.series_of(frame[frame["cell_id"] == "2"], frame)
    assert [series.style for series in last] == [whole[last[0].label]]
    assert len({(look["color"], look["marker"]) for look in whole.values()}) == 3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((1, 2, 4, 8), [1, 2, 4, 8]),
        ((1, 2), [1, 2]),
        ((4, 8, 16), [4, 8, 16]),
        ((90.0, 150.0, 210.0), [100, 150, 200]),
        ((1, 3, 300), [1, 4, 16, 64, 256]),
        ((0.02, 3.0), [0.03, 0.1, 0.3, 1, 3]),
        ((1, 2048), [1, 4, 16, 64, 256, 1024]),
        ((2.4, 8.5), [4, 6, 8]),
        ((1, 1_000_000), [1, 10, 100, 1000, 10_000, 100_000, 1_000_000][::2]),
    ],
)
def test_a_cost_has_round_numbers_and_never_one_alone(
    values: tuple[float, ...], expected: list[float]
) -> None:
    ax = style.new_figure(3, 2).subplots()
    style.cost_axis(ax, values)
    assert list(ax.get_xticks()) == pytest.approx(expected)


def test_one_step_alone_is_marked_on_its_axis() -> None:
    ax = style.new_figure(3, 2).subplots()
    style.cost_axis(ax, [4.0])
    assert 4.0 in list(ax.get_xticks())


@pytest.mark.parametrize(
    "levels", [(0.1, 0.1001, 0.101, 0.102), (0.9, 0.93, 0.96, 0.99), (1e-5, 0.5, 0.52, 0.97)]
)
def test_labels_of_controls_stay_apart_wherever_they_are(levels: tuple[float, ...]) -> None:
    names = [f"control-{k}" for k in range(len(levels))]
    placed = style._apart(list(levels), names, 0.08)
    assert placed == sorted(placed)
    assert np.diff(placed).min() >= 0.08 - 1e-9
    assert placed[-1] <= 1.04
    assert style._apart([0.1, 0.5], ["a", "b"], 0.08) == pytest.approx([0.1, 0.5])


def test_a_slope_is_given_of_a_straight_line_and_none_of_a_bent_one() -> None:
    x = np.array([2.0, 16.0, 64.0, 256.0, 1024.0])
    assert slope_words(x, 3e-5 * x**1.5) == "slope 1.50"
    assert slope_words(x, np.maximum(1.0, x / 64)) == "no slope"


def test_what_is_one_at_most_has_no_axis_beyond_it(drawn: dict[str, Figure]) -> None:
    bounded = [
        ax
        for name, figure in drawn.items()
        if re.search("--(outliers|comparison)$", name)
        for ax in figure.axes
    ]
    assert bounded
    for ax in bounded:
        if ax.get_visible():
            assert max(ax.get_yticks()) <= 1.0 + 1e-9
            assert ax.get_ylim()[1] > 1.0  # room for the markers at 1


def test_no_panel_of_few_steps_holds_more_lines_than_can_be_told_apart(drawn: dict[str, Figure]) -> None:
    figure = drawn["few-steps: gmm-2d--few-steps"]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert {"flow maps", "policy flows", "one-step generators"} <= {title.split(": ")[0] for title in titles}


@pytest.mark.parametrize(("count", "titles"), [(5, {""}), (6, {"exact field", "networks"})])
def test_exact_fields_and_networks_part_where_lines_are_many(
    tmp_path: Path, count: int, titles: set[str]
) -> None:
    rows = [
        timed(estimator_label=f"f2d2[steps=1,kind={k}]", nfe_mean=1, bpd_mae=0.1 + k, model=model)
        for k in range(count)
        for model in ("closed-form", "direct-f2d2")
    ]
    write_rows(tmp_path, rows)
    figure = kinds.error_against_cost(frames.averaged(frames.load(tmp_path)), tmp_path)
    assert figure is not None
    assert {ax.get_title(loc="left") for ax in figure.axes[::3]} == titles


def test_the_overview_is_mostly_full(tmp_path: Path) -> None:
    write_fake_run(tmp_path, n=20, steps=(1, 2, 4, 8))
    usable = frames.averaged(frames.usable(frames.load(tmp_path)))
    figure = kinds.error_overview(usable)
    assert figure is not None
    table = figure.axes[0].collections[0].get_array()
    assert np.ma.count(np.ma.masked_invalid(table)) > 0.66 * table.size
    names = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(set(names)) == len(names)
    assert {text.get_text() for text in figure.axes[0].get_xticklabels()} == set(usable["task"].unique())
    assert labels.METHODS["f2d2"].label in " ".join(names)


@pytest.mark.parametrize(("width", "size"), [("single", 8.0), ("double", 10.0), ("60mm", 9.0)])
def test_a_legend_of_ones_own_figure_fits_its_width(tmp_path: Path, width: str, size: float) -> None:
    label = "ode[steps=4,solver=rk4,grid=logsnr,clock=stretched,divergence=quadrature]"
    write_rows(tmp_path, [timed(estimator="ode", estimator_label=label, nfe_mean=4, bpd_mae=0.1)])
    figure = own.figure_of(tmp_path, width=width, font_size=size)
    renderer = FigureCanvasAgg(figure).get_renderer()
    assert figure.legends[0].get_window_extent(renderer).width <= figure.bbox.width
