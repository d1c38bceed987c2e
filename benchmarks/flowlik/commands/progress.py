"""A run on the terminal: a bar, or one plain line a cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from flowlik.running.run_folder import Outcome


def with_progress(outcomes: Iterator[Outcome], total: int) -> Iterator[Outcome]:
    """Pass the outcomes on, with a bar on a terminal and one plain line each otherwise."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        for number, outcome in enumerate(outcomes, start=1):
            typer.echo(f"[{number:>{len(str(total))}}/{total}] {one_line(outcome)}")
            yield outcome
        return
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=total)
        for outcome in outcomes:
            if outcome.row is None or outcome.row["status"] != "ok":
                progress.console.print(escape(one_line(outcome)), soft_wrap=True)
            progress.update(bar, advance=1, description=escape(outcome.cell.title))
            yield outcome


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
