"""A file in place of a task's name, as a user types it."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from own_files import TASK, write_task
from typer.testing import CliRunner, Result

import flowlik
from flowlik.cli import app
from flowlik.evaluation.models import load
from flowlik.tasks.arrays import REFERENCES_VARIABLE
from flowlik.tasks.own import task_file

PAGE = Path(__file__).resolve().parents[2] / "docs" / "your-own-data.md"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(REFERENCES_VARIABLE, "")
    path = list(sys.path)
    yield
    task_file.forget()
    load.cache_clear()
    sys.modules.pop("field", None)
    sys.path[:] = path


def flowlik_(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def refused(*words: str) -> str:
    """The one line that a command ends with, status 2."""
    done = flowlik_(*words)
    assert done.exit_code == 2, done.output
    (line,) = [line for line in done.output.splitlines() if line.startswith("flowlik: ")]
    return line


def test_a_run_of_a_file_its_reference_and_the_run_that_finds_it(tmp_path: Path) -> None:
    file = str(write_task(tmp_path / "user", "cli-mine"))
    run = ("run", "-t", file, "--limit", "20", "--out", "out", "--no-report")
    done = flowlik_(*run)
    assert done.exit_code == 0, done.output
    first = flowlik.read_records(Path("out/records.jsonl")).set_index("estimator")
    assert set(first.index) == {
        "ode",
        "control-mean",
        "control-median",
        "control-gaussian",
    }  # f2d2 does not fit a field
    assert first.loc["ode", "status"] == "ok"
    assert first.loc["ode", "bpd"] == pytest.approx(3.05, abs=0.4)  # log2(2 sqrt(2 pi e)), 20 items
    assert np.isnan(first.loc["ode", "bpd_error"])
    assert "flowlik reference mine.py" in first.loc["ode", "reason"]
    assert "3 done before" not in done.output

    assert flowlik_("reference", file, "--limit", "20").exit_code == 0
    done = flowlik_(*run, "--resume")
    assert done.exit_code == 0, done.output
    both = flowlik.read_records(Path("out/records.jsonl"))
    last = both[both["estimator"] == "ode"].iloc[-1]
    assert last["ref_id"] == "net-rk4-64"
    assert abs(last["bpd_error"]) < 1e-3
    assert last["bpd"] == first.loc["ode", "bpd"]
    assert "done before" in flowlik_(*run, "--resume").output
    for written in (*Path("out").glob("*.json*"), *Path("runs/references").glob("*.json")):
        assert str(tmp_path) not in written.read_text(), written


def test_the_example_of_the_page_runs_and_is_short(tmp_path: Path) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(example.splitlines()) <= 15
    Path("mine.py").write_text(example)
    done = flowlik_("run", "-t", "mine.py", "--limit", "12", "--out", "out", "--no-report")
    assert done.exit_code == 0, done.output
    records = flowlik.read_records(Path("out/records.jsonl")).set_index("estimator")
    assert records.loc["ode", "bpd"] == pytest.approx(1.96, abs=0.4)  # 1.93 and 1.99 by the digits' reference
    assert records.loc["ode", "bpd"] < records.loc["control-gaussian", "bpd"]
    assert flowlik_("list", "models", "mine.py").output.split() == ["my-digits", "teacher"]
    scored = flowlik_("score", "mine.py", "--limit", "12", "--accuracy", "0.05")
    assert scored.exit_code == 0, scored.output
    (line,) = scored.stdout.splitlines()
    found = re.match(r"teacher on my-digits: ([\d.]+) bits/dim \(bound\); standard error", line)
    assert found is not None
    assert float(found[1]) == pytest.approx(records.loc["ode", "bpd"], abs=0.15)  # of other probes and draws
    assert sorted(file.name for file in Path("runs/score/my-digits").iterdir()) == [
        "teacher.json",
        "teacher.npz",
    ]
    assert "goes on with" in flowlik_("score", "mine.py", "--limit", "12", "--accuracy", "0.05").stderr


LABELS = TASK.replace("models=", 'labels={"train": range(300), "test": range(99)}, models=')
BAD = {
    "raises": ("1 / 0", r"mine\.py, line 1: ZeroDivisionError"),
    "no TASK": ("x = 1", r"mine\.py: no TASK in it; expected TASK = flowlik\.ArrayTask"),
    "two": (TASK + "TASK = TASK", r"mine\.py: TASK is set 2 times \(lines 6 and 7\)"),
    "NaN": (TASK.replace("x[:300]", "x[:300] / 0"), r"mine\.py, line 6: train: row 0 holds NaN or infinity"),
    "type": (TASK.replace("x[300:]", "x[300:] > 0"), r"mine\.py, line 6: test: bool values, expected floats"),
    "levels": (
        TASK.replace("x = 2", "y = 2").replace("\nTASK", "\nx = torch.arange(800).view(400, 2)\nTASK"),
        r"mine\.py, line 7: train: int64, which are levels: .* \(levels=256\)",
    ),
    "labels": (LABELS, r"mine\.py, line 6: labels of test: 99 of them for 100 rows"),
    "GPU": (
        TASK.replace("Field}", "lambda: Field().cuda()}"),
        r"mine\.py.* model 'net': .*there is no such GPU here: .*map_location",
    ),
    "GPU on import": (
        TASK + "torch.ones(1, device='cuda')",
        r"mine\.py, line 7: .*there is no such GPU here",
    ),
    "weights": (
        TASK.replace("Field}", "lambda: Field().load_state_dict({'w': x})}"),
        r"flowlik: mine\.py.*the weights do not fit",
    ),
    "argument": (TASK.replace("id=", "name="), r"unexpected keyword argument 'name'$"),
    "floats of levels": (
        TASK.replace("models=", "levels=17, models=").replace("+ 1", "+ 1\nx = x.round().clamp(0, 16)"),
        r"mine\.py, line 7: train: float32, expected whole numbers 0\.\.16 .*: x\.astype\('uint8'\)$",
    ),
    "signature": (
        TASK.replace("Field}", "lambda: flowlik.wrap(torch.nn.Linear(3, 2), (2,))}"),
        r"mine\.py: model 'net'.*call=lambda net, z, u, cond",
    ),
    "no velocity": (
        TASK.replace("Field}", "torch.nn.Linear(2, 2)}"),
        r"mine\.py: model 'net'.*flowlik\.wrap",
    ),
}


COMMANDS = ("run", "reference", "score", "train", "check")
ONE_COMMAND = ("type", "labels", "argument", "floats of levels", "signature")
"""Read before it matters which command asks."""


def asked(command: str, file: str) -> tuple[str, ...]:
    return {
        "run": ("run", "-t", file, "--out", "out"),
        "train": ("train", file, "direct-f2d2", "--out", "out"),
        "check": ("check", file),
    }.get(command, (command, file, "--out", "out"))


@pytest.mark.parametrize(
    ("command", "case"),
    [(command, case) for command in COMMANDS for case in BAD if command == "run" or case not in ONE_COMMAND],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_bad_file_ends_with_status_2_and_nothing_written(tmp_path: Path, command: str, case: str) -> None:
    text, words = BAD[case]
    file = str(write_task(tmp_path / "user", f"cli-bad-{command}", text))
    line = refused(*asked(command, file))
    assert re.search(words, line), line
    assert [path.name for path in tmp_path.iterdir()] == ["user"]


@pytest.mark.parametrize("command", ["run", "reference", "score", "train", "check"])
def test_a_file_that_is_not_there_ends_with_status_2_and_nothing_written(
    tmp_path: Path, command: str
) -> None:
    assert re.search(r"nothere\.py: no such file; expected .* TASK", refused(*asked(command, "nothere.py")))
    assert not list(tmp_path.iterdir())


def test_what_a_command_has_not_for_a_file_it_says_in_one_line(tmp_path: Path) -> None:
    file = str(write_task(tmp_path / "user", "cli-words"))
    assert "no such file" in refused("run", "-t", "nothere.py")
    assert "unknown student 'teacher'" in refused("train", file, "teacher")
    assert "its name ends in .py" in refused("list", "suites", file)
    assert "--ship copies into the source tree" in refused("reference", file, "--ship")
    assert "have no effect" in refused("check", file, "--plugins")
    assert "unknown model of task 'cli-words'" in refused("run", "-t", file, "-e", "ode", "-m", "nett")
    other = str(write_task(tmp_path / "other", "cli-words"))
    line = refused("run", "-t", file, "-t", other)
    assert file in line
    assert other in line


def test_check_examines_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flowlik.checks import examination

    file = str(write_task(tmp_path / "user", "cli-check"))
    monkeypatch.setattr(examination, "examine", lambda model, x: ["time turned"])
    done = flowlik_("check", file)
    assert (done.exit_code, done.output) == (1, "net: time turned\n")
    monkeypatch.setattr(examination, "examine", lambda model, x: [])
    done = flowlik_("check", file)
    assert (done.exit_code, done.output) == (0, "net: nothing found\n")


SLIPS = """
import torch, flowlik
from field import Field

