"""On the terminal: a run's result and progress, an estimator's options, the version, two methods compared."""

from __future__ import annotations

import io
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from fake_run import record, write_fake_run, write_rows
from rich.console import Console
from typer.testing import CliRunner

from flowlik.cells import Cell
from flowlik.cli import app
from flowlik.commands.outcome import result_lines
from flowlik.commands.progress import time_left, with_progress
from flowlik.report.recommend import load, recommend
from flowlik.running.run_folder import Outcome


def test_a_run_ends_with_what_recommend_says_and_with_what_failed(tmp_path: Path) -> None:
    run_dir = write_fake_run(tmp_path, tasks=("gmm-2d", "thin-2d"), n=40)
    lines = result_lines(run_dir)
    frame = load([run_dir])
    for task in ("gmm-2d", "thin-2d"):
        (line,) = (line for line in lines if line.strip().startswith(f"{task}: "))
        assert str(recommend(frame, task, 8).best) in line
    failed = lines[lines.index("without a result:") + 1 :]
    assert "  1 refused: needs a joint map" in failed
    assert "  1 skipped: no data: flowlik data get cifar10" in failed


def test_reasons_are_counted_and_only_the_first_are_printed(tmp_path: Path) -> None:
    rows = [record(cell_id=f"{k}", status="error", reason=f"reason {k // 2}") for k in range(14)]
    write_rows(tmp_path, rows)
    lines = result_lines(tmp_path)
    assert lines[:2] == ["without a result:", "  2 error: reason 0"]
    assert lines[-1] == "  and 2 more reasons, in the report"


def test_a_run_without_records_ends_with_nothing(tmp_path: Path) -> None:
    assert result_lines(tmp_path) == []


@pytest.mark.parametrize(
    ("elapsed", "measured", "waiting", "words"),
    [
        (60.0, 10, 20, "2 min left"),
        (10.0, 10, 20, "20 s left"),
        (3600.0, 10, 20, "2.0 h left"),
        (5.0, 0, 9, ""),
        (5.0, 9, 0, ""),
    ],
)
def test_what_waits_takes_as_long_as_what_was_measured(
    elapsed: float, measured: int, waiting: int, words: str
) -> None:
    assert time_left(elapsed, measured, waiting) == words


def test_the_table_of_a_run_holds_the_last_cells_with_error_and_cost() -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=120)
    cell = Cell(task="gmm-2d", model="direct-f2d2", estimator="control-mean")
    rows = [record(cell_id=str(k), nfe_mean=4, task=f"task-{k}") | {"bpd_mae_all": 0.125} for k in range(10)]
    good = [Outcome(cell=cell, row=row, seconds=1.5) for row in rows]
    bad = Outcome(cell=cell, row=record(status="diverged", reason="no [bold]finite value"), seconds=0.1)
    assert len(list(with_progress(iter([*good, bad]), 11, screen))) == 11
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    last = text.rpartition("task  ")[2]
    assert "0.125" in last
    assert "task-9" in last
    assert "task-1 " not in last
    assert "no [bold]finite value" in text
    assert "11/11" in text


def test_a_run_without_a_report_says_where_its_records_are(tmp_path: Path) -> None:
    words = ["run", "-t", "gaussian-2d", "-e", "control-gaussian", "--limit", "20", "--no-report", "--out"]
    lines = CliRunner().invoke(app, [*words, str(tmp_path / "run")]).output.splitlines()
    assert lines[-2:] == ["3 cells: 3 ok", f"records: {tmp_path / 'run' / 'records.jsonl'}"]


def test_the_version_is_that_of_the_package() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output) == (0, f"flowlik {version('flowlik')}\n")


def test_the_options_of_an_estimator_stand_one_a_line_with_values_and_default() -> None:
    lines = CliRunner().invoke(app, ["list", "estimators", "f2d2"]).output.splitlines()
    options = dict(line.split(maxsplit=1) for line in lines[1:])
    assert options["steps"] == "int  (default: 4)"
    assert options["grid"].startswith("uniform|cosine")
    assert "``" not in lines[0]
    wrong = CliRunner().invoke(app, ["list", "estimators", "f3d3"])
    assert wrong.exit_code == 2
    assert "f2d2" in wrong.output


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("models", "gmm-2d"), r"(?s)^closed-form\n.*\nenergy\n.*\nlsd +to train: flowlik train gmm-2d lsd\n"),
        (("models", "imagenet64"), r"^none yet\n$"),
        (("tasks", "thin-2d"), r"^thin-2d +two rotated Gaussians.*\n$"),
        (("suites", "quick"), r"^quick +the whole picture.*\n$"),
        (("models", "gmm2d"), r"unknown task 'gmm2d'; did you mean 'gmm-2d'"),
        (("suites", "quik"), r"unknown suite 'quik'; did you mean 'quick'"),
    ],
)  # fmt: skip
def test_one_entry_of_a_list_stands_alone(words: tuple[str, ...], expected: str) -> None:
    assert re.search(expected, CliRunner().invoke(app, ["list", *words]).output)


def test_two_methods_of_one_run_or_two_runs(tmp_path: Path) -> None:
    run_dir = str(write_fake_run(tmp_path, tasks=("gmm-2d",), n=40))
    result = CliRunner().invoke(app, ["compare", run_dir, "-e", "f2d2[steps=8]", "-e", "f2d2[steps=1]"])
    assert result.exit_code == 0
    assert "f2d2[steps=8] -> f2d2[steps=1]" in result.output
    for given in ([run_dir], [run_dir, "-e", "ode"], [run_dir, run_dir, "-e", "a", "-e", "b"]):
        wrong = CliRunner().invoke(app, ["compare", *given])
        assert wrong.exit_code == 2
        assert "two methods of one" in wrong.output
