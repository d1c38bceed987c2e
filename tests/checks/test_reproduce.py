"""Every row leads back to what made it, comes again when it is run again, and joins only its like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_run import record, write_rows
from typer.testing import CliRunner

import flowlik
from flowlik.cells import Cell, Options
from flowlik.checks.reproduce import cell_of, find, reproduce
from flowlik.cli import app
from flowlik.records.merging import merge_runs
from flowlik.records.reading import read_rows
from flowlik.records.writing import read_arrays, write_arrays
from flowlik.running.run import run_cells
from flowlik.tasks import task as tasks
from flowlik_estimators import parse_spec


def call(*arguments: str) -> Any:
    return CliRunner().invoke(app, [*arguments])


def some_run(out: Path, spec: str = "f2d2[steps=2]", **options: Any) -> list[dict[str, Any]]:
    chosen = Options(**({"n_items": 30, "batch_size": 20, "rounds": 0} | options))
    cells = [
        Cell(task="gaussian-2d", model="closed-form", estimator=estimator, options=chosen)
        for estimator in [*parse_spec(spec), "control-mean"]
    ]
    list(run_cells(cells, out, argv=["flowlik", "run", "quick"]))
    return read_rows(out)


def altered(out: Path, row: dict[str, Any], **changes: Any) -> None:
    rows = [one | changes if one["cell_id"] == row["cell_id"] else one for one in read_rows(out)]
    write_rows(out, rows)


def test_a_row_leads_to_commit_versions_command_and_hashes(tmp_path: Path) -> None:
    row, _ = some_run(tmp_path)
    found = find(row["cell_id"][:8], [tmp_path])
    assert found.environment["argv"] == ["flowlik", "run", "quick"]
    assert {"commit", "dirty", "torch", "versions", "cpu", "gpu"} <= set(found.environment)
    assert row["model_hash"]
    assert row["data_hash"]


@pytest.mark.parametrize("spec", ["f2d2[steps=2]", "ode[solver=heun,steps=3,trace=hutchinson,probes=2]"])
@pytest.mark.parametrize("options", [{}, {"density": True, "seed": 3, "dtype": "float64", "split": "train"}])
def test_a_record_gives_its_cell_back_and_comes_again_bit_for_bit(
    tmp_path: Path, spec: str, options: dict[str, Any]
) -> None:
    for row in some_run(tmp_path, spec, **options):
        again = reproduce(find(row["cell_id"], [tmp_path]))
        assert again.verdict == "identical", again.lines


def test_a_number_that_was_changed_does_not_come_again(tmp_path: Path) -> None:
    row, _ = some_run(tmp_path)
    file = tmp_path / "items" / f"{row['cell_id']}.npz"
    arrays = read_arrays(file)
    for shift, verdict in ((1e-7, "rounding"), (1e-3, "different"), (np.nan, "different")):
        write_arrays(file, arrays | {"log_prob": arrays["log_prob"] + shift})
        assert reproduce(find(row["cell_id"], [tmp_path])).verdict == verdict
    write_arrays(file, arrays)
    altered(tmp_path, row, nfe_mean=3.0)
    again = reproduce(find(row["cell_id"], [tmp_path]))
    assert again.verdict == "different"
    assert "nfe_mean 3.0 -> 2.0" in again.lines


def test_a_mean_that_was_not_computed_from_its_items_does_not_come_again(tmp_path: Path) -> None:
    row, _ = some_run(tmp_path)
    altered(tmp_path, row, bpd=row["bpd"] + 0.1, bpd_error=row["bpd_error"] + 0.1)
    again = reproduce(find(row["cell_id"], [tmp_path]))
    assert again.verdict == "different"
    assert any(line.startswith("bpd_error") for line in again.lines)


def test_another_model_is_another_cell_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row, _ = some_run(tmp_path)
    monkeypatch.setattr(tasks, "model_hash", lambda task, model: "another")
    from flowlik.evaluation.models import load

    load.cache_clear()
    again = reproduce(find(row["cell_id"], [tmp_path]))
    load.cache_clear()
    assert again.verdict == "different"
    assert any(line.startswith("model hash") and line.endswith("another") for line in again.lines)


def test_the_command_reproduces_and_its_status_says_whether(tmp_path: Path) -> None:
    row, _ = some_run(tmp_path)
    fine = call("reproduce", row["cell_id"], "--in", str(tmp_path))
    assert fine.exit_code == 0, fine.output
    assert "bit for bit" in fine.output
    assert "flowlik run quick" in fine.output
    altered(tmp_path, row, status="diverged")
    bad = call("reproduce", row["cell_id"], "--in", str(tmp_path))
    assert bad.exit_code == 1
    assert "NOT reproduced" in bad.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"extra": {}},
            "run it anew: flowlik run -t gaussian-2d -m closed-form -e 'f2d2[steps=2]'",
        ),
        ({"extra": {"options": {"n_items": "many"}}}, "does not hold the options"),
        ({"task": "gone"}, "unknown task"),
        ({"estimator_label": "gone[x=1]"}, "unknown estimator"),
    ],
)
def test_a_record_that_names_no_cell_is_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    row, _ = some_run(tmp_path)
    altered(tmp_path, row, **changes)
    done = call("reproduce", row["cell_id"], "--in", str(tmp_path))
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_id_must_be_of_one_cell(tmp_path: Path) -> None:
    some_run(tmp_path)
    for cell_id, message in (("", "beginning of 2 cells"), ("zzzz", "no cell 'zzzz'")):
        with pytest.raises(ValueError, match=message):
            find(cell_id, [tmp_path])


# --- merging ------------------------------------------------------------------------------------------------


def test_runs_of_different_cells_join_and_nothing_is_doubled(tmp_path: Path) -> None:
    some_run(tmp_path / "a", "f2d2[steps=1|2]")
    some_run(tmp_path / "b", "f2d2[steps=2|4]")
    merged = merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    assert (merged.cells, merged.common) == (4, 2)
    frame = flowlik.read_records(tmp_path / "both")
    assert sorted(frame["estimator_label"]) == [
        "control-mean",
        "f2d2[steps=1]",
        "f2d2[steps=2]",
        "f2d2[steps=4]",
    ]
    for cell_id in frame["cell_id"]:
        assert (tmp_path / "both" / "items" / f"{cell_id}.npz").is_file()
    known = (tmp_path / "both" / "environments.jsonl").read_text().splitlines()
    assert set(frame["env_id"]) <= {json.loads(line)["env_id"] for line in known}
    row = read_rows(tmp_path / "both")[0]
    assert reproduce(find(row["cell_id"], [tmp_path / "both"])).verdict == "identical"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_hash": "other"}, "the model hashes of m on t differ: one in .*, other in"),
        ({"data_hash": "other"}, r"the data hashes of t \(test\) differ"),
        ({"schema_version": 2}, "schema 2, not 1"),
        ({"cell_id": "../../elsewhere"}, "is no id of a cell"),
        ({"cell_id": "..", "model_hash": None}, "is no id of a cell"),
    ],
)
def test_runs_that_mean_different_things_are_refused_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    same = {"task": "t", "model": "m", "model_hash": "one", "data_hash": "one"}
    write_rows(tmp_path / "a", [record(cell_id="1", **same)])
    write_rows(tmp_path / "b", [record(**({"cell_id": "2"} | same | change))])
    with pytest.raises(ValueError, match=message):
        merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("off", "differ"), [(1e-6, False), (0.1, True)])
def test_two_answers_of_one_cell_are_not_joined(tmp_path: Path, off: float, differ: bool) -> None:
    for folder, bpd in (("a", 1.0), ("b", 1.0 + off)):
        write_rows(tmp_path / folder, [record(cell_id="1", status="ok", bpd=bpd)])
    runs = [tmp_path / "a", tmp_path / "b"]
    if not differ:
        assert merge_runs(runs, tmp_path / "out").common == 1
        return
    with pytest.raises(ValueError, match=r"results of cell 1 differ: 1 in .*, 1.1 in .*flowlik reproduce 1"):
        merge_runs(runs, tmp_path / "out")


def test_a_finished_record_beats_one_that_failed_wherever_it_stands(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [record(cell_id="1", status="ok", created_utc="2026-01-01T00:00:00Z")])
    write_rows(tmp_path / "b", [record(cell_id="1", status="timeout", created_utc="2026-01-02T00:00:00Z")])
    for number, order in enumerate(("ab", "ba")):
        out = tmp_path / f"out{number}"
        merge_runs([tmp_path / name for name in order], out)
        assert [row["status"] for row in read_rows(out)] == ["ok"]


@pytest.mark.parametrize(
    ("other", "suite"),
    [
        ({"suite": "few-steps", "finished": "2026-01-02"}, "few-steps"),
        ({"suite": "quick", "finished": "2026-01-02"}, "merged runs"),
        ({"suite": "few-steps", "finished": None}, "merged runs"),
        (["not a note"], "merged runs"),
        (None, "merged runs"),
    ],
)
def test_finished_parts_of_a_suite_are_that_suite(tmp_path: Path, other: Any, suite: str) -> None:
    for name, note in (("a", {"suite": "few-steps", "finished": "2026-01-01"}), ("b", other)):
        write_rows(tmp_path / name, [record(cell_id=name)])
        if note is not None:
            (tmp_path / name / "run.json").write_text(json.dumps(note))
    merge_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["suite"] == suite


def test_merging_into_a_run_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "a", [record(cell_id="1")])
    done = call("merge", str(tmp_path / "a"), "--out", str(tmp_path / "a"))
    assert done.exit_code == 2
    assert "holds records already" in done.stderr


def test_cell_of_keeps_every_option(tmp_path: Path) -> None:
    options = Options(n_items=7, batch_size=3, rounds=2, timing_batch=5, draws=2, seed=9, repeat=1)
    cell = Cell(
        task="digits", model="teacher", estimator=parse_spec("ode[solver=euler,steps=1]")[0], options=options
    )
    from flowlik.evaluation.prepare import Prepared
    from flowlik.evaluation.row import blank_row
    from flowlik.tasks.registry import get_task

    row = blank_row(Prepared(cell=cell, cell_id="0", task=get_task("digits")), "run", None)
    assert cell_of(row) == cell
