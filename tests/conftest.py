"""What a run of the tests prints at its end: the figures that were measured."""

from __future__ import annotations

import pytest
from sizes import FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)
