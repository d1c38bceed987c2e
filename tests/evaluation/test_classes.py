"""Labels in cells: what is measured of each class, and guidance as a sweep."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_files import GUIDED, write_task
from typer.testing import CliRunner

import flowlik
from flowlik.cells import Cell, Options
from flowlik.cli import app
from flowlik.evaluation.models import load
from flowlik.evaluation.prepare import prepare
from flowlik.measures.by_class import MOST_CLASSES, by_class
from flowlik.measures.judged_items import JudgedItems
from flowlik.planning.selection import check_own
from flowlik.running.run import run_cell
from flowlik.tasks.own import task_file
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models.images.digits import digits
from flowlik_models.zoo import load_model

SOLVE = {"solver": "rk4", "steps": 32}


@pytest.fixture
def cell(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Cell]:
    name = f"classes-{abs(hash(request.node.name)) % 10**9}"
    file = write_task(tmp_path / "user", name, GUIDED.replace("CLASSES", "4"))
    get_task(str(file))
    yield Cell(
        task=name,
        task_file=str(file),
        model="net",
        estimator=get("ode", **SOLVE),
        options=Options(n_items=60, rounds=0),
    )
    task_file.forget()
    load.cache_clear()


def truth(cell: Cell, guidance: float = 0.0) -> Any:
    """Exact bits/dim of the guided field, (n,)."""
    items = get_task(cell.task).items("test", 60)
    mean = 3.0 * ((1.0 + guidance) * items.cond - 3.0 * guidance)  # type: ignore[operator]
    values = torch.distributions.Normal(mean[:, None], 2.0).log_prob(whole(items.x)).sum(1)
    return -values.numpy() / (2 * math.log(2))


def test_every_class_has_its_mean_with_an_interval(cell: Cell) -> None:
    row, arrays = run_cell(cell)
    found, labels = row["extra"]["classes"], arrays["label"]
    assert (found["label"], found["items"]) == ([0, 1, 2], [20, 20, 20])
    for k in range(3):
        assert found["bpd"][k] == pytest.approx(truth(cell)[labels == k].mean(), abs=1e-4)
        assert found["bpd_lo"][k] < found["bpd"][k] < found["bpd_hi"][k]
    assert np.isnan(found["mae"]).all()  # no reference was made


@pytest.mark.parametrize("name", ["ode", "whitened-ode"])
@pytest.mark.parametrize("guidance", [0.0, 0.5])
def test_a_guided_cell_has_the_density_of_its_own_ode_and_counts_both_calls(
    cell: Cell, name: str, guidance: float
) -> None:
    row, arrays = run_cell(replace(cell, estimator=get(name, guidance=guidance, **SOLVE)))
    assert row["status"] == "ok", row["reason"]
    bits = -arrays["log_prob"] / (2 * math.log(2))
    assert np.abs(bits - truth(cell, guidance)).max() < 1e-3
    assert (row["nfe_mean"], row["vjp_mean"]) == (2 * 4 * 32, 2 * 2 * 4 * 32)
    assert f"guidance={guidance}" in row["estimator_label"]
    own = "a guided field has a density of its own" in row["reason"]
    assert own == (guidance > 0)


def test_a_sweep_on_the_command_line_has_its_rows_and_classes_in_the_table(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "ode[solver=rk4,steps=2,guidance=0|1]"
    words = ["run", "-t", str(cell.task_file), "-e", spec, "--out", "out", "--no-report"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    table = CliRunner().invoke(app, ["table", "out"]).output
    assert "by class" in table
    assert "guidance 1.0" in table
    rows = [json.loads(line) for line in Path("out/records.jsonl").read_text().splitlines()]
    assert [row["nfe_mean"] for row in rows if row["estimator"] == "ode"] == [16, 16]


def test_guidance_without_labels_or_without_a_field_to_guide_is_one_line(
    cell: Cell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = str(write_task(tmp_path / "plain", f"{cell.task}-plain"))
    done = CliRunner().invoke(app, ["run", "-t", plain, "-m", "net", "-e", "ode[guidance=1]", "--out", "out"])
    assert (done.exit_code, Path("out").exists()) == (2, False), done.output
    assert (
        done.output
        == f"flowlik: ode[guidance=1.0]: guides to a label of each row, and net of {cell.task}-plain is given none\n"
    )
    guided, model = get("ode", guidance=1.0), load(cell.task, "net", "cpu", "float32")[0]
    with pytest.raises(ValueError, match="guides to cond"):
        guided.log_prob(model, torch.zeros(2, 2))
    refusal = guided.log_prob(get_task(plain).load_model("net", "cpu")[0], torch.zeros(2, 2))
    assert (refusal.status, "needs a conditional field" in str(refusal.reason)) == ("refused", True)


def test_a_label_outside_the_classes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_task(tmp_path / "user", "classes-outside", GUIDED.replace("CLASSES", "2"))
    for words in (("run", "-t", str(file)), ("score", str(file)), ("reference", str(file))):
        done = CliRunner().invoke(app, [*words, "--out", "out"])
        assert (done.exit_code, Path("out").exists()) == (2, False), done.output
        (line,) = done.output.strip().splitlines()
        assert "mine.py: model 'net' knows no class 2, a label of test" in line
    checked = CliRunner().invoke(app, ["check", str(file)])
    assert (checked.exit_code, "a label outside the classes" in checked.output) == (1, True)
    task_file.forget()
    load.cache_clear()


def test_the_classes_together_are_the_whole() -> None:
    generator = np.random.default_rng(0)
    labels, bpd, errors = (
        generator.integers(0, 4, 500),
        generator.normal(size=500),
        generator.normal(size=500),
    )
    errors[:9] = np.nan
    found = by_class(JudgedItems(bpd=bpd, ref=bpd, errors=errors, stderr=None, dim=2), labels)
    assert np.average(found["bpd"], weights=found["items"]) == pytest.approx(bpd.mean())
    assert np.all(np.array(found["mae_lo"]) < found["mae"])
    many = by_class(JudgedItems(bpd=bpd, ref=bpd, errors=errors, stderr=None, dim=2), np.arange(500))
    assert (many, MOST_CLASSES) == ({}, 100)


def test_guidance_where_the_data_are_missing_is_left_to_the_cells_that_are_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWLIK_DATA", str(tmp_path))
    guided = get("ode", trace="hutchinson", guidance=1.0)
    check_own([Cell(task="cifar10", model="teacher", estimator=guided)])  # raises nothing


ONE_PROBE = {"solver": "euler", "steps": 1, "trace": "hutchinson", "probes": 2}


def of_digits(model: str, **options: Any) -> Cell:
    chosen = Options(**{"n_items": 40, "rounds": 0, **options})
    return Cell(task="digits", model=model, estimator=get("ode", **ONE_PROBE), options=chosen)


def test_the_field_of_classes_is_given_the_labels_of_digits_and_has_no_error_columns() -> None:
    row, arrays = run_cell(of_digits("teacher-classes", samples=8))
    labels = digits("test")[1][:40]
    assert arrays["label"].tolist() == labels.tolist()
    assert row["extra"]["classes"]["items"] == labels.bincount().tolist()
    assert (row["bpd_mae"], "another network" in row["reason"]) == (None, True)
    model, x = load_model("digits", "teacher-classes"), whole(get_task("digits").items("test", 40).x)
    generator = torch.Generator().manual_seed(0)
    alone = get("ode", **ONE_PROBE).log_prob(model, x, cond=labels, generator=generator)
    np.testing.assert_allclose(arrays["log_prob"], alone.log_prob, atol=1e-3)
    task = get_task("digits").for_model(model)
    twice = task.items("test", 3, draws=2).cond
    assert twice is not None
    assert twice.tolist() == 2 * labels[:3].tolist()
    drawn = task.sample_conditions("test", torch.arange(8))
    shown = get("ode", **ONE_PROBE).sample(
        model, 8, cond=drawn, items=torch.arange(8), generator=torch.Generator().manual_seed(0)
    )
    np.testing.assert_allclose(arrays["samples"], shown.x, atol=1e-5)


def test_other_models_of_digits_are_given_no_labels() -> None:
    row, arrays = run_cell(of_digits("teacher", n_items=4))
    assert ("label" in arrays, "classes" in row["extra"]) == (False, False)
    assert row["bpd_mae"] is not None
    assert prepare(replace(of_digits(""), estimator="control-mean")).items.cond is None  # type: ignore[union-attr]


def test_samples_without_labels_are_no_items_of_a_field_of_classes() -> None:
    row, _ = run_cell(of_digits("teacher-classes", split="teacher-samples"))
    assert (row["status"], "have no labels" in row["reason"]) == ("skipped", True)


def test_a_field_without_classes_cannot_be_guided_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "ode[solver=euler,steps=1,guidance=1]"
    done = CliRunner().invoke(app, ["run", "-t", "digits", "-m", "teacher", "-e", spec, "--out", "out"])
    assert (done.exit_code, Path("out").exists()) == (2, False), done.output
    assert done.output.endswith("guides to a label of each row, and teacher of digits is given none\n")
    assert done.output.count("\n") == 1


def test_a_class_that_the_field_of_digits_does_not_know_is_one_line() -> None:
    model, x = load_model("digits", "teacher-classes"), whole(get_task("digits").items("test", 2).x)
    with pytest.raises(ValueError, match="label 10 is of no class: expected 0 to 9"):
        flowlik.classify(model, x, [9, 10], estimator=get("ode", **ONE_PROBE))


def test_the_example_of_digits_says_both_accuracies_and_solves_close_images_again() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "examples" / "digit_classes.py"
    scope: dict[str, Any] = {"__name__": "digit_classes"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    quick = {"solver": "euler", "steps": 1, "clock": "stretched"}
    scope["FIRST"] = get("whitened-ode", trace="hutchinson", probes=2, **quick)
    scope["EXACT"], scope["CLOSE"] = get("whitened-ode", **quick), 1e9
    first, bayes, classifier, lead, moved, *_ = scope["report"](3)
    assert first.startswith("3 images, 10 evaluations each")
    assert classifier == "classifier      1.0000 [0.4385, 1.0000]"
    assert bayes.startswith("by Bayes' rule ")
    assert lead.endswith("for 3 images")
    assert "root mean square" in moved
