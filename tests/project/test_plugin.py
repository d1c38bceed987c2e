"""Somebody else's package, built, installed and used without an edit here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowlik

PLUGIN = Path(__file__).resolve().parents[1] / "plugin"
USE = """
import json, sys
from typer.testing import CliRunner
from flowlik.cli import app
from flowlik.checks.contract import contract_verdicts

def call(*arguments):
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output

json.dump({
    "estimators": call("list", "estimators"),
    "tasks": call("list", "tasks", "--json"),
    "verdicts": [(v.rule, v.passed, v.note) for v in contract_verdicts(("midpoint",))],
    "run": call("run", "-e", "midpoint[steps=64|128]", "-t", "cigar-2d", "--limit", "50", "--no-report", "--out",
                sys.argv[1]),
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in as pip installs it, from its own pyproject and without any index."""
    target = tmp_path_factory.mktemp("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    done = subprocess.run(
        [*pip, "--target", str(target), str(PLUGIN)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return target


def test_an_installed_package_adds_an_estimator_and_a_task(installed: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([*filter(None, sys.path), str(installed)])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "midpoint " in said["estimators"][1]
    assert json.loads(said["tasks"][1])["cigar-2d"] == "a Gaussian ten times as long as it is wide"
    assert len(said["verdicts"]) > 10
    assert [rule for rule, passed, _ in said["verdicts"] if not passed] == []
    assert [rule for rule, _, note in said["verdicts"] if note] == [], "every rule says something about it"
    assert said["run"][0] == 0, said["run"][1]
    frame = flowlik.read_records(tmp_path / "out").set_index("estimator_label")
    assert frame.loc["midpoint[steps=128]", "nfe_mean"] == 256
    assert frame.loc["midpoint[steps=128]", "bpd_mae"] < frame.loc["midpoint[steps=64]", "bpd_mae"] < 0.05
    assert "control-gaussian" in frame.index
