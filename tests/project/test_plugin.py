"""Somebody else's package, the templates of docs/templates as they stand, built, installed and used without an edit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowlik

TEMPLATES = Path(__file__).resolve().parents[2] / "docs" / "templates"
USE = """
import json, sys
from typer.testing import CliRunner
from flowlik.cli import app

def call(*arguments):
    done = CliRunner().invoke(app, arguments)
    return done.exit_code, done.output

out = sys.argv[1]
calls = {
    "estimators": ["list", "estimators"],
    "tasks": ["list", "tasks", "--json"],
    "models": ["list", "models", "--json"],
    "suites": ["list", "suites", "--json"],
    "check": ["check", "--plugins", "--only", "midpoint-rule"],
    "run": ["run", "cigar", "--limit", "50", "--no-report", "--out", out],
    "task": ["run", "-t", "cigar-2d", "-e", "midpoint-rule[steps=2]", "--dry-run"],
    "figures": ["figures", out],
    "report": ["report", out],
}
json.dump({name: call(*arguments) for name, arguments in calls.items()}, sys.stdout)
"""
BROKEN = {
    "bad.py": "import sys\nsys.exit('stop')\n",
    "bad-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: bad\nVersion: 1\n",
    "bad-1.dist-info/entry_points.txt": "[flowlik.tasks]\nbad-task = bad:TASK\n",
}


def python(code: str, *arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([*filter(None, sys.path), str(path)])
    return subprocess.run(
        [sys.executable, *code.split(maxsplit=1), *arguments]
        if code.startswith("-m")
        else [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the templates as pip installs them, from their own pyproject and without any index."""
    target = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(TEMPLATES)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_templates_are_short() -> None:
    for file in TEMPLATES.glob("[!_]*"):
        if file.is_file():
            assert 20 <= len(file.read_text().splitlines()) <= 40, file.name


def test_an_installed_package_adds_one_of_each_kind(installed: Path, tmp_path: Path) -> None:
    done = python(USE, str(tmp_path / "out"), path=installed)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert {name: code for name, (code, _) in said.items() if code} == {}, said
    assert "midpoint-rule " in said["estimators"][1]
    assert json.loads(said["tasks"][1])["cigar-2d"] == "a Gaussian ten times as long as it is wide"
    assert json.loads(said["models"][1])["cigar-2d"] == "closed-form, axis-map"
    assert json.loads(said["suites"][1])["cigar"] == "midpoint steps and a joint map on a long Gaussian"
    assert "15 checks: 15 passed" in said["check"][1]
    assert "cigar-2d · closed-form · midpoint-rule[steps=2]" in said["task"][1]
    assert "cigar-2d--error-tail.png" in said["figures"][1]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Tail of the error" in page
    assert "median |error|" in page
    frame = flowlik.read_records(tmp_path / "out").set_index("estimator_label")
    assert frame.loc["midpoint-rule[steps=32]", "estimator"] == "midpoint-rule"
    assert frame.loc["midpoint-rule[steps=32]", "nfe_mean"] == 64
    assert (
        frame.loc["midpoint-rule[steps=32]", "bpd_mae"]
        < frame.loc["midpoint-rule[steps=16]", "bpd_mae"]
        < 0.05
    )
    assert frame.loc["f2d2[steps=1]", "model"] == "axis-map"
    assert frame.loc["f2d2[steps=1]", "model_hash"] != frame.loc["midpoint-rule[steps=32]", "model_hash"]
    assert "control-gaussian" in frame.index


def test_a_broken_package_is_one_line_and_the_rest_works(tmp_path: Path) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = python("-m flowlik", "list", "tasks", path=tmp_path)
    assert (done.returncode, "gmm-2d " in done.stdout) == (0, True)
    (line,) = done.stderr.splitlines()
    assert "plug-in 'bad-task' (bad:TASK of bad) is left out: SystemExit: stop" in line


def test_a_package_cannot_take_a_built_in_name(tmp_path: Path) -> None:
    for name, text in BROKEN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("bad-task", "gmm-2d"))
    done = python("-m flowlik", "list", "tasks", path=tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert (
        "flowlik.tasks: the name 'gmm-2d' belongs to flowlik itself, and bad:TASK of bad gives it too" in line
    )
