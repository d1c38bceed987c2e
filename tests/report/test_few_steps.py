"""Few-step models of every kind side by side: figures and tables from made-up records, bad input from end to end."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_run import record, write_rows
from matplotlib.container import ErrorbarContainer
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import flowlik
from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.evaluation.prepare import Prepared
from flowlik.evaluation.samples.quality import judge
from flowlik.evaluation.uses import routes
from flowlik.planning import suites
from flowlik.report import frame as frames
from flowlik.report import labels
from flowlik.report.figures.likelihood.accuracy import error_against_cost
from flowlik.report.figures.likelihood.few_steps import (
    error_of_few_steps,
    real_data_ablation,
    samples_against_error,
)
from flowlik.report.page.write import write_report
from flowlik.report.tables.run import use_tables
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import Items, UnavailableError
from flowlik_estimators import get, parse_spec
from flowlik_models.checkpoints import save_checkpoint
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.zoo import build, load_model, recipe_for

FEATURES = "digits classifier"
CONTROLS = (("control-mean", 0.24), ("control-gaussian", 0.31))
RESAMPLED = np.random.default_rng(0).standard_normal(40)


def cell(task: str, label: str, model: str, nfe: float, error: float, **known: Any) -> dict[str, Any]:
    """A record with a likelihood, its cost and interval, on a task of the comparison."""
    name, _, inside = label.partition("[")
    params = dict(part.split("=") for part in inside.rstrip("]").split(",")) if inside else {}
    steps = params.get("steps") or params.get("segments") or (1 if name == "pi-flow" else None)
    family = {"f2d2": "joint-flow-map", "meanflow": "flow-map", "pi-flow": "policy"}.get(name, name)
    dim = 64 if task == "digits" else 2
    values: dict[str, Any] = {
        "nfe_mean": nfe,
        "work": nfe,
        "forward_equivalents": 1.3 * nfe,
        "items_per_s": 1e4 / max(nfe, 1),
        "wall_s_median": 1e-3 * nfe,
        "bpd": 1.9 + error,
        "bpd_ref": 1.9,
        "bpd_error": error,
        "bpd_error_lo": 0.8 * error,
        "bpd_error_hi": 1.2 * error,
        "bpd_mae": error,
        "bpd_mae_lo": 0.85 * error,
        "bpd_mae_hi": 1.15 * error,
        "spearman": max(1 - error, -1.0),
        "solver": "dopri5" if name == "ode" else None,
        "trace": "exact" if name == "ode" else None,
        "rtol": 1e-5 if name == "ode" else None,
    }
    return record(
        **{
            "cell_id": f"{task}{model}{label}",
            "estimator": name,
            "estimator_label": label,
            "family": family,
            "params": params,
            "steps": int(steps) if steps else None,
            "task": task,
            "model": model,
            "dim": dim,
            **values,
            **known,
        }
    )


def samples(task: str, distance: float, nfe: float = 1.0, noise: float = 0.3) -> dict[str, Any]:
    """The columns of judged samples: in features for images, in data space for the plane."""
    extra: dict[str, Any] = {"sample_nfe": nfe, "precision_se": 0.01, "recall_se": 0.012}
    columns: dict[str, Any] = {
        "n_samples": 2048,
        "precision": max(0.9 - distance / 100, 0.0),
        "recall": max(0.8 - distance / 50, 0.0),
    }
    if task == "digits":
        extra |= {"frechet_lo": distance - 1.96 * noise, "frechet_hi": distance + 1.96 * noise}
        extra["frechet_resampled"] = list(distance + noise * RESAMPLED)
        return columns | {"frechet": distance, "frechet_se": noise, "extractor": FEATURES, "extra": extra}
    extra |= {"energy_distance": 1e-3 * distance, "energy_distance_se": 5e-4, "least_mode": 0.9}
    return columns | {"extra": extra}


def few_steps_run(folder: Path, tasks: tuple[str, ...] = ("gmm-2d", "digits")) -> Path:
    rows = []
    for task in tasks:
        teacher = "teacher" if task == "digits" else "closed-form"
        rows.append(cell(task, "ode", teacher, 80, 1e-4, **samples(task, 2.5, 80)))
        for k, model in enumerate(("meanflow-f2d2", "direct-f2d2", "shortcut-distill-f2d2")):
            for n in (1, 2, 4):
                error = 0.02 * (1 + k) / n
                rows.append(
                    cell(task, f"f2d2[steps={n}]", model, n, error, **samples(task, 5 + k + 4 / n, n))
                )
        for model in ("meanflow", "shortcut"):
            for n in (1, 2):
                label = f"meanflow[steps={n},trace=hutchinson]"
                rows.append(cell(task, label, model, n, 60.0 / n, **samples(task, 9 + len(model) / n, n)))
        for variant, error in (
            ("", 0.01),
            ("-divergence", 0.02),
            ("-small-k", 0.3),
            ("-small-k-divergence", 0.1),
        ):
            for n in (1, 2, 4):
                model = f"pi-flow{f'-{n}' if n > 1 else ''}{variant}"
                for jacobian in ("", "jacobian=full"):
                    inside = ",".join(filter(None, (f"segments={n}" if n > 1 else "", jacobian)))
                    label = f"pi-flow[{inside}]" if inside else "pi-flow"
                    scale = error / n * (0.3 if jacobian else 1)
                    rows.append(cell(task, label, model, n, scale, **samples(task, 6 + 3 * error + 1 / n, n)))
        for model, distance in (("realuid-data-free", 8.0), ("realuid", 6.5), ("realuid-fine-tuned", 6.3)):
            found = samples(task, distance)
            found["extra"]["routes"] = {
                "one_root_gap": 2e-8,
                "mass": 0.99,
                "flow_gap": 0.03,
                "folded_share": 0.1,
            }
            rows.append(cell(task, "generator", model, 40, 0.2, **found))
            rows.append(cell(task, "generator[route=fake-flow]", model, 90, 0.25))
            alone = {"bpd": None, "bpd_mae": None}
            rows.append(
                cell(task, "generator[route=own-samples]", model, 1, 0.2, **samples(task, distance) | alone)
            )
        for name, error in CONTROLS:
            rows.append(cell(task, name, "", 0.0, error) | {"family": "control", "items_per_s": None})
    write_rows(folder, rows)
    return folder


# --- figures and tables ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def frame(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    run = few_steps_run(tmp_path_factory.mktemp("run"))
    return frames.averaged(frames.usable(frames.load(run)))


def test_the_comparison_has_its_figures_where_policies_or_generators_are(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    draws = (error_of_few_steps, samples_against_error, real_data_ablation)
    for task in ("gmm-2d", "digits"):
        of_task = frame[frame["task"] == task]
        assert all(draw(of_task, tmp_path) is not None for draw in draws)
        assert error_against_cost(of_task, tmp_path) is None  # not the same twice
    others = frame[~frame["method"].isin(["pi-flow", "generator"])]
    assert all(draw(others, tmp_path) is None for draw in draws)
    assert error_against_cost(others[others["task"] == "digits"], tmp_path) is not None


def test_segments_of_a_policy_flow_are_one_line_and_controls_are_grey(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    figure = error_of_few_steps(frame[frame["task"] == "digits"], tmp_path)
    assert figure is not None
    by_nfe = next(ax for ax in figure.axes if ax.get_title(loc="left").startswith("policy flows"))
    colour = labels.method_named("pi-flow").colour
    line = next(one for one in by_nfe.lines if one.get_color() == colour and one.get_linestyle() == "-")
    assert len(line.get_xdata()) == 3
    levels = [
        one.get_ydata()[0] for one in by_nfe.lines if one.get_color() == labels.method_named("control").colour
    ]
    assert set(levels) == {error for _, error in CONTROLS}
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"pi-Flow · pi-flow", "pi-Flow, full · pi-flow-small-k", "Generator, invert · realuid"} <= names


def test_one_point_a_model_with_bars_both_ways(frame: pd.DataFrame, tmp_path: Path) -> None:
    figure = samples_against_error(frame[frame["task"] == "digits"], tmp_path)
    assert figure is not None
    assert [ax.get_ylabel().splitlines()[0] for ax in figure.axes] == [
        *("Fréchet distance", "precision (features)", "recall (features)"),
    ]
    of_one = [box for box in figure.axes[0].containers if isinstance(box, ErrorbarContainer)]
    # 3 joint maps, 2 plain ones, 4 policies in two ways, 3 generators by the route that judges points
    assert len(of_one) == 3 + 2 + 4 * 2 + 3
    assert all(box.has_xerr and box.has_yerr for box in of_one)


def test_a_generator_that_cannot_be_inverted_is_judged_by_another_route(tmp_path: Path) -> None:
    """Roots of one item in 32 say nothing of the others; the samples are those of every route."""
    untimed = {"cell_id": "other", "forward_equivalents": None, "items_per_s": None}
    rows = [
        cell("digits", "generator", "realuid", 200, 5.0, **samples("digits", 7.0), invalid_share=31 / 32),
        cell("digits", "generator[route=fake-flow]", "realuid", 260, 0.2),
        cell("digits", "f2d2[steps=1]", "direct-f2d2", 1, 0.07, **samples("digits", 3.7)),
        cell("digits", "f2d2[steps=1]", "direct-f2d2", 1, 0.05, split="teacher-samples", **untimed),
    ]
    write_rows(tmp_path, rows)
    found = frames.load(tmp_path)
    figure = samples_against_error(found, tmp_path)
    assert figure is not None
    points = {
        tuple(line.get_xydata()[0]) for line in figure.axes[0].lines if line.get_marker() not in ("None", "")
    }
    assert {(0.2, 7.0), (0.07, 3.7)} <= points
    assert not any(x == 5.0 for x, _ in points)
    by_cost = error_of_few_steps(found, tmp_path)
    assert by_cost is not None
    drawn = [y for ax in by_cost.axes for line in ax.lines for y in line.get_ydata()]
    assert 0.2 in drawn
    assert 5.0 not in drawn
    assert len(by_cost.axes) == 4  # three costs of the timed split, one of the other beside them
    assert all(ax.axison and ax.lines for ax in by_cost.axes)


def test_energy_distances_below_zero_are_drawn(tmp_path: Path) -> None:
    rows = []
    for model, distance in (("realuid", -0.5), ("realuid-data-free", 60.0)):
        rows.append(cell("gmm-2d", "generator", model, 40, 0.1, **samples("gmm-2d", distance)))
    write_rows(tmp_path, rows)
    found = frames.load(tmp_path)
    for draw in (samples_against_error, real_data_ablation):
        figure = draw(found, tmp_path)
        assert figure is not None
        assert figure.axes[0].get_ylabel() == "energy distance"
        assert figure.axes[0].get_yscale() == "symlog"


def test_samples_of_one_evaluation_stand_in_one_table(frame: pd.DataFrame) -> None:
    (table,) = (
        one for one in use_tables(frame[frame["task"] == "digits"]) if "of one evaluation" in one.title
    )
    models = [row[1].text for row in table.rows]
    assert models == sorted(
        models, key=lambda model: next(r[3].value or 0 for r in table.rows if r[1].text == model)
    )
    assert {"teacher", "pi-flow", "meanflow", "shortcut", "realuid", "realuid-data-free"} <= set(models)
    assert len(set(models)) == len(models)
    assert all("[" in row[3].text for row in table.rows)
    gain = next(row[4] for row in table.rows if row[1].text == "realuid")
    assert gain.value == pytest.approx(1.5)
    assert gain.text == "1.50 [1.50, 1.50]"  # the noise is shared


@pytest.mark.parametrize(("distance", "words"), [(6.0, "is better"), (7.9, "is not better")])
def test_the_table_says_whether_real_data_help(tmp_path: Path, distance: float, words: str) -> None:
    rows = [
        cell("digits", "generator", model, 40, 0.1, **samples("digits", value))
        for model, value in (("realuid", distance), ("realuid-data-free", 8.0))
    ]
    write_rows(tmp_path, rows)
    (table,) = (one for one in use_tables(frames.load(tmp_path)) if "of one evaluation" in one.title)
    assert f"realuid {words} than realuid-data-free by more than their intervals." in table.note


def test_the_report_holds_figures_and_tables_of_the_comparison(tmp_path: Path) -> None:
    run = few_steps_run(tmp_path, tasks=("gmm-2d",))
    (run / "figures").mkdir()
    for kind in ("few-steps", "samples-and-error", "real-data"):
        Image.new("RGB", (1200, 600), "white").save(run / "figures" / f"gmm-2d--{kind}.png")
    page = write_report(run).read_text(encoding="utf-8")
    for words in (
        *("Few-step likelihoods of every kind", "RealUID with and without real data"),
        *("gmm-2d: samples of one evaluation", "routes to a generator&#39;s likelihood"),
        "Distances of one-evaluation samples: meanflow 0.017",
    ):
        assert words in page, words


# --- the suite ---------------------------------------------------------------------------------------------------


def test_the_suite_has_a_cell_for_every_number() -> None:
    cells = {(c.task, c.model, c.label) for c in suites.load_suite("few-steps") if c.options.split == "test"}
    assert cells >= {
        ("gmm-2d", "closed-form", "pi-flow[eps=0.001]"),
        ("gmm-2d", "closed-form", "pi-flow[substeps=64,eps=0.001]"),
        ("gmm-2d", "pi-flow", "pi-flow"),
        ("gmm-2d", "pi-flow-small-k", "pi-flow"),
        ("gmm-2d", "pi-flow-small-k", "pi-flow[jacobian=full]"),
        ("gmm-2d", "pi-flow-small-k-divergence", "pi-flow"),
        ("checkerboard-2d", "pi-flow-2", "pi-flow[segments=2]"),
        ("digits", "pi-flow-4", "pi-flow[segments=4]"),
        ("gmm-2d", "teacher", "ode[solver=euler,steps=100]"),
        ("gmm-2d", "realuid", "generator"),
        ("gmm-2d", "realuid", "generator[route=fake-flow]"),
        ("gmm-2d", "realuid", "generator[route=own-samples]"),
        ("gmm-2d", "realuid-f2d2", "generator[route=head]"),
    }
    drawn = {c.model for c in suites.load_suite("few-steps") if c.task == "digits" and c.options.samples}
    assert {"pi-flow", "realuid", "realuid-data-free", "realuid-fine-tuned", "meanflow", "shortcut"} <= drawn


# --- measures of samples in data space, and of routes ----------------------------------------------------------------


def test_a_lost_mode_is_seen_and_exact_samples_cover_all() -> None:
    task = get_task("gmm-2d")
    x, component = task.truth.sample_with_component(2000, generator=torch.Generator().manual_seed(0))
    columns, extra = judge(task, x.float(), None)
    assert extra["least_mode"] > 0.7
    assert min(columns["precision"], columns["recall"]) > 0.9
    assert extra["recall_se"] == pytest.approx(math.sqrt(columns["recall"] * (1 - columns["recall"]) / 2000))
    columns, extra = judge(task, x[component != 3].float(), None)
    assert extra["least_mode"] == 0.0
    assert columns["precision"] > 0.9
    assert columns["recall"] == pytest.approx(7 / 8, abs=0.05)


class Turned(torch.nn.Module):
    """x = A z + b of a normal, or folded along the first axis, with the flow of the normal as fake model."""

    event_shape = (2,)
    networks = ("fake",)

    def __init__(self, fold: bool) -> None:
        super().__init__()
        self.fold = fold
        self.fake = Gaussian(torch.zeros(2), torch.eye(2))

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        return torch.stack((z[:, 0].abs() + 0.25 * z[:, 0], z[:, 1]), 1) if self.fold else -z


def routes_of(fold: bool, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, float]:
    monkeypatch.setattr(routes, "SIDE", 40)
    monkeypatch.setattr(routes, "SAMPLES", 200)
    task = get_task("gmm-2d")
    x = Turned(fold).generate(torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))
    prepared = Prepared(
        cell=Cell(task="gmm-2d", model="", estimator=get("generator", **options)),
        cell_id="",
        task=task,
        model=Turned(fold),
        items=Items(x=x, ids=torch.arange(64), n=64),
    )
    return routes.routes_of_a_generator(prepared)[0]


def test_routes_of_a_one_to_one_map_agree_and_its_mass_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    found = routes_of(False, monkeypatch)
    assert found["one_root_share"] == 1.0
    assert found["one_root_gap"] < 1e-9
    assert (found["folded_share"], found["lost_share"]) == (0.0, 0.0)
    assert found["mass"] == pytest.approx(1.0, abs=1e-3)
    assert found["flow_gap"] < 1e-4


def test_routes_report_folds_and_a_flow_that_is_not_the_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    found = routes_of(True, monkeypatch)
    assert found["folded_share"] > 0.99
    assert found["flow_gap"] > 0.1
    with pytest.raises(UnavailableError, match=r"not generator\[route=fake-flow\]"):
        routes_of(False, monkeypatch, route="fake-flow")


# --- bad input, by the command line and in Python --------------------------------------------------------------------


def fold(network: Any) -> None:
    torch.manual_seed(1)
    for name, parameter in network.generator.named_parameters():
        if name.startswith(("shift", "gain", "gate_out")):
            torch.nn.init.normal_(parameter, 0, 0.6)


def overflow(network: Any) -> None:
    torch.nn.init.constant_(network.mixture.centres, 3e38)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained models, one that folds, and one whose policies have no finite means."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    for model, change in (
        *(("pi-flow", None), ("pi-flow-2", overflow), ("pi-flow-dx", None)),
        *(("realuid", None), ("realuid-plain", fold), ("realuid-bridge", None)),
    ):
        network = build("gmm-2d", recipe_for("gmm-2d", model))
        if change is not None:
            change(network)
        card = {"task": "gmm-2d", "model": model}
        save_checkpoint(folder / "gmm-2d" / f"{model}.safetensors", network, card)
    return folder


CASES = [
    ("pi-flow", "pi-flow[segments=8]", "refused", "not trained for segments=8; use segments=1"),
    (
        "pi-flow-2",
        "pi-flow[segments=2]",
        "diverged",
        "parameters are not finite .* in 16 of 16 rows; .* train it again",
    ),
    ("pi-flow-dx", "pi-flow", "refused", "use jacobian=full"),
    (
        "realuid",
        "generator[route=head]",
        "refused",
        "use route=invert or route=own-samples or route=fake-flow",
    ),
    ("realuid", "generator[route=own-samples]", "refused", "use route=invert for points"),
    ("realuid", "pi-flow", "refused", "needs a policy flow .*, such as pi-flow"),
    ("pi-flow", "generator", "refused", "needs a one-step generator .*, such as realuid"),
    ("realuid-bridge", "generator[route=fake-flow]", "refused", "use route=invert or route=own-samples"),
    ("realuid-bridge", "generator", "refused", "give it as cond= in Python, a run has no pairs"),
    (
        "realuid-plain",
        "generator[starts=2]",
        "ok",
        "the generator folds: determinants are positive at .* negative at",
    ),
]


MISSING = ("pi-flow-dropout", "pi-flow", "skipped", "`flowlik train gmm-2d pi-flow-dropout`")


@pytest.fixture(scope="module")
def refused(own: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """The records of one run of the command line over all cases."""
    folder = tmp_path_factory.mktemp("refused")
    entries = [
        f'[[cells]]\ntasks = ["gmm-2d"]\nmodels = ["{model}"]\nestimators = ["{spec}"]\n'
        for model, spec, *_ in [*CASES, MISSING]
    ]
    head = "controls = false\n[defaults]\nn_items = 16\nbatch_size = 16\nrounds = 0\n"
    (folder / "suite.toml").write_text(head + "\n".join(entries))
    words = ["run", str(folder / "suite.toml"), "--no-report", "--checkpoints", str(own)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLOWLIK_CHECKPOINTS", str(own))  # put back as it was, whatever the command line sets
        result = CliRunner().invoke(app, [*words, "--out", str(folder / "run")])
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return flowlik.read_records(folder / "run")


@pytest.mark.parametrize(("model", "spec", "status", "reason"), [*CASES, MISSING])
def test_the_command_line_names_what_does_not_fit_and_what_would(
    refused: pd.DataFrame, model: str, spec: str, status: str, reason: str
) -> None:
    (estimator,) = parse_spec(spec)
    (row,) = refused[(refused["model"] == model) & (refused["estimator_label"] == estimator.label)].iloc
    assert row["status"] == status
    assert re.search(reason, row["reason"]), row["reason"]
    assert "\n" not in row["reason"]


@pytest.mark.parametrize(("model", "spec", "status", "reason"), CASES)
def test_python_names_what_does_not_fit_and_what_would(
    own: Path, monkeypatch: pytest.MonkeyPatch, model: str, spec: str, status: str, reason: str
) -> None:
    monkeypatch.setenv("FLOWLIK_CHECKPOINTS", str(own))
    (estimator,) = parse_spec(spec)
    out = estimator.log_prob(load_model("gmm-2d", model), get_task("gmm-2d").items("test", 16).x.float())
    assert out.status == status
    assert re.search(reason, str(out.reason)), out.reason


def test_samples_of_broken_policies_are_none_and_say_why(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLOWLIK_CHECKPOINTS", str(own))
    options = Options(samples=16, n_items=8, rounds=0, likelihood=False)
    estimator = get("pi-flow", segments=2)
    row, _ = run_cell(Cell(task="gmm-2d", model="pi-flow-2", estimator=estimator, options=options))
    assert row["status"] == "diverged"
    assert "parameters are not finite" in row["reason"]
