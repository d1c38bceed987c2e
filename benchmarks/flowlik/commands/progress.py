"""A run on the terminal: a live table with the time left, or one plain line a cell."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from flowlik.running.run_folder import Outcome

SHOWN: Final = 8
"""Cells that the table holds, the last ones."""


def with_progress(
    outcomes: Iterator[Outcome], total: int, console: Console | None = None
) -> Iterator[Outcome]:
    """Pass the outcomes on, with a live table on a terminal and one plain line each otherwise."""
    from rich.console import Console

    console = console or Console()
    if not console.is_terminal:
        for number, outcome in enumerate(outcomes, start=1):
            typer.echo(f"[{number:>{len(str(total))}}/{total}] {one_line(outcome)}")
            yield outcome
        return
    from rich.console import Group
    from rich.live import Live
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    progress = Progress(*columns, console=console)
    bar = progress.add_task("", total=total)
    last: deque[Outcome] = deque(maxlen=SHOWN)
    measured = 0
    with Live(progress, console=console) as live:
        for number, outcome in enumerate(outcomes, start=1):
            measured += outcome.row is not None
            if outcome.row is None or outcome.row["status"] != "ok":
                live.console.print(escape(one_line(outcome)), soft_wrap=True)
            else:
                last.append(outcome)
            left = time_left(progress.tasks[0].elapsed or 0.0, measured, total - number)
            progress.update(bar, advance=1, description=left)
            live.update(Group(table_of(last), progress))
            yield outcome


def time_left(elapsed: float, measured: int, waiting: int) -> str:
    """How long the cells that wait will take, if they take as long as those that were measured.

    >>> time_left(60.0, 10, 20)
    '2 min left'
    """
    if not measured or not waiting:
        return ""
    left = elapsed / measured * waiting
    if left < 90:
        return f"{left:.0f} s left"
    return f"{left / 60:.0f} min left" if left < 5400 else f"{left / 3600:.1f} h left"


def table_of(outcomes: Iterable[Outcome]) -> Table:
    """Cells with their error and cost."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("task", "model", "method"):
        table.add_column(name, overflow="fold")
    for name in ("|error|", "NFE", "s"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in outcomes:
        row = outcome.row or {}
        names = (row.get("task"), row.get("model"), row.get("estimator_label"))
        numbers = (_number(row.get("bpd_mae_all")), _number(row.get("nfe_mean")), f"{outcome.seconds:.1f}")
        table.add_row(*(escape(str(name or "")) for name in names), *numbers)
    return table


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.4g}"


def one_line(outcome: Outcome) -> str:
    """What became of a cell, in one line."""
    row = outcome.row
    if row is None:
        return f"done before {outcome.cell.title}"
    head = f"{row['status']:<8} {outcome.cell.title}"
    if row["status"] != "ok":
        return f"{head}: {row['reason']}"
    notes = (
        [f"batch {row['extra']['batch_size_used']}: out of memory"]
        if "batch_size_used" in row["extra"]
        else []
    )
    notes += ["tried again: a worker was lost"] if "workers_lost" in row["extra"] else []
    shown = (
        ("bpd", "bpd"),
        ("bpd_mae_all", "|error|"),
        ("nfe_mean", "nfe"),
        ("mass", "mass"),
        ("frechet", "frechet"),
    )
    values = [f"{label} {row[name]:.4g}" for name, label in shown if row.get(name) is not None]
    return "  ".join([head, *values, f"{outcome.seconds:.1f}s", *notes])
