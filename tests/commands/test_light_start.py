"""What starts quickly starts without the heavy libraries: counted by what is loaded, not by the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flowlik import read_records

HEAVY = ("torch", "pandas", "matplotlib", "scipy", "sklearn", "torchmetrics")
COMMAND = """
import sys
sys.argv = ["flowlik", *{words!r}]
from flowlik.cli import main
from flowlik.commands import listing
listing.FRESH_SECONDS = float("inf")  # where a source file was just edited the registries would be asked
try:
    main()
except SystemExit:
    pass
"""


def heavy_after(program: str, names: Sequence[str] = HEAVY) -> list[str]:
    """Which of these libraries a fresh interpreter has loaded after a program."""
    told = f"{program}\nimport json, sys\nprint(json.dumps([n for n in {list(names)!r} if n in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    "words", [(), ("--help",), ("run", "--help"), ("list",), ("list", "models", "--json")]
)
def test_a_command_that_only_says_something_loads_nothing_heavy(words: Sequence[str]) -> None:
    assert heavy_after(COMMAND.format(words=list(words))) == []


@pytest.mark.parametrize(
    "module", ["flowlik", "flowlik.cli", "flowlik.running.workers.main", "flowlik.running.serial"]
)
def test_a_package_a_worker_and_what_starts_it_load_nothing_heavy(module: str) -> None:
    assert heavy_after(f"import {module}") == []


def test_a_worker_that_is_ready_has_torch_and_nothing_that_draws_or_trains() -> None:
    not_needed = ("pandas", "matplotlib", "torchmetrics", "sklearn", "flowlik_models.training")
    assert heavy_after("import flowlik.running.workers.worker", ("torch", *not_needed)) == ["torch"]


A_RUN = """
import sys
from flowlik.running.workers import process
process._interpreter = None  # a worker that were no copy of this process could not start
sys.argv = "flowlik run -t gmm-2d -m closed-form -e ode --limit 8 --no-report --out {out}".split()
from flowlik.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
A_CELL = """
from flowlik.planning.selection import plan_cells
from flowlik.running.run import run_cell
cell, *_ = plan_cells(None, ["ode"], ["gmm-2d"], ["closed-form"], seeds=None, limit=8, device="cpu")
row, _ = run_cell(cell)
assert row["status"] == "ok", row["reason"]
"""
# scipy itself is there: torchdiffeq loads its integrators
NOT_FOR_A_CELL = [
    "pandas",
    "matplotlib",
    "sklearn",
    "torchmetrics",
    "scipy.stats",
    "seaborn",
    "sympy",
    "jinja2",
]


def test_a_run_loads_torch_once_and_neither_it_nor_a_cell_what_they_do_not_use(tmp_path: Path) -> None:
    assert heavy_after(A_RUN.format(out=tmp_path / "out"), NOT_FOR_A_CELL) == []
    assert read_records(tmp_path / "out")["status"].tolist() == ["ok"] * 5
    assert heavy_after(A_CELL, NOT_FOR_A_CELL) == []
