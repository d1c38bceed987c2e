"""`flowlik run`: from a command line to records, figures, tables and report."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowlik.commands.options import (
    TRAINED,
    CheckpointsOption,
    DataOption,
    DeviceOption,
    InceptionOption,
    OutOption,
    bad_usage,
    fail,
    note,
    pick_device,
    use_checkpoints,
    use_data,
    use_inception,
    use_task_files,
)
from flowlik.commands.progress import with_progress
from flowlik.commands.units import parse_duration, parse_memory, parse_seeds

if TYPE_CHECKING:
    from flowlik.cells import Cell
    from flowlik.running.executor import Executor, Setup


SuiteArgument = Annotated[str | None, typer.Argument(help="Name of a suite or a TOML file.")]
EstimatorsOption = Annotated[
    list[str] | None,
    typer.Option("-e", "--estimator", help="Estimators instead of the suite's: 'f2d2[steps=1|2|4|8]'."),
]
TasksOption = Annotated[
    list[str] | None,
    typer.Option("-t", "--task", help="Only these tasks; a file, mine.py, is one of your own."),
]
ModelsOption = Annotated[list[str] | None, typer.Option("-m", "--model", help="Only these models.")]
SeedsOption = Annotated[str | None, typer.Option(help="Seeds of the estimators: 0-4 or 0,3,7.")]
LimitOption = Annotated[int | None, typer.Option(help="At most so many items (and samples) a cell.", min=1)]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Skip cells that DIR has already.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only list the cells.")]
ExecutorOption = Annotated[str, typer.Option(help="Where cells are run: serial or ray.")]
AddressOption = Annotated[
    str | None, typer.Option(help="Of a Ray cluster; without it one is made on this machine.")
]
CoresOption = Annotated[int | None, typer.Option(help="Processor cores a cell gets (Ray: 1).", min=1)]
TimeoutOption = Annotated[str | None, typer.Option(help="Longest a cell may take: 90s, 30m, 2h.")]
MemoryOption = Annotated[str | None, typer.Option(help="Most a cell's process may hold: 8G, 500M.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Compile the networks (torch.compile).")]
BatchSizeOption = Annotated[
    str | None, typer.Option(help="Items a batch instead of the suite's: a number, or auto.")
]
ReportOption = Annotated[bool, typer.Option(help="Draw figures, tables and report at the end.")]
TrainOption = Annotated[
    bool, typer.Option("--train", help="Train models of the suite that are not there, into --checkpoints.")
]


def run(
    suite: SuiteArgument = None,
    estimators: EstimatorsOption = None,
    tasks: TasksOption = None,
    models: ModelsOption = None,
    seeds: SeedsOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    out: OutOption = None,
    resume: ResumeOption = False,
    dry_run: DryRunOption = False,
    executor: ExecutorOption = "serial",
    address: AddressOption = None,
    cores: CoresOption = None,
    timeout: TimeoutOption = None,
    memory: MemoryOption = None,
    compile_: CompileOption = False,
    batch_size: BatchSizeOption = None,
    report: ReportOption = True,
    checkpoints: CheckpointsOption = None,
    train_first: TrainOption = False,
    data_dir: DataOption = None,
    inception: InceptionOption = None,
) -> None:
    """Run a suite (default: quick) and draw its figures, tables and report."""
    from flowlik.commands.interruption import interruptible

    with bad_usage(), interruptible() as stopped:
        from flowlik.running.registry import is_follower, make_executor

        setup, folder = set_up(out, resume, timeout, memory, cores)
        own = own_models(checkpoints, train_first)
        use_data(data_dir)
        use_inception(inception)
        use_task_files(tasks or (), folder)
        chosen_seeds = None if seeds is None else parse_seeds(seeds)
        where = make_executor(executor, setup, address)
        if is_follower():
            return follow(where, dry_run)
        try:
            if not dry_run:
                where.start()  # its libraries load while the cells are planned
            from flowlik.planning.selection import check_own, plan_cells, with_run_options

            chosen = pick_device(device)
            cells = plan_cells(
                suite, estimators, tasks, models, seeds=chosen_seeds, limit=limit, device=chosen, say=note
            )
            cells = with_run_options(cells, compile_, batch_size)
            if dry_run:
                typer.echo("\n".join([*(cell.title for cell in cells), f"{len(cells)} cells"]))
                return
            check_own(cells)
            if train_first and own is not None:
                train_missing(cells, own, chosen)
            stopped.folder = run_folder(folder, resume)
            failed = run_plan(cells, folder, suite or "quick", setup, where, resume=resume)
        finally:
            where.stop()
        if not report:
            typer.echo(f"records: {folder / 'records.jsonl'}")
        drawn = draw(folder) if report else True
    raise typer.Exit(1 if failed or not drawn else 0)


def set_up(
    out: Path | None, resume: bool, timeout: str | None, memory: str | None, cores: int | None
) -> tuple[Setup, Path]:
    """What every worker of a run is told, and the run's folder.

    Raises:
        ValueError: a run to go on with that has no name, or a duration or a size that is none.
    """
    from flowlik.commands.interruption import command_line
    from flowlik.records.journal import PARTIAL_RESULTS
    from flowlik.running.executor import Setup, new_run_id

    if resume and out is None:
        raise ValueError("--resume goes on with an earlier run: name its folder by --out")
    run_id = new_run_id()
    folder = out or Path("runs") / run_id
    setup = Setup(
        run_id=run_id,
        argv=command_line(),
        timeout=None if timeout is None else parse_duration(timeout),
        memory=None if memory is None else parse_memory(memory),
        cores=cores,
        partial_results=folder / PARTIAL_RESULTS,
    )
    return setup, folder


def follow(executor: Executor, dry_run: bool) -> None:
    """Compute this process's share of the first process's run, until that one is through."""
    if not dry_run:
        executor.start()


def own_models(checkpoints: Path | None, train_first: bool) -> Path | None:
    """The folder of the user's own models, which is looked in from now on and made where some are to be trained."""
    own = checkpoints or (TRAINED if train_first else None)
    if train_first and own is not None:
        own.mkdir(parents=True, exist_ok=True)
    use_checkpoints(own)
    return own


