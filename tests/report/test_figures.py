"""Figures are drawn from records alone, and from whatever records there are."""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from fake_run import record, write_fake_run, write_rows
from matplotlib.figure import Figure
from PIL import Image

from flowlik.records.reading import read_rows
from flowlik.report import frame as frames
from flowlik.report import numbers
from flowlik.report.figures import kinds, style
from flowlik.report.figures.kinds import KINDS, Kind, all_kinds, draw_all
from flowlik.report.figures.likelihood.accuracy import pareto_front
from flowlik.report.figures.likelihood.bound_gap import gap_between_bound_and_ode
from flowlik.report.figures.likelihood.scaling import slope
from flowlik.report.figures.likelihood.training_cost import error_against_training
from flowlik.report.figures.samples.density_and_samples import tiled
from flowlik.report.labels import distance_name
from flowlik.report.page.write import write_report
from flowlik_models import plugins


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    folder = tmp_path_factory.mktemp("run")
    run_dir = write_fake_run(folder, tasks=("gmm-2d", "digits"), n=40, splits=("test",), steps=(1, 8))
    return run_dir, draw_all(run_dir)


def test_every_kind_is_drawn_as_png_pdf_and_svg(drawn: tuple[Path, list[Path]]) -> None:
    run_dir, paths = drawn
    assert {p.name for p in paths} == {
        f"{name}.{suffix}"
        for name in (
            *("overview", "gmm-2d--bpd", "gmm-2d--error", "gmm-2d--scatter", "gmm-2d--density"),
            *("digits--bpd", "digits--error", "digits--scatter", "digits--frechet", "digits--samples"),
        )
        for suffix in ("png", "pdf", "svg")
    }
    assert all(p.parent == run_dir / "figures" and p.stat().st_size > 2000 for p in paths)
    begin = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert all(p.read_bytes().startswith(begin[p.suffix]) for p in paths)


def test_the_same_figures_are_the_same_files_and_their_words_are_text(drawn: tuple[Path, list[Path]]) -> None:
    run_dir, paths = drawn
    before = {p: p.read_bytes() for p in paths if p.suffix == ".svg"}
    draw_all(run_dir)
    assert {p: p.read_bytes() for p in before} == before
    assert all(b"<text" in data and b"<dc:date" not in data for data in before.values())
    assert b">mean |error| (bits/dim)<" in before[run_dir / "figures" / "gmm-2d--error.svg"]


def test_drawing_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6)])
    draw_all(tmp_path)
    assert dict(mpl.rcParams) == before


def _broken(frame: pd.DataFrame, run_dir: Path) -> Figure | None:
    raise KeyError("no such column")


BROKEN = Kind(_broken, title="Broken", how="Cannot be drawn.")


def test_a_figure_of_another_package_that_fails_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [
        EntryPoint(name=name, value=f"{__name__}:{value}", group="flowlik.figures")
        for name, value in (("broken", "BROKEN"), ("a/b", "BROKEN"), ("no-kind", "Path"))
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    with pytest.warns(UserWarning, match="left out") as said:
        found = all_kinds.__wrapped__()
    assert [str(one.message).split()[1] for one in said] == ["'a/b'", "'no-kind'"]
    assert list(found) == [*KINDS, "broken"]
    monkeypatch.setattr(kinds, "all_kinds", lambda: found)
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6)])
    with pytest.warns(UserWarning, match="figure 'broken' is left out: KeyError: 'no such column'"):
        assert draw_all(tmp_path)


def test_an_axis_ends_near_what_a_column_can_be_and_grows_towards_nothing_else() -> None:
    ax = style.new_figure(2, 2).subplots()
    ax.set_ylim(-0.5, 1.5)
    style.within_limits(ax, "precision")
    assert ax.get_ylim() == pytest.approx((-0.1, 1.1))
    ax.set_ylim(0.4, 0.6)
    style.within_limits(ax, "precision")
    assert ax.get_ylim() == pytest.approx((0.4, 0.6))
    ax.set_ylim(-2, 9)
    style.within_limits(ax, "bpd_error")
    assert ax.get_ylim() == pytest.approx((-2, 9))


def test_an_empty_run_has_no_figures(tmp_path: Path) -> None:
    assert draw_all(tmp_path) == []
    write_rows(tmp_path, [])
    assert draw_all(tmp_path) == []
    assert not (tmp_path / "figures").exists()


