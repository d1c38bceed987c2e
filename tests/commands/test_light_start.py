"""What starts quickly starts without the heavy libraries: counted by what is loaded, not by the clock."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence

import pytest

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


def heavy_after(program: str) -> list[str]:
    """Which of the heavy libraries a fresh interpreter has loaded after a program."""
    told = f"{program}\nimport json, sys\nprint(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
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


def test_a_worker_that_is_ready_has_torch_and_nothing_that_draws() -> None:
    loaded = heavy_after("import flowlik.running.workers.worker")
    assert "torch" in loaded
    assert not {"pandas", "matplotlib", "torchmetrics", "sklearn"} & set(loaded)
