"""The paper's table: our rows beside published ones, which never look measured here nor of the data set at hand."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from fake_run import record, write_fake_run, write_rows
from PIL import Image

from flowlik.report import frame, labels
from flowlik.report.page.write import write_report
from flowlik.report.tables import run as runs
from flowlik.report.tables import table
from flowlik.report.tables.published import paper_compared_with, published_method, with_published
from flowlik.report.tables.table import Table

STEPS = (1, 2, 4, 8)


def _table(run_dir: Path) -> Table:
    found = [one for one in runs.tables(frame.load(run_dir)) if "published" in one.title]
    assert len(found) == 1
    return found[0]


def _cells(shown: Table, method: str, model: str) -> dict[str, table.Cell]:
    (row,) = [row for row in shown.rows if (row[0].text, row[1].text) == (method, model)]
    return dict(zip(shown.columns, row, strict=True))


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("cifar"), tasks=("cifar10",), n=40, steps=STEPS)


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_run(tmp_path_factory.mktemp("fashion"), tasks=("fashion-mnist",), n=40, steps=STEPS)


def test_the_same_method_on_the_same_data_stands_beside_its_published_values(cifar: Path) -> None:
    shown = _table(cifar)
    row = _cells(shown, "F2D2, 8 steps", "meanflow-f2d2")
    assert [row[f"published {what}"].text for what in ("bits/dim", "FID")] == ["2.38", "3.78"]
    assert row["published bits/dim"].published
    ours = [
        row[name] for name in ("NFE", "forward-equivalents", "bits/dim", "bias", "mean |error|", "Spearman")
    ]
    assert all(cell.value is not None and not cell.published for cell in ours)
    assert _cells(shown, "ODE, Euler, 1 step", "teacher")["published bits/dim"].text == "−111.19"
    assert _cells(shown, "Plain map, 2 steps", "meanflow")["published FID"].text == "2.84"
    assert _cells(shown, "ODE rk4, 8 steps", "teacher")["published bits/dim"].text == "–"
    assert _cells(shown, "converged", "teacher")["published bits/dim"].text == "3.12"


def test_published_rows_that_were_not_run_follow_all_in_grey(cifar: Path) -> None:
    shown = _table(cifar)
    rest = [row for row in shown.rows if row[1].text == "not in this run"]
    assert len(rest) == 4 * 4  # Shortcut and Shortcut-Distill, each without and with F2D2
    assert all(cell.published or cell.text == "–" for row in rest for cell in row)


def test_a_distance_by_another_extractor_is_named_and_not_called_fid(cifar: Path) -> None:
    shown = _table(cifar)
    assert "Fréchet distance (cifar10 classifier)" in shown.columns
    assert "Inception features: not comparable" in shown.note
    assert "arXiv 2512.02636" in shown.note


def test_values_of_another_data_set_say_so_in_every_cell(fashion: Path) -> None:
    shown = _table(fashion)
    grey = [cell for row in shown.rows for cell in row if cell.published]
    assert len(grey) >= 2 * 3 * 4
    assert all(cell.text.endswith(" on CIFAR-10") and cell.value is None for cell in grey)
    assert "not comparable with these rows" in shown.note
    assert not any(row[1].text == "not in this run" for row in shown.rows)


def test_only_test_images_of_such_tasks_have_the_table(tmp_path: Path) -> None:
    run = write_fake_run(tmp_path, tasks=("digits", "gmm-2d"), n=20, steps=(1,))
    assert not [one for one in runs.tables(frame.load(run)) if "published" in one.title]
    skipped = [record(task="cifar10", status="skipped", reason="no checkpoint")]
    write_rows(tmp_path / "skipped", skipped)
    assert runs.tables(frame.load(tmp_path / "skipped")) == []


def test_another_rule_is_not_taken_for_the_published_one(tmp_path: Path) -> None:
    common = {"task": "cifar10", "model": "teacher", "estimator": "ode", "family": "ode", "solver": "euler"}
    named = {"ode[solver=euler,steps=4,trace=hutchinson]": "Flow Matching"}
    named["ode[solver=euler,steps=4,grid=logsnr]"] = named["ode[solver=euler,steps=4,richardson=true]"] = ""
    write_rows(tmp_path, [record(**common, cell_id=k, estimator_label=k, bpd=1.0) for k in named])
    for row in labels.as_dicts(frame.load(tmp_path)):
        assert (published_method(row) or "") == named[row["estimator_label"]]
        small = {**row, "model": "teacher-small"}  # the same method on a network for two CPU cores
        assert published_method(small) == published_method(row)
        assert published_method({**row, "model": "teacher-smaller"}) is None


def test_grey_survives_every_format(cifar: Path) -> None:
    records = frame.load(cifar)
    assert "*2.38*" in runs.render(records, "md")
    assert r"\textcolor{gray}{2.38}" in runs.render(records, "latex")
    (cifar / "figures").mkdir()
    Image.new("RGB", (40, 20)).save(cifar / "figures" / "none.png")  # so that none are drawn
    page = write_report(cifar).read_text(encoding="utf-8")
    assert re.search(r'class="num published"[^>]*>2\.38<span class="sr"> \(published\)', page)
    assert ".published { color" in page


def test_a_task_without_a_reference_still_has_its_bits(tmp_path: Path) -> None:
    write_rows(tmp_path, [record(task="cifar10", cell_id="a", bpd=3.0, nfe_mean=4.0)])
    (shown,) = with_published(frame.load(tmp_path))
    assert shown.rows[0][0].text == "F2D2, 4 steps"
    assert _cells(shown, "F2D2, 4 steps", "meanflow-f2d2")["bias"].text == "–"


def test_every_published_value_is_whole() -> None:
    for task in ("cifar10", "imagenet64", "fashion-mnist", "mnist"):
        paper = paper_compared_with(task)
        assert paper is not None
        assert paper.same == (task in ("cifar10", "imagenet64"))
        assert all(one.bpd is not None and math.isfinite(one.bpd) and one.fid for one in paper.printed)
    assert paper_compared_with("gmm-2d") is None