def test_rows_without_numbers_and_torn_items_draw_what_they_can(tmp_path: Path) -> None:
    rows = [
        record(cell_id="a", nfe_mean=4, bpd=1.5, bpd_mae=0.1, bpd_ref=1.6),
        record(cell_id="b", steps=8, estimator_label="f2d2[steps=8]", nfe_mean=None, bpd=None),
        record(cell_id="c", steps=2, estimator_label="f2d2[steps=2]", nfe_mean=2, bpd=float("inf")),
        record(
            cell_id="d",
            estimator="control-mean",
            estimator_label="control-mean",
            family="control",
            bpd_mae=0.0,
        ),
        record(cell_id="e", status="error", reason="broke", estimator_label="f2d2[steps=1]"),
    ]
    write_rows(tmp_path, rows)
    (tmp_path / "items").mkdir()
    (tmp_path / "items" / "a.npz").write_bytes(b"PK\x03\x04 torn")
    assert {p.name for p in draw_all(tmp_path) if p.suffix == ".png"} == {
        "gmm-2d--bpd.png",
        "gmm-2d--error.png",
    }


def test_figures_that_the_records_no_longer_support_are_removed(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6, bpd_mae=0.1)])
    assert {path.stem for path in draw_all(tmp_path)} == {"gmm-2d--bpd", "gmm-2d--error"}
    (tmp_path / "records.jsonl").unlink()
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6)])
    draw_all(tmp_path)
    left = {p.name for p in (tmp_path / "figures").iterdir()}
    assert left == {"gmm-2d--bpd.png", "gmm-2d--bpd.pdf", "gmm-2d--bpd.svg", ".drawn.json"}
    (tmp_path / "records.jsonl").unlink()
    write_rows(tmp_path, [])
    assert draw_all(tmp_path) == []
    assert {p.name for p in (tmp_path / "figures").iterdir()} == {".drawn.json"}


@pytest.mark.parametrize("noted", [None, b"[1", b"[]", b'{"../mine.png": 3, "../notes--error.png": "0"}'])
def test_nothing_is_removed_that_was_not_drawn(tmp_path: Path, noted: bytes | None) -> None:
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6)])
    folder = tmp_path / "figures"
    folder.mkdir()
    if noted is not None:
        (folder / ".drawn.json").write_bytes(noted)
    own = {"notes--error.png", "gmm-2d--scatter--test.png", "overview.pdf", "scaling-mine.png", "mine.png"}
    for name in own:
        (folder / name).write_bytes(b"")
    draw_all(tmp_path)
    assert own < {p.name for p in folder.iterdir()}


def test_a_figure_that_the_user_changed_stays(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(nfe_mean=4, bpd=1.5, bpd_ref=1.6)])
    picture, page, _ = draw_all(tmp_path)
    picture.write_bytes(b"mine")
    (tmp_path / "records.jsonl").unlink()
    write_rows(tmp_path, [])
    draw_all(tmp_path)
    assert picture.read_bytes() == b"mine"
    assert not page.exists()


def test_hostile_names_stay_in_the_folder_and_do_not_break_the_drawing(tmp_path: Path) -> None:
    rows = [
        record(
            task="../../$x_{^<b>",
            model="$\\frac{1",
            nfe_mean=n,
            steps=n,
            bpd=-(3.0**n),
            bpd_mae=0.1,
            bpd_ref=1.6,
        )
        | {"estimator_label": f"f2d2[steps={n},note=$a$_^]", "cell_id": f"../{n}", "items_per_s": 10.0}
        for n in (1, 2, 4)
    ]
    write_rows(tmp_path / "run", rows)
    paths = draw_all(tmp_path / "run")
    assert paths
    assert {p.parent for p in paths} == {tmp_path / "run" / "figures"}
    assert {p.name for p in tmp_path.iterdir()} == {"run"}


def test_the_pareto_front_keeps_what_nothing_beats() -> None:
    cost = np.array([1.0, 2.0, 2.0, 4.0, 8.0, np.nan, 16.0])
    error = np.array([0.5, 0.6, 0.3, 0.3, 0.1, 0.01, 0.2])
    xs, ys = pareto_front(cost, error)
    assert xs.tolist() == [1.0, 2.0, 8.0]
    assert ys.tolist() == [0.5, 0.3, 0.1]


def test_tiles_are_scaled_to_the_unit_interval_and_set_apart() -> None:
    samples = np.stack([np.full((1, 2, 2), -1.0), np.full((1, 2, 2), 3.0)])
    sheet = tiled(samples)
    assert sheet.shape == (2, 8 * 3 - 1)
    assert sheet[0, 0] == 0.0
    assert sheet[0, 3] == 1.0
    assert sheet[0, 2] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("extractor", "name"), [("inception-v3 2048", "FID"), ("digits classifier", "Fréchet distance")]
)
def test_only_inception_features_make_an_fid(extractor: str, name: str) -> None:
    assert distance_name(extractor) == name


