"""How large the long tests are: short for `make test`, in full where `make verify` sets FLOWLIK_FULL=1."""

from __future__ import annotations

import os

FULL = os.environ.get("FLOWLIK_FULL") == "1"
FIGURES: list[str] = []  # printed at the end of the run (conftest.py)


def size(short: int, full: int) -> int:
    return full if FULL else short


def figure(name: str, value: object, goal: str = "") -> None:
    """One measured figure for the end of the run."""
    FIGURES.append(f"figure  {name}: {value}{f'  (goal {goal})' if goal else ''}")
