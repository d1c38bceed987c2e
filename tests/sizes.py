"""How large the long tests are: short for `make test`, in full where `make verify` sets FLOWLIK_FULL=1."""

from __future__ import annotations

import os
import sys

FULL = os.environ.get("FLOWLIK_FULL") == "1"


def size(short: int, full: int) -> int:
    return full if FULL else short


def figure(name: str, value: object, goal: str = "") -> None:
    """One measured figure on the error stream, past pytest's capture in a full run."""
    stream = sys.__stderr__ if FULL else sys.stderr
    assert stream is not None
    print(f"\nfigure  {name}: {value}{f'  (goal {goal})' if goal else ''}", file=stream, flush=True)