def test_methods_are_told_apart_by_how_they_step(tmp_path: Path) -> None:
    ode = {"estimator": "ode", "family": "ode"}
    rows = [
        record(
            **ode, cell_id="a", estimator_label="ode", solver="dopri5", steps=None, rtol=1e-5, trace="exact"
        ),
        record(**ode, cell_id="b", estimator_label="ode[solver=euler,steps=8]", solver="euler", steps=8),
        record(**ode, cell_id="c", estimator_label="ode[solver=rk4,steps=1]", solver="rk4", steps=1),
        record(
            cell_id="d",
            estimator="mine",
            estimator_label="mine[steps=2,depth=3]",
            family="third party",
            steps=2,
        ),
    ]
    write_rows(tmp_path, rows)
    frame = frames.load(tmp_path).set_index("cell_id")
    assert frame["method"].to_dict() == {"a": "ode-adaptive", "b": "ode-euler", "c": "ode-fixed", "d": "mine"}
    assert frame["row"].to_dict() == {
        "a": "ODE dopri5, tol 1e-5",
        "b": "ODE, Euler, 8 steps",
        "c": "ODE rk4, 1 step",
        "d": "mine, 2 steps, depth 3",
    }
    assert frame.loc["d", "series"] == "mine, depth 3"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.23456, "1.23"),
        (-0.00012, "−0.00012"),
        (0.0000123, "1.2e−5"),
        (123456.0, "1.2e5"),
        (0.0, "0"),
        (9.99, "10.0"),
    ],
)
def test_numbers_are_written_for_readers(value: float, text: str) -> None:
    digits = 3 if value in (1.23456, 9.99) else 2
    assert numbers.number(value, digits) in (text, "9.99")
    assert numbers.number(float("nan")) == "–"
    assert numbers.fixed(-1.5, 2) == "−1.50"


def test_seeds_are_averaged_into_one_point(tmp_path: Path) -> None:
    write_rows(
        tmp_path, [record(cell_id=f"s{k}", seed=k, nfe_mean=4, bpd=1.0 + k, bpd_mae=0.2) for k in range(3)]
    )
    frame = frames.averaged(frames.load(tmp_path))
    assert len(frame) == 1
    assert frame["bpd"].iloc[0] == pytest.approx(2.0)
    assert frame["n_seeds"].iloc[0] == 3


# --- figures of the suites rules, probes and scaling ---------------------------------------------------------


def rule(name: str, solver: str, grid: str, steps: int, error: float) -> dict[str, object]:
    return record(
        estimator=name,
        estimator_label=f"{name}[solver={solver},steps={steps},grid={grid}]",
        family="ode",
        params={"grid": grid},
        solver=solver,
        steps=steps,
        nfe_mean=steps,
        bpd=1.0,
        bpd_ref=1.0,
        bpd_mae=error,
        model="closed-form",
    )


def test_rules_are_drawn_where_several_are_compared(tmp_path: Path) -> None:
    few = [rule("ode", "euler", "uniform", n, 0.1 / n) for n in (1, 2)]
    write_rows(tmp_path, few)
    assert not [p for p in draw_all(tmp_path) if "rules" in p.name]
    many = [
        rule(name, solver, grid, n, 0.1 / n)
        for name in ("ode", "whitened-ode")
        for solver in ("euler", "rk4")
        for grid in ("uniform", "logsnr")
        for n in (1, 2, 4)
    ]
    write_rows(tmp_path, many)
    assert [p.name for p in draw_all(tmp_path) if "rules" in p.name] == [
        "gmm-2d--rules.png",
        "gmm-2d--rules.pdf",
        "gmm-2d--rules.svg",
    ]