def train_missing(cells: Sequence[Cell], out: Path, device: str) -> None:
    """Train the models of the cells whose checkpoint is not there, each after those it builds on; exit 1 on failure."""
    from flowlik.training.train import train_model
    from flowlik_models.training.trainer import TrainingError
    from flowlik_models.zoo import missing_models

    pairs = dict.fromkeys((cell.task, cell.model) for cell in cells if not cell.is_control)
    for task, model in missing_models(pairs):
        try:
            train_model(task, model, out=out, device=device)
        except TrainingError as error:
            raise fail(f"{task} {model}: {error}", status=1) from None


def run_folder(folder: Path, resume: bool) -> Path:
    """The folder to write into; exit status 2 where it holds another run's records. A line on those of other code.

    Raises:
        StorageError: its file system has no locks.
    """
    from flowlik.records.claims import Claims
    from flowlik.records.origins import made_by_other_code

    if (folder / "records.jsonl").exists() and not resume:
        raise fail(f"{folder} holds records already: go on with --resume, or give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fail(f"{folder}: expected a folder that can be written ({error.strerror})") from None
    Claims(folder).close()  # before anything is written
    if resume and (other := made_by_other_code(folder)):
        note(other)
    return folder


def run_plan(
    cells: list[Cell], folder: Path, suite: str, setup: Setup, executor: Executor, *, resume: bool
) -> bool:
    """Run the cells with progress; True where one failed."""
    from flowlik.records.columns import FAILED
    from flowlik.records.environment import plain_argument
    from flowlik.records.journal import storage
    from flowlik.records.writing import utc_now
    from flowlik.running.run import run_cells
    from flowlik_models.files import write_atomically

    about: dict[str, Any] = {
        "run_id": setup.run_id,
        "suite": plain_argument(suite),
        "argv": setup.argv,
        "started": utc_now(),
        "finished": None,
    }

    def write_note() -> None:
        with storage(folder):
            write_atomically(folder / "run.json", json.dumps(about, indent=2).encode() + b"\n")

    write_note()
    counts: Counter[str] = Counter()
    outcomes = run_cells(cells, folder, resume=resume, executor=executor)
    for outcome in with_progress(outcomes, len(cells)):
        counts[outcome.row["status"] if outcome.row else "done before"] += 1
    about |= {"finished": utc_now(), "cells": dict(counts)}
    write_note()
    typer.echo(f"{len(cells)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return any(counts[status] for status in FAILED)


def draw(folder: Path) -> bool:
    """Figures, tables and report of a run, and its result in a few lines; False where one of the three failed (the
    records are safe)."""
    from flowlik.commands.outcome import result_lines
    from flowlik.report.figures.kinds import draw_all
    from flowlik.report.page.write import write_report
    from flowlik.report.tables.run import write_tables

    steps: tuple[tuple[str, Callable[[Path], Any]], ...] = (
        ("figures", draw_all),
        ("table", write_tables),
        ("report", write_report),
    )
    fine = True
    for name, step in steps:
        try:
            step(folder)
        except Exception as error:
            message = " ".join(str(error).split())
            typer.echo(f"flowlik: {name} failed: {type(error).__name__}: {message}", err=True)
            fine = False
    try:
        for line in result_lines(folder):
            typer.echo(line)
    except Exception as error:  # the records are safe, and what they say is not
        typer.echo(f"flowlik: no summary: {type(error).__name__}: {' '.join(str(error).split())}", err=True)
    report = folder / "report.html"
    typer.echo(f"report: {report}" if report.exists() else f"records: {folder / 'records.jsonl'}")
    return fine
