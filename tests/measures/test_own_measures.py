"""A measure of one's own, added as CONTRIBUTING says, and the one table of columns that shows it."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowlik
from flowlik.measures import Column, JudgedItems, Measure, accuracy, register, registry
from flowlik.report import frame as frames
from flowlik.report.page import glossary
from flowlik.report.tables import run as runs

ROOT = Path(__file__).resolve().parents[2]
USE = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from flowlik.cli import app
from flowlik.report.tables.columns import as_markdown, own_columns

def call(*arguments):
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return done.output

out, other = sys.argv[1:]
cell = ("-e", "ode[solver=rk4,steps=4]", "-t", "gmm-2d", "-m", "closed-form", "--no-report")
call("run", *cell, "--limit", "60", "--out", out)
call("run", *cell, "--limit", "40", "--out", other)
said = {"table": call("table", out), "csv": call("table", out, "--format", "csv")}
said["compare"] = call("compare", out, other)
call("report", out)
json.dump(said | {"page": Path(out, "report.html").read_text(), "columns": as_markdown(own_columns())}, sys.stdout)
"""


def used(script: str, path: list[Path], *arguments: Path) -> Any:
    """What a process with these folders on its path writes."""
    places = [*filter(None, sys.path), *map(str, path)]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the template of a measure as an installed package, and nothing else of the templates."""
    target, templates = tmp_path_factory.mktemp("installed"), ROOT / "docs" / "templates"
    (target / "flowlik_templates").symlink_to(templates)
    group = "flowlik.measures"
    points = tomllib.loads((templates / "pyproject.toml").read_text())["project"]["entry-points"][group]
    known = target / "flowlik_templates-1.dist-info"
    known.mkdir()
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: flowlik-templates\nVersion: 1\n")
    lines = [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (known / "entry_points.txt").write_text("\n".join(lines))
    return target


def test_a_measure_of_ones_own_stands_in_records_tables_report_comparison_and_list(
    installed: Path, tmp_path: Path
) -> None:
    said = used(USE, [installed], tmp_path / "out", tmp_path / "other")
    for table in ("table", "page"):
        assert said[table].count("median \\|error\\|" if table == "table" else "median |error|") >= 1, table
    assert "Half of the items have a smaller absolute error." in said["page"]
    assert said["csv"].splitlines()[0].endswith(",cell_id,bpd_err_median")
    assert re.search(r"rk4.*: median \|error\| [\d.]+ -> [\d.]+", said["compare"])
    assert "| `bpd_err_median` | bits/dim | less | Half of the items" in said["columns"]
    rows = flowlik.read_records(tmp_path / "out")  # here it is not installed
    assert len(rows) > 1
    assert all(0 <= extra["bpd_err_median"] <= p95 for extra, p95 in zip(rows["extra"], rows["bpd_err_p95"]))  # noqa: B905
    assert "median \\|error" not in runs.render(rows, "md")


CHANGED = """
import ast, importlib.util, json, sys, types
from pathlib import Path

class Changed(ast.NodeTransformer):
    def visit_Call(self, node):
        of = getattr(node.func, "id", "") == "Column" and getattr(node.args[0], "value", "") == "bpd_err_p95"
        return None if of else self.generic_visit(node)

    def visit_Assign(self, node):
        if getattr(node.targets[0], "id", "") == "_ACCURACY":
            new = 'Column("bpd_least", "The least of it.", unit="bits/dim", head="least", measured="items")'
            node.value.args.append(ast.parse(new, mode="eval").body)
        return self.generic_visit(node)

spec = importlib.util.find_spec("flowlik.records.columns")
table = sys.modules[spec.name] = types.ModuleType(spec.name)
tree = Changed().visit(ast.parse(Path(spec.origin).read_text()))
exec(compile(ast.fix_missing_locations(tree), spec.origin, "exec"), table.__dict__)

from fake_run import record, write_fake_run, write_rows
from flowlik.cells import Cell
from flowlik.report import frame
from flowlik.report.page import glossary
from flowlik.report.tables import columns, run
from flowlik.running.run import run_cell