def test_joint_maps_are_drawn_where_three_are_compared(tmp_path: Path) -> None:
    def joint(model: str, steps: int) -> dict[str, object]:
        error = 0.1 / steps
        return record(
            estimator="f2d2",
            estimator_label=f"f2d2[steps={steps}]",
            model=model,
            steps=steps,
            nfe_mean=float(steps),
            bpd_error=-error,
            bpd_error_lo=-1.2 * error,
            bpd_error_hi=-0.8 * error,
            bpd_mae=error,
            bpd_mae_lo=0.9 * error,
            bpd_mae_hi=1.1 * error,
            spearman=1 - error,
        )

    models = ("meanflow-f2d2", "lsd-f2d2", "direct-f2d2")
    for count in (2, 3):
        write_rows(tmp_path, [joint(model, steps) for model in models[:count] for steps in (1, 2, 4)])
        drawn = [path.name for path in draw_all(tmp_path) if "joint-maps" in path.name]
        names = [f"gmm-2d--joint-maps.{suffix}" for suffix in ("png", "pdf", "svg")]
        assert drawn == (names if count == 3 else [])


def test_error_against_training_time_shows_every_model_whose_card_tells_it(tmp_path: Path) -> None:
    def trained(model: str, seconds: float, steps: int, **known: object) -> dict[str, object]:
        error = 0.1 / steps
        ends = {"bpd_mae": error, "bpd_mae_lo": 0.9 * error, "bpd_mae_hi": 1.1 * error}
        cost = {"train_cpu_seconds": seconds, "parameters": 126_000.0}
        label = f"f2d2[steps={steps}]"
        own = {"estimator_label": label, "model": model, "steps": steps, "nfe_mean": steps, "extra": cost}
        return record(estimator="f2d2", **own, **ends | known)

    rows = [trained(f"map-{k}", 60.0 * k, n) for k in range(3) for n in (1, 8)]  # the first tells no time
    rows.append(trained("slow", 60.0, 16))
    write_rows(tmp_path, rows)
    assert error_against_training(frames.load(tmp_path), tmp_path) is None
    write_rows(tmp_path, [*rows, trained("map-3", 180.0, 1)])
    figure = error_against_training(frames.load(tmp_path), tmp_path)
    assert figure is not None
    told = [line.get_label() for line in figure.legends[0].get_lines()]
    assert told == ["map-1 (126 k)", "map-2 (126 k)", "map-3 (126 k)"]
    (ax,) = figure.axes
    shown = {(float(x), round(float(y), 6)) for line in ax.get_lines() for x, y in line.get_xydata()}
    assert {(1.0, 0.1), (1.0, 0.0125), (2.0, 0.1), (2.0, 0.0125), (3.0, 0.1)} == shown


def test_probes_are_drawn_where_three_choices_have_error_bars(tmp_path: Path) -> None:
    def probe(count: int, **choice: str) -> dict[str, object]:
        params = {
            "noise": "rademacher",
            "basis": "pixel",
            "control": "none",
            "divergence": "augmented",
        } | choice
        label = f"ode[probes={count},{','.join(f'{k}={v}' for k, v in params.items())}]"
        return record(
            estimator="ode",
            estimator_label=label,
            family="ode",
            params=params,
            steps=None,
            trace="hutchinson",
            probes=count,
            vjp_mean=10.0 * count,
            nfe_mean=10,
            stderr_mean=0.1 / count**0.5,
            bpd=1.0,
        )

    two = [probe(n, basis=b) for n in (2, 4) for b in ("pixel", "dct")]
    write_rows(tmp_path, two)
    assert not [p for p in draw_all(tmp_path) if "probes" in p.name]
    write_rows(tmp_path, [*two, probe(2, control="gaussian")])
    assert {p.name for p in draw_all(tmp_path)} >= {"gmm-2d--probes.png", "gmm-2d--probes.pdf"}


def test_the_gap_to_the_ode_is_drawn_item_by_item_where_it_is_known(tmp_path: Path) -> None:
    rows = []
    (tmp_path / "items").mkdir()
    for draws in (8, 64):
        row = record(
            cell_id=f"c{draws}",
            estimator="elbo",
            estimator_label=f"elbo[draws={draws}]",
            family="bound",
            steps=None,
        )
        rows.append(row | {"dim": 64, "nfe_mean": draws, "bpd": 2.0, "split": "test", "model": "teacher"})
        log_prob = np.linspace(-90.0, -60.0, 20)
        arrays = {
            "ref": log_prob,
            "log_prob": log_prob - 1.0,
            "valid": np.ones(20, bool),
            "stderr": np.ones(20),
        }
        np.savez(tmp_path / "items" / f"c{draws}.npz", **arrays)
    write_rows(tmp_path, rows)
    assert not [path for path in draw_all(tmp_path) if "ode-gap" in path.name]
    gaps = {"ode_gap": 1 / (64 * math.log(2)), "ode_gap_se": 0.001, "ode_gap_sd": 0.0}
    write_rows(tmp_path, [row | {"extra": gaps} for row in rows])
    task = rows[0]["task"]
    assert f"{task}--ode-gap.png" in {path.name for path in draw_all(tmp_path)}
    figure = gap_between_bound_and_ode(frames.load(tmp_path), tmp_path)
    assert figure is not None
    assert len(figure.axes) == 2
    points = figure.axes[1].lines[0].get_xydata()
    assert np.asarray(points)[:, 1] == pytest.approx(gaps["ode_gap"])
    assert np.asarray(points)[:, 0] == pytest.approx(log_prob)


