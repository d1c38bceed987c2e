"""Bits/dim along a model's training: the use, its table and its figure."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from flowlik.cells import Cell, Options
from flowlik.evaluation.models import load
from flowlik.records.writing import to_plain
from flowlik.report import frame as frames
from flowlik.report.figures.uses.training import training_curves
from flowlik.report.tables.run import use_tables
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models.checkpoints import CheckpointError, save_tensors
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training.trainer import train
from flowlik_models.zoo import CHECKPOINTS_VARIABLE, load_model, snapshots, training_cost

STEPS = 160
SOLVER = get("ode", solver="rk4", steps=12, grid="logsnr", trace="exact")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A field of gmm-2d trained for a few seconds, with two of its averages along the way."""
    out: Path = tmp_path_factory.mktemp("train")
    recipe = RECIPES["gmm-2d"]["teacher"]
    short = recipe.with_options(steps=STEPS, batch=128, snapshots=(0.05, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES["gmm-2d"], "teacher", short)
        train("gmm-2d", "teacher", out=out)
    return out


@pytest.fixture(autouse=True)
def own_checkpoints(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(CHECKPOINTS_VARIABLE, str(folder))
    load.cache_clear()
    yield
    load.cache_clear()  # the next test's teacher is the shipped one


def cell(model: str = "teacher") -> Cell:
    options = Options(n_items=200, rounds=0, uses=("training",))
    return Cell(task="gmm-2d", model=model, estimator=SOLVER, options=options)


def test_snapshots_come_in_the_order_of_training_and_end_with_the_model(folder: Path) -> None:
    kept = snapshots("gmm-2d", "teacher")
    assert [one.step for one in kept] == [STEPS // 20, STEPS // 2, STEPS]
    assert 0 < kept[0].cpu_seconds < kept[1].cpu_seconds < kept[2].cpu_seconds
    assert kept[-1].path == folder / "gmm-2d" / "teacher.safetensors"
    assert snapshots("gmm-2d", "pi-flow-dropout") == []  # no checkpoint at all


def test_a_record_tells_the_size_of_its_model_and_what_training_it_took(folder: Path) -> None:
    card = json.loads((folder / "gmm-2d" / "teacher.json").read_text())
    row, _ = run_cell(cell().with_options(n_items=20, uses=()))
    assert row["extra"]["parameters"] == sum(p.numel() for p in load_model("gmm-2d", "teacher").parameters())
    assert row["extra"]["train_cpu_seconds"] == pytest.approx(
        card["train_cpu_seconds"] + (card.get("trajectories_cpu_seconds") or 0.0)
    )
    untold = {"parameters": 5, "recipe": {}}  # a card of an earlier version, which tells no time
    (folder / "gmm-2d" / "energy.json").write_text(json.dumps(untold))
    save_tensors(folder / "gmm-2d" / "energy.safetensors", {"a": torch.zeros(5)})
    assert training_cost("gmm-2d", "energy") == {"parameters": 5.0}
    assert training_cost("gmm-2d", "closed-form") == training_cost("gmm-2d", "pi-flow-dropout") == {}
    for ending in (".json", ".safetensors"):
        (folder / "gmm-2d" / f"energy{ending}").unlink()


def test_each_point_is_the_cell_run_on_that_average_and_training_helps(folder: Path) -> None:
    row, arrays = run_cell(cell())
    assert row["status"] == "ok", row["reason"]
    curve = row["extra"]["training"]
    assert curve["step"] == [STEPS // 20, STEPS // 2, STEPS]
    assert curve["bpd"][0] > curve["bpd"][2] + 0.1
    bits = arrays["training_bpd"]
    assert bits.shape == (3, 128)
    np.testing.assert_allclose(curve["bpd"], bits.mean(1))
    np.testing.assert_allclose(curve["bpd_se"], bits.std(1, ddof=1) / np.sqrt(128))
    gains = bits[0] - bits[1]
    assert curve["gain"][0] is None
    assert curve["gain"][1] == pytest.approx(gains.mean())
    assert curve["gain_se"][1] == pytest.approx(gains.std(ddof=1) / np.sqrt(128))
    # the last point is the model itself, the first the average that lies in the file
    own = -arrays["log_prob"][:128] / (2 * np.log(2))
    np.testing.assert_allclose(bits[2], own, atol=1e-6)
    early = load_model("gmm-2d", "teacher", path=snapshots("gmm-2d", "teacher")[0].path)
    x = get_task("gmm-2d").items("test", 128).x.float()
    again = SOLVER.log_prob(early, x).log_prob.numpy()
    np.testing.assert_allclose(bits[0], -again / (2 * np.log(2)), atol=1e-5)


def test_a_model_without_snapshots_has_no_curve() -> None:
    row, arrays = run_cell(cell("closed-form"))
    assert row["status"] == "ok"
    assert row["extra"]["training"] == {}
    assert "training_bpd" not in arrays


def test_a_damaged_snapshot_is_named(folder: Path) -> None:
    bad = folder / "gmm-2d" / "snapshots" / "teacher-7.safetensors"
    bad.write_bytes(b"\x00" * 40)
    try:
        with pytest.raises(CheckpointError, match=r"teacher-7\.safetensors: expected a snapshot"):
            snapshots("gmm-2d", "teacher")
    finally:
        bad.unlink()


def test_table_and_figure_show_the_curve(tmp_path: Path) -> None:
    frame = frames.averaged(frames.usable(frames.prepare(pd.DataFrame([to_plain(run_cell(cell())[0])]))))
    (table,) = [table for table in use_tables(frame) if table.title == "gmm-2d: bits/dim along training"]
    assert [line[2].text for line in table.rows] == ["8", "80", "160"]
    assert table.rows[0][5].text == "–"
    assert table.rows[1][5].value is not None
    assert table.rows[1][5].value > 0
    figure = training_curves(frame, tmp_path)
    assert figure is not None
    (ax,) = figure.axes
    assert ax.get_xlabel() == "processor hours of training"
    (line,) = [line for line in ax.lines if len(np.asarray(line.get_xdata())) == 3]
    np.testing.assert_allclose(
        np.asarray(line.get_ydata(), dtype=float), frame["extra"].iloc[0]["training"]["bpd"]
    )
    bare = frame.assign(extra=[{} for _ in range(len(frame))])
    assert training_curves(bare, tmp_path) is None


def test_a_card_that_does_not_tell_its_hours_leaves_its_point_out(tmp_path: Path) -> None:
    curve = {
        "step": [1, 2],
        "cpu_hours": [0.1, None],
        "bpd": [3.0, 2.9],
        "bpd_se": [0.1, 0.1],
        "gain": [None, 0.1],
        "gain_se": [None, 0.01],
    }
    row = to_plain(run_cell(cell("closed-form"))[0])
    row["extra"] = {**row["extra"], "training": curve}
    figure = training_curves(frames.averaged(frames.usable(frames.prepare(pd.DataFrame([row])))), tmp_path)
    assert figure is not None
    (ax,) = figure.axes
    assert any(list(np.asarray(line.get_ydata(), dtype=float)) == [3.0, 2.9] for line in ax.lines)