folder = write_fake_run(Path(sys.argv[1]), tasks=("gmm-2d",))
records = frame.load(folder)
write_rows(folder / "new", [record(bpd=1.0, bpd_least=0.125)])
page = Path(sys.argv[2]).read_text()
json.dump({
    "row": sorted(run_cell(Cell(task="gmm-2d", model="", estimator="control-mean"))[0]),
    "frame": list(records.columns),
    "table": run.render(records, "md"),
    "new": run.render(frame.load(folder / "new"), "md"),
    "csv": run.csv_columns(),
    "glossary": glossary.measures(),
    "page": columns.as_markdown(),
    "page is due": columns.in_page(page) != page,
}, sys.stdout)
"""


def test_what_a_row_of_the_table_adds_or_takes_away_is_seen_everywhere(tmp_path: Path) -> None:
    said = used(CHANGED, [ROOT / "tests"], tmp_path, ROOT / "docs" / "records.md")
    for name in ("row", "frame", "csv"):
        assert "bpd_mae" in said[name], name
        assert "bpd_err_p95" not in said[name], name
        assert "bpd_least" in said[name], name
    assert said["csv"][-1] == "bpd_least"
    assert "mean \\|error\\|" in said["table"]
    assert "p95" not in said["table"]
    assert re.search(r"least +\|\n.*\n.* 0\.125 \|", said["new"])
    known = dict(said["glossary"])
    assert "mean |error|" in known
    assert "p95 |error|" not in known
    assert known["least"] == "The least of it."
    assert "| `bpd_least` | bits/dim |  | The least of it. |" in said["page"]
    assert "bpd_err_p95" not in said["page"]
    assert said["page is due"]


# ------------------------------------------------------------------------------------------------------- the registry
@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", {})
    monkeypatch.setattr(registry, "_LOADED", {registry.ENTRY_POINT_GROUP})


SHARE = Column("far_share", "Share of items that are off by more than 0.1.", unit="share", head="far")


def measure(**values: float) -> Measure:
    return Measure(columns=(SHARE,), compute=lambda items: values)


def items(n: int = 4) -> JudgedItems:
    log_prob = np.linspace(-2.0, -1.0, n)[None]
    return accuracy.judged(log_prob, log_prob - 0.5, np.ones((1, n), dtype=bool), dim=2)


def test_a_measure_sees_errors_in_bits_per_dim_and_nan_where_nothing_is_known() -> None:
    log_prob = np.array([[-1.0, math.nan, -1.0, -1.0]])
    ref = np.array([[-2.0, -2.0, math.nan, -1.0]])
    valid = np.array([[True, True, True, False]])
    judged = accuracy.judged(log_prob, ref, valid, dim=2, stderr=np.full((1, 4), 2 * math.log(2)))
    half = 0.5 / math.log(2)
    assert judged.errors == pytest.approx([-half, math.nan, math.nan, math.nan], nan_ok=True)
    assert judged.bpd == pytest.approx(
        [0.5 / math.log(2)] * 1 + [math.nan] + [0.5 / math.log(2)] + [math.nan], nan_ok=True
    )
    assert judged.stderr == pytest.approx([1.0, math.nan, 1.0, math.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (replace(SHARE, name="bpd_mae"), "'bpd_mae' already"),
        (replace(SHARE, name="energy_distance"), "'energy_distance' already"),
        (replace(SHARE, group="accuracy"), "group 'extra'"),
        (replace(SHARE, kind="text"), "group 'extra'"),
    ],
)
def test_a_column_that_is_taken_or_no_number_of_extra_is_refused(column: Column, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        register("far", Measure(columns=(column,), compute=lambda items: {}))


def test_names_and_columns_are_taken_once() -> None:
    first = measure(far_share=0.5)
    register("far", first)
    register("far", first)
    with pytest.raises(ValueError, match="already registered"):
        register("far", measure())
    with pytest.raises(ValueError, match="'far_share' already"):
        register("other", measure())


def test_a_measure_that_fails_costs_its_own_value_alone() -> None:
    register("far", Measure(columns=(SHARE,), compute=lambda items: {"far_share": 1 / 0}))
    register("near", Measure(columns=(replace(SHARE, name="near"),), compute=lambda items: {"near": 1}))
    assert registry.computed(items()) == {
        "far_share": "none: ZeroDivisionError: division by zero",
        "near": 1.0,
    }


def test_a_value_without_a_column_is_named() -> None:
    register("far", measure(far_shre=0.5))
    assert "did you mean 'far_share'" in registry.computed(items())["far_share"]


def test_values_over_seeds_are_averaged_with_their_standard_deviation(tmp_path: Path) -> None:
    from fake_run import record, write_rows

    register("far", Measure(columns=(replace(SHARE, over_seeds=True),), compute=lambda items: {}))
    write_rows(
        tmp_path,
        [
            record(cell_id=str(s), seed=s, bpd=1.0, extra={"far_share": share})
            for s, share in enumerate((0.1, 0.3))
        ],
    )
    (row,) = frames.averaged(frames.load(tmp_path)).to_dict("records")
    assert (row["far_share"], row["far_share_sd"]) == pytest.approx((0.2, math.sqrt(0.02)))
    assert "0.200 ± 0.14" in runs.render(flowlik.read_records(tmp_path), "md")
    assert ("far", SHARE.meaning) in glossary.measures()