def test_scaling_needs_sweeps_of_dimension_and_batch(tmp_path: Path) -> None:
    def timed(task: str, dim: int, batch: int) -> dict[str, object]:
        return record(
            task=task,
            dim=dim,
            n_items=batch,
            batch_size=batch,
            nfe_mean=4,
            cpu_s_median=1e-3 * batch * dim,
            extra={"timing_batch": batch},
            model="closed-form",
        )

    dims = [timed(f"gaussian-{d}d", d, 64) for d in (2, 16, 64)]
    write_rows(tmp_path, dims)
    assert "scaling.png" not in {p.name for p in draw_all(tmp_path)}
    write_rows(tmp_path, [*dims, *(timed("digits", 64, b) for b in (1, 4, 16))])
    assert "scaling.png" in {p.name for p in draw_all(tmp_path)}


def test_slope_is_the_exponent() -> None:
    x = np.array([1.0, 2.0, 8.0])
    assert slope(x, 3 * x**1.5) == pytest.approx(1.5)


def test_the_same_estimator_on_other_numbers_of_items_is_another_cell(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(cell_id=f"c{n}", n_items=n, bpd=float(n)) for n in (1, 4)])
    assert frames.averaged(frames.load(tmp_path))["bpd"].tolist() == [1.0, 4.0]


def test_times_of_different_hardware_never_share_a_figure_or_a_mean(tmp_path: Path) -> None:
    write_fake_run(tmp_path, tasks=("gmm-2d",), n=20, steps=(1, 8))
    rows = read_rows(tmp_path)
    timed = [row for row in rows if row["wall_s_median"] is not None]
    twins = [row | {"cell_id": f"twin-{n}", "seed": 1} for n, row in enumerate(timed)]
    for row, machine in [*((row, "H100") for row in timed), *((row, "A100") for row in twins)]:
        row["extra"] = {"hardware": machine}
    write_rows(tmp_path, [*rows, *twins])
    frame = frames.load(tmp_path)
    assert frames.machines(frame) == ["A100", "H100"]
    averaged = frames.averaged(frames.usable(frame))
    assert (averaged["n_seeds"] == 1).all()
    on_a100 = averaged["series"][averaged["hardware"] == "A100"]
    assert len(on_a100) > 5
    assert on_a100.str.endswith("A100").all()
    names = {path.stem for path in draw_all(tmp_path)}
    assert {"gmm-2d--error--A100", "gmm-2d--error--H100", "gmm-2d--bpd"} <= names
    assert "gmm-2d--error" not in names
    write_report(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "times of A100" in page
    assert "times of H100" in page
    write_rows(tmp_path, rows)
    assert "gmm-2d--error" in {path.stem for path in draw_all(tmp_path)}
    assert not list((tmp_path / "figures").glob("*A100*"))


def test_axes_of_either_sign_have_plain_numbers() -> None:
    figure = style.new_figure(3, 3)
    ax = figure.subplots()
    ax.plot([1, 2], [-30, 40])
    style.symlog_axis(ax, 0.1)
    figure.canvas.draw()
    assert {"−10", "0", "10"} <= {label.get_text() for label in ax.get_yticklabels()}
    assert not any("$" in label.get_text() for label in ax.get_yticklabels())


def test_a_picture_in_256_colours_looks_the_same(tmp_path: Path) -> None:
    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.imshow(np.linspace(-1, 1, 1_200).reshape(30, 40), cmap="viridis")
    axes.plot(np.arange(30), np.arange(30), "r-")
    figure.savefig(tmp_path / "whole.png", dpi=kinds.PNG_DPI)
    kinds.save_png(figure, tmp_path / "reduced.png")
    whole, reduced = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"), float)
        for name in ("whole", "reduced")
    )
    gap = np.abs(whole - reduced)
    assert gap.mean() < 1
    assert np.quantile(gap, 0.999) < 25
    assert (tmp_path / "reduced.png").stat().st_size < 0.6 * (tmp_path / "whole.png").stat().st_size
