"""Workers find what is installed and what lies beside a task's file, not what lies where the command was typed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from own_files import write_task

import flowlik
from flowlik.running.workers.module_path import module_path


def test_a_file_beside_the_run_that_bears_a_modules_name_stops_no_worker(tmp_path: Path) -> None:
    file = write_task(tmp_path / "user", "path-mine")
    for folder in (tmp_path, tmp_path / "user"):
        (folder / "random.py").write_text("raise SystemExit('of the wrong folder')")
    words = (
        f"-P -m flowlik run -t {file} -e ode --limit 8 --out out --no-report"  # -P: as the installed command
    )
    done = subprocess.run(
        [sys.executable, *words.split()], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    records = flowlik.read_records(tmp_path / "out").set_index("estimator")
    assert records.loc["ode", "status"] == "ok"


def path_here(monkeypatch: pytest.MonkeyPatch, program: str | None, *entries: str) -> list[str]:
    spec = None if program is None else SimpleNamespace(name=program)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "path", list(entries))
    return module_path().split(":")


def test_the_working_directory_is_left_out_or_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    here, task = str(tmp_path), str(tmp_path / "task")
    command = "flowlik.__main__"
    assert path_here(monkeypatch, command, here, "/lib", task) == ["/lib", task]
    assert path_here(monkeypatch, None, "/bin", "/lib", "", task) == ["/bin", "/lib", task]
    assert path_here(monkeypatch, command, here, "/lib", here) == ["/lib", here]  # a task's file lies in it
    assert path_here(monkeypatch, None, here, "/lib") == ["/lib", here]  # a program that lies in it
    assert path_here(monkeypatch, "pytest.__main__", here, "/lib", "/lib") == ["/lib", here]
