"""The command line `flowlik`.

Exit status: 0 all is well (cells ok, or skipped with a reason), 1 a cell or a gate failed, 2 bad usage or bad data (one
line says what, and what would be right). Live progress on a terminal, plain lines otherwise.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from flowlik.cells import Cell
    from flowlik.contract import ContractVerdict
    from flowlik.executors import Executor, Setup
    from flowlik.gates import Gate, Verdict
    from flowlik.runner import Outcome

app = typer.Typer(
    name="flowlik",
    help="How fast and how wrong are likelihood estimators of flow-based generative models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
INTERRUPTED = 130
LISTS = ("estimators", "tasks", "models", "suites")
TRAINED = Path("runs/train")
FORMATS = ("md", "latex", "csv")

OutOption = Annotated[Path | None, typer.Option("--out", help="Folder to write into.")]
ShipOption = Annotated[bool, typer.Option("--ship", help="Copy the result into the source tree.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
CheckpointsOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Folder of models of your own, such as runs/train; they come before the shipped ones.",
    ),
]
DataOption = Annotated[
    Path | None, typer.Option("--data-dir", envvar="FLOWLIK_DATA", help="Folder of the image data sets.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a run.")]


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # who stops a program does not wait for its libraries to be put away
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise


def fail(message: str, status: int = 2) -> typer.Exit:
    """Print one line to the error stream; the caller raises what comes back."""
    typer.echo(f"flowlik: {message}", err=True)
    return typer.Exit(status)


@contextmanager
def bad_usage() -> Iterator[None]:
    """Turn what is wrong with the input into one line and exit status 2; with the disk, 1."""
    from flowlik.executors import WorkerStartError
    from flowlik.journal import StorageError

    try:
        yield
    except (StorageError, WorkerStartError) as error:
        raise fail(str(error), 1) from None
    except (ValueError, FileNotFoundError) as error:
        raise fail(" ".join(str(error).split())) from None


def use_checkpoints(folder: Path | None) -> None:
    """Look for models in this folder first, in this process and in those it starts; ValueError where it is none."""
    if folder is None:
        return
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such folder of checkpoints; `flowlik train TASK MODEL --out {folder}` makes it"
        )
    os.environ["FLOWLIK_CHECKPOINTS"] = str(folder.resolve())


def use_data(folder: Path | None) -> None:
    """Look for image files in this folder, in this process and in those it starts; ValueError where it is none."""
    if folder is None:
        return
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: no such data folder; `flowlik data get NAME --data-dir {folder}` makes it"
        )
    os.environ["FLOWLIK_DATA"] = str(folder.expanduser().resolve())


def train_missing(cells: Sequence[Cell], out: Path, device: str) -> None:
    """Train the models of the cells whose checkpoint is not there, each after those it builds on; exit 1 on failure."""
    from flowlik.training import train_model
    from flowlik_models.training import TrainingError
    from flowlik_models.zoo import missing_models

    pairs = dict.fromkeys((cell.task, cell.model) for cell in cells if not cell.is_control)
    for task, model in missing_models(pairs):
        try:
            train_model(task, model, out=out, device=device)
        except TrainingError as error:
            raise fail(f"{task} {model}: {error}", status=1) from None


# --- flowlik run --------------------------------------------------------------------------------------------


@app.command()
def run(
    suite: Annotated[str | None, typer.Argument(help="Name of a suite or a TOML file.")] = None,
    estimators: Annotated[
        list[str] | None,
        typer.Option("-e", "--estimator", help="Estimators instead of the suite's: 'f2d2[steps=1|2|4|8]'."),
    ] = None,
    tasks: Annotated[list[str] | None, typer.Option("-t", "--task", help="Only these tasks.")] = None,
    models: Annotated[list[str] | None, typer.Option("-m", "--model", help="Only these models.")] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds of the estimators: 0-4 or 0,3,7.")] = None,
    limit: Annotated[
        int | None, typer.Option(help="At most so many items (and samples) a cell.", min=1)
    ] = None,
    device: DeviceOption = "auto",
    out: OutOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip cells that DIR has already.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the cells.")] = False,
    executor: Annotated[str, typer.Option(help="Where cells are run: serial or ray.")] = "serial",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; without it one is made on this machine.")
    ] = None,
    cores: Annotated[int | None, typer.Option(help="Processor cores a cell gets (Ray: 1).", min=1)] = None,
    timeout: Annotated[str | None, typer.Option(help="Longest a cell may take: 90s, 30m, 2h.")] = None,
    memory: Annotated[str | None, typer.Option(help="Most a cell's process may hold: 8G, 500M.")] = None,
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the networks (torch.compile).")
    ] = False,
    batch_size: Annotated[
        str | None, typer.Option(help="Items a batch instead of the suite's: a number, or auto.")
    ] = None,
    report: Annotated[bool, typer.Option(help="Draw figures, tables and report at the end.")] = True,
    checkpoints: CheckpointsOption = None,
    train_first: Annotated[
        bool,
        typer.Option("--train", help="Train models of the suite that are not there, into --checkpoints."),
    ] = False,
    data_dir: DataOption = None,
) -> None:
    """Run a suite (default: quick) and draw its figures, tables and report."""
    from flowlik.launch import command_line, interruptible, parse_memory

    with bad_usage(), interruptible() as stopped:
        from flowlik.executors import Setup, is_follower, make_executor, new_run_id

        own = checkpoints or (TRAINED if train_first else None)
        if train_first and own is not None:
            own.mkdir(parents=True, exist_ok=True)
        use_checkpoints(own)
        use_data(data_dir)

        chosen_seeds = None if seeds is None else parse_seeds(seeds)
        setup = Setup(
            run_id=new_run_id(),
            argv=command_line(),
            timeout=None if timeout is None else parse_duration(timeout),
            memory=None if memory is None else parse_memory(memory),
            cores=cores,
        )
        where = make_executor(executor, setup, address)
        if is_follower():
            if not dry_run:
                where.start()
            return
        try:
            if not dry_run:
                where.start()  # its libraries load while the cells are planned
            cells = plan_cells(
                suite, estimators, tasks, models, seeds=chosen_seeds, limit=limit, device=pick_device(device)
            )
            cells = with_run_options(cells, compile_, batch_size)
            if dry_run:
                for cell in cells:
                    typer.echo(cell.title)
                typer.echo(f"{len(cells)} cells")
                return
            if train_first and own is not None:
                train_missing(cells, own, pick_device(device))
            stopped.folder = folder = run_folder(out or Path("runs") / setup.run_id, resume)
            failed = run_plan(cells, folder, suite or "quick", setup, where, resume=resume)
        finally:
            where.stop()
        drawn = draw(folder) if report else True
    raise typer.Exit(1 if failed or not drawn else 0)


def plan_cells(
    suite: str | None,
    specs: Sequence[str] | None,
    tasks: Sequence[str] | None,
    models: Sequence[str] | None,
    *,
    seeds: tuple[int, ...] | None,
    limit: int | None,
    device: str,
) -> list[Cell]:
    """The cells of a command line.

    Without estimators: those of the suite, of the given tasks and models. With estimators: these, on the given tasks
    (default: the suite's) and models (default: all of a task that they support).

    Raises:
        ValueError: an unknown name, or nothing left to run.
    """
    from flowlik import suites
    from flowlik.cells import Options
    from flowlik.tasks import get_task

    for name in tasks or ():
        get_task(name)
    overrides = {"seeds": seeds} if seeds else {}
    cells = suites.load_suite(suite or "quick", device=device, overrides=dict(overrides))
    if specs:
        base = suites.options_of(suites.read_suite(suite or "quick").get("defaults", {}), Options())
        names = list(tasks or dict.fromkeys(cell.task for cell in cells))
        cells = suites.expand(names, models, specs, base, seeds=seeds, device=device)
        cells = cells if models else supported(cells)
        cells = suites.unique([*cells, *suites.control_cells(cells)])
    else:
        if tasks:
            cells = [cell for cell in cells if cell.task in tasks]
        if models:
            check_models(models, sorted({cell.task for cell in cells}))
            cells = [cell for cell in cells if cell.model in models or cell.is_control]
    if not [cell for cell in cells if specs or not cell.is_control]:
        raise ValueError(_nothing_left(suite, tasks))
    if limit:
        cells = suites.unique([limited(cell, limit) for cell in cells])
    return cells


def _nothing_left(suite: str | None, tasks: Sequence[str] | None) -> str:
    from flowlik.tasks import get_task

    if without := [name for name in tasks or () if not get_task(name).models]:
        return f"no model of {', '.join(without)} is there yet; control rows run without: -e control-gaussian"
    return f"suite {suite or 'quick'!r} has no cell for these tasks and models; name estimators with -e"


def check_models(models: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise ValueError where a name is a model of none of these tasks."""
    from flowlik.tasks import get_task
    from flowlik.words import unknown

    valid = tuple(dict.fromkeys(model for name in tasks for model in get_task(name).models))
    for model in models:
        if model not in valid:
            raise ValueError(unknown("model", model, valid))


def limited(cell: Cell, limit: int) -> Cell:
    """The cell on at most `limit` items and samples."""
    options = cell.options
    return cell.with_options(n_items=min(options.n_items, limit), samples=min(options.samples, limit))


def supported(cells: Sequence[Cell]) -> list[Cell]:
    """Leave out pairs of model and estimator that do not fit, unless an estimator would be left with nothing."""
    from flowlik.runner import load
    from flowlik.tasks import UnavailableError

    def fits(cell: Cell) -> bool:
        try:
            model, _ = load(cell.task, cell.model, cell.device, cell.options.dtype)
        except UnavailableError:
            return False  # not trained: one of many that could be
        except Exception:
            return True  # the run says what is wrong with the model
        return cell.estimator.supports(model) is None

    kept = [cell for cell in cells if cell.is_control or fits(cell)]
    served = {(cell.task, cell.label) for cell in kept}
    return [cell for cell in cells if cell in kept or (cell.task, cell.label) not in served]


def run_folder(folder: Path, resume: bool) -> Path:
    """The folder to write into; exit status 2 where it holds another run's records."""
    if (folder / "records.jsonl").exists() and not resume:
        raise fail(f"{folder} holds records already: go on with --resume, or give another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise fail(f"{folder}: expected a folder that can be written ({error.strerror})") from None
    return folder


def run_plan(
    cells: list[Cell], folder: Path, suite: str, setup: Setup, executor: Executor, *, resume: bool
) -> bool:
    """Run the cells with progress; True where one failed."""
    from flowlik.environment import plain_argument
    from flowlik.journal import storage
    from flowlik.records import FAILED, utc_now
    from flowlik.runner import run_cells
    from flowlik_models.files import write_atomically

    note: dict[str, Any] = {
        "run_id": setup.run_id,
        "suite": plain_argument(suite),
        "argv": setup.argv,
        "started": utc_now(),
        "finished": None,
    }

    def write_note() -> None:
        with storage(folder):
            write_atomically(folder / "run.json", json.dumps(note, indent=2).encode() + b"\n")

    write_note()
    counts: Counter[str] = Counter()
    outcomes = run_cells(cells, folder, resume=resume, executor=executor)
    for outcome in with_progress(outcomes, len(cells)):
        counts[outcome.row["status"] if outcome.row else "done before"] += 1
    note |= {"finished": utc_now(), "cells": dict(counts)}
    write_note()
    typer.echo(f"{len(cells)} cells: " + ", ".join(f"{count} {status}" for status, count in counts.items()))
    return any(counts[status] for status in FAILED)


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
    told = (
        [f"batch {row['extra']['batch_size_used']}: out of memory"]
        if "batch_size_used" in row["extra"]
        else []
    )
    told += ["tried again: a worker was lost"] if "workers_lost" in row["extra"] else []
    shown = (
        ("bpd", "bpd"),
        ("bpd_mae", "|error|"),
        ("nfe_mean", "nfe"),
        ("mass", "mass"),
        ("frechet", "frechet"),
    )
    values = [f"{label} {row[name]:.4g}" for name, label in shown if row[name] is not None]
    return "  ".join([head, *values, f"{outcome.seconds:.1f}s", *told])


def draw(folder: Path) -> bool:
    """Figures, tables and report of a run; False where one of them failed (the records are safe)."""
    from flowlik.figures import draw_all
    from flowlik.report import write_report
    from flowlik.table import write_tables

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
    report = folder / "report.html"
    typer.echo(f"report: {report}" if report.exists() else f"records: {folder / 'records.jsonl'}")
    return fine


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,3,7` or both mixed, as seeds.

    Raises:
        ValueError: anything else.
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds {text!r}: expected seeds such as 0-4 or 0,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(seeds))


def with_run_options(cells: list[Cell], compile_: bool, batch_size: str | None) -> list[Cell]:
    """The cells with the options that a run may overrule; controls have no network and no batches.

    Raises:
        ValueError: a batch size that is neither a number above 0 nor auto.
    """
    from flowlik.memory import AUTO

    changes: dict[str, Any] = {"compile": True} if compile_ else {}
    if batch_size is not None:
        if batch_size != AUTO and not (batch_size.isdecimal() and int(batch_size) > 0):
            raise ValueError(f"--batch-size {batch_size!r}: expected a number above 0, or {AUTO}")
        changes["batch_size"] = AUTO if batch_size == AUTO else int(batch_size)
    return [cell if cell.is_control else cell.with_options(**changes) for cell in cells]


def parse_duration(text: str) -> float:
    """`90`, `90s`, `30m` or `2h` in seconds.

    Raises:
        ValueError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--timeout {text!r}: expected a duration such as 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def pick_device(name: str) -> str:
    """The device to use; `auto` is the first GPU where there is one.

    Raises:
        ValueError: no such device here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if gpus else "cpu"
    valid = ("cpu", *(("cuda",) if gpus else ()), *(f"cuda:{index}" for index in range(gpus)))
    if name not in valid:
        raise ValueError(f"device {name!r} is not here (valid: auto, {', '.join(valid)})")
    return name


# --- flowlik list, train, ... -------------------------------------------------------------------------------


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(metavar="[estimators|tasks|models|suites]")] = None,
    as_json: JsonOption = False,
) -> None:
    """List what there is: estimators, tasks, models and suites."""
    from flowlik.listing import listed
    from flowlik.words import unknown

    with bad_usage():
        if kind is not None and kind not in LISTS:
            raise ValueError(unknown("list", kind, LISTS))
        found = {name: listed(name) for name in (LISTS if kind is None else (kind,))}
    if as_json:
        typer.echo(json.dumps(found if kind is None else found[kind], indent=2))
        return
    for name, entries in found.items():
        if kind is None:
            typer.echo(f"{name}:")
        for entry, text in entries.items():
            typer.echo(f"{'' if kind else '  '}{entry:<20} {text}".rstrip())


@app.command()
def train(
    task: str,
    model: str,
    out: OutOption = None,
    ship: ShipOption = False,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    steps: Annotated[int | None, typer.Option(help="Number of steps instead of the recipe's.", min=1)] = None,
    resume: Annotated[bool, typer.Option(help="Go on from an interrupted training.")] = True,
    data_dir: DataOption = None,
) -> None:
    """Train a model from nothing, or go on where an interrupted training stopped."""
    from flowlik.training import train_model
    from flowlik_models.training import TrainingError

    with bad_usage():
        use_data(data_dir)
        chosen = pick_device(device)
        folder = out or TRAINED
        options: dict[str, Any] = {"seed": seed, "steps": steps, "resume": resume, "ship": ship}
        try:
            path = train_model(task, model, out=folder, device=chosen, **options)
        except TrainingError as error:
            raise fail(str(error), 1) from None
    typer.echo(f"checkpoint: {path}")


@app.command()
def reference(
    task: str,
    out: OutOption = None,
    ship: ShipOption = False,
    device: DeviceOption = "auto",
    limit: Annotated[int | None, typer.Option(help="Items a split (default 256).", min=2)] = None,
    data_dir: DataOption = None,
) -> None:
    """Compute the task's converged likelihoods and the checks they passed."""
    from flowlik.references import make_reference, ship_reference
    from flowlik.tasks import UnavailableError, get_task

    with bad_usage():
        use_data(data_dir)
        chosen = pick_device(device)
        get_task(task)
    folder = out or Path("runs") / "references"
    try:
        path = make_reference(task, folder, device=chosen, limit=limit, progress=typer.echo)
        if ship:
            path = ship_reference(task, folder)
    except UnavailableError as error:
        raise fail(str(error)) from None
    except ValueError as error:
        raise fail(" ".join(str(error).split()), 1) from None
    typer.echo(f"reference: {path}")


@app.command()
def figures(folder: RunFolder) -> None:
    """Draw a run's figures again."""
    with bad_usage():
        _need_records(folder)
    from flowlik.figures import draw_all

    for path in draw_all(folder):
        typer.echo(str(path))


@app.command()
def table(
    folder: RunFolder,
    format_: Annotated[str, typer.Option("--format", help="md, latex or csv.")] = "md",
) -> None:
    """Print a run's table."""
    from flowlik.words import unknown

    with bad_usage():
        if format_ not in FORMATS:
            raise ValueError(unknown("format", format_, FORMATS))
        _need_records(folder)
    from flowlik.records import read_records
    from flowlik.table import render

    typer.echo(render(read_records(folder), format_))


@app.command()
def report(folder: RunFolder) -> None:
    """Write a run's report.html again."""
    with bad_usage():
        _need_records(folder)
    from flowlik.report import write_report

    typer.echo(str(write_report(folder)))


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE")], new: Annotated[Path, typer.Argument(metavar="NEW")]
) -> None:
    """Compare two runs cell by cell."""
    with bad_usage():
        _need_records(base)
        _need_records(new)
    from flowlik.compare import compare_runs, summary

    frame = compare_runs(base, new)
    typer.echo(summary(frame) if len(frame) else "no cell in common")


@app.command()
def reproduce(
    cell_id: Annotated[str, typer.Argument(metavar="CELL_ID", help="Id of a cell, or how it begins.")],
    folder: Annotated[
        Path | None, typer.Option("--in", help="Folder of the run; default: all below runs/.")
    ] = None,
    checkpoints: CheckpointsOption = None,
) -> None:
    """Run the cell of a record again and say whether its numbers come again."""
    with bad_usage():
        use_checkpoints(checkpoints)
        from flowlik import provenance

        folders = provenance.run_folders(Path("runs")) if folder is None else [folder]
        found = provenance.find(cell_id, folders)
        typer.echo(provenance.told(found))
        done = provenance.reproduce(found)
    for line in done.lines:
        typer.echo(line)
    words = {"identical": "reproduced, bit for bit", "rounding": "reproduced, up to rounding"}
    typer.echo(words.get(done.verdict, "NOT reproduced"))
    raise typer.Exit(0 if done.succeeded else 1)


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for all of them.")],
) -> None:
    """Join runs of several machines; runs that differ in a model or in data are refused."""
    with bad_usage():
        from flowlik.merge import merge_runs

        merged = merge_runs(folders, out)
    typer.echo(f"{merged.cells} cells in {merged.folder} ({merged.common} of them in several runs)")


def _need_records(folder: Path) -> None:
    from flowlik.records import records_file

    records_file(folder)


@app.command()
def check(
    plugins: Annotated[
        bool, typer.Option("--plugins", help="Contract tests on every estimator instead.")
    ] = False,
    update: Annotated[
        bool, typer.Option("--update", help="Note the measured values in the baselines.")
    ] = False,
    only: Annotated[str | None, typer.Option("--only", help="Only gates whose id contains this.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Run the accuracy and NFE gates of results/baselines, or the contract tests."""
    with bad_usage():
        chosen = pick_device(device)
        wanted = None if plugins else _gates(only)
    failed = count = 0
    for verdict in _contract_verdicts() if wanted is None else _gate_verdicts(wanted, chosen, update):
        typer.echo(verdict.line())
        count, failed = count + 1, failed + (not verdict.passed)
    typer.echo(f"{count} checks: {count - failed} passed, {failed} failed")
    raise typer.Exit(1 if failed else 0)


def _gates(only: str | None) -> list[Gate]:
    from flowlik.gates import load_gates

    return load_gates(only=only)


def _contract_verdicts() -> Iterator[ContractVerdict]:
    from flowlik.contract import contract_verdicts

    return contract_verdicts()


def _gate_verdicts(wanted: list[Gate], device: str, update: bool) -> Iterator[Verdict]:
    from flowlik.gates import note_measured, run_gates

    verdicts = []
    for verdict in run_gates(wanted, device=device):
        verdicts.append(verdict)
        yield verdict
    if update:
        note_measured(verdicts)


@app.command()
def data(
    action: Annotated[str | None, typer.Argument(metavar="[get]", help="get: fetch NAME.")] = None,
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A data set of images.")] = None,
    data_dir: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which data is where and whether it is as published, or get a data set from its official address."""
    from flowlik import data_command
    from flowlik.tasks import unknown

    with bad_usage():
        if action not in (None, "get"):
            raise ValueError(unknown("action", str(action), ("get",)))
        if action == "get" and name is None:
            raise ValueError("flowlik data get needs a name: flowlik data lists them")
        if name is not None:
            data_command.check_get(name, data_dir)
    if name is not None and data_dir is not None:
        try:
            folder = data_command.get(name, data_dir)
        except ValueError as error:
            raise fail(" ".join(str(error).split()), 1) from None
        except KeyboardInterrupt:
            raise fail(f"interrupted; the same command goes on: flowlik data get {name}", 130) from None
        typer.echo(f"{name}: {folder}")
        return
    found = data_command.listing(data_dir)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    data_command.print_listing(found, data_dir)


@app.command()
def sysinfo(as_json: JsonOption = False) -> None:
    """Print the environment that records would name."""
    from flowlik.environment import describe

    row = {name: value for name, value in describe().items() if name not in ("argv", "env_id")}
    if as_json:
        typer.echo(json.dumps(row, indent=2))
        return
    for name, value in row.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        typer.echo(f"{name:<18} {text}")


if __name__ == "__main__":
    main()
