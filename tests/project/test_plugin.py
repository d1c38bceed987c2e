"""Somebody else's package, the templates of docs/templates as they stand, built, installed and used without an edit."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
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
PLAIN = {
    "plain.py": """
        from dataclasses import dataclass
        from functools import cached_property
        import torch
        from flowlik.tasks import ClosedFormTask, digest
        from flowlik_estimators import Estimate, Estimator
        from flowlik_models.gaussian import Gaussian

        @dataclass(frozen=True, kw_only=True)
        class Off(Estimator):
            family = "ode"
            more = 0.0
            by: float = 0.0

            def supports(self, model):
                return None if hasattr(model, "log_prob") else "needs log_prob"

            def _log_prob(self, model, x, run):
                model.velocity(x, run.at(0.5))
                return Estimate(log_prob=model.log_prob(x, run.data_end) + self.by + self.more)

        class More(Off):
            more = 1.0

        class Most(Off):
            more = 2.0

        @dataclass(frozen=True, kw_only=True)
        class Round(ClosedFormTask):
            id: str = "round-2d"
            event_shape: tuple[int, ...] = (2,)
            description: str = "N(0, I) in the plane"

            @cached_property
            def truth(self):
                return Gaussian(torch.zeros(2), torch.eye(2))

            def data_hash(self, split):
                return digest(self.id, self.version, split)

        @dataclass(frozen=True, kw_only=True)
        class Wide(Round):
            id: str = "wide-2d"

            @cached_property
            def truth(self):
                return Gaussian(torch.zeros(2), 4.0 * torch.eye(2))
    """,
    "plain-1.dist-info/METADATA": "Metadata-Version: 2.1\nName: plain\nVersion: 1\n",
    "plain-1.dist-info/entry_points.txt": """
        [flowlik.estimators]
        off = plain:Off
        off-more = plain:More
        off-most = plain:Most
        [flowlik.tasks]
        round-2d = plain:Round
        wide-2d = plain:Wide
    """,
}
ALL = """
import json, sys
from pathlib import Path
from typer.testing import CliRunner
from flowlik.cli import app

def call(*arguments):
    done = CliRunner().invoke(app, arguments)
    said.append((" ".join(arguments[:2]), done.exit_code, done.output))

if __name__ == "__main__":
    said, out, executor = [], sys.argv[1], ["--executor", sys.argv[2]]
    tasks = ["-t", "round-2d", "-t", "wide-2d"]
    names = ["-e", "off", "-e", "off-more", "-e", "off-most"]
    call("list", "estimators")
    call("list", "tasks")
    call("run", *names, *tasks, "--limit", "40", "--no-report", "--out", out, *executor)
    call("run", *names, *tasks, "--limit", "40", "--no-report", "--out", out, *executor, "--resume")
    cells = [json.loads(line) for line in (Path(out) / "records.jsonl").read_text().splitlines()]
    for name in ("off", "off-more", "off-most"):
        call("reproduce", next(c["cell_id"] for c in cells if c["estimator"] == name), "--in", out)
    call("compare", out, "-e", "off", "-e", "off-most")
    json.dump(said, sys.stdout)
"""


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


def written(files: dict[str, str], folder: Path) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.mark.parametrize(
    "executor",
    [
        "serial",
        pytest.param(
            "ray",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("ray") is None,
                reason="Ray is not installed: pip install 'flowlik[ray]'",
            ),
        ),
    ],
)
def test_undecorated_plug_ins_keep_their_names_through_every_command(executor: str, tmp_path: Path) -> None:
    """Three estimators of equal fields and two tasks, known by entry points alone, beside a package that is broken."""
    site = written(BROKEN, written(PLAIN, tmp_path / "site"))
    done = python(ALL, str(tmp_path / "out"), executor, path=site)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert [code for _, code, _ in said] == [0] * len(said), said
    estimators, tasks, _, _, *again, compared = (output for *_, output in said)
    assert all(f"{name} " in estimators for name in ("off", "off-more", "off-most"))
    assert all(f"{name} " in tasks for name in ("round-2d", "wide-2d"))
    frame = flowlik.read_records(tmp_path / "out")
    assert len(frame) == len(frame["cell_id"].unique())  # --resume ran nothing again
    own = frame[~frame["estimator"].str.startswith("control")]
    found = {(row.task, row.estimator): row.bpd_error for row in own.itertuples()}
    nats = {"off": 0.0, "off-more": 1.0, "off-most": 2.0}
    right = {(task, name): -nats[name] / 2 / math.log(2) for task in ("round-2d", "wide-2d") for name in nats}
    assert found == pytest.approx(right, abs=1e-6)
    assert all("bit for bit" in output for output in again), again
    assert f"{1 / math.log(2):.2f}" in compared


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