class Slip(Field):
    def velocity(self, x, t, *, cond=None):
        CODE

x = 2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + 1
TASK = flowlik.ArrayTask(id="ID", train=x[:300], test=x[300:], models={"net": Slip, "right": Field})
"""

CODES = {
    "sign": ("return -super().velocity(x, t)", "the sign"),
    "factor": ("return 0.5 * super().velocity(x, t)", "factor"),
    "steps": ("return super().velocity(x, (100 * t).round() / 100)", "rounded inside the network"),
    "label": ("return super().velocity(x, t) + torch.nn.functional.one_hot(cond)", "give labels"),
    "graph": ("return super().velocity(x, t).detach()", "no_grad"),
}


@pytest.mark.parametrize("slip", CODES)
def test_check_prints_slips_with_their_numbers_and_nothing_of_a_right_model(
    tmp_path: Path, slip: str
) -> None:
    code, likely = CODES[slip]
    file = str(write_task(tmp_path / "user", f"cli-check-{slip}", SLIPS.replace("CODE", code)))
    done = flowlik_("check", file)
    assert done.exit_code == 1, done.output
    *found, right = done.output.splitlines()
    assert right == "right: nothing found"
    assert re.search(likely, "\n".join(found)), done.output
    assert all(re.match(r"net: .*\d.*; likely ", line) for line in found), done.output


def test_check_sees_data_in_the_unit_interval(tmp_path: Path) -> None:
    text = TASK.replace("x = 2", "x = torch.randint(0, 17, (400, 2)) / 16\ny = 2")
    done = flowlik_("check", str(write_task(tmp_path / "user", "cli-check-unit", text)))
    assert done.exit_code == 1
    assert "x takes 17 values only, from 0 to 1" in done.output
    assert "levels=" in done.output
