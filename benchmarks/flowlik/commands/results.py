"""`flowlik figures`, `table`, `report`, `compare`, `reproduce`, `merge`, `gallery`: what is done with runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flowlik.commands.options import CheckpointsOption, RunFolder, bad_usage, use_checkpoints


def figures(folder: RunFolder) -> None:
    """Draw a run's figures again."""
    with _writing(folder):
        from flowlik.report.figures.kinds import draw_all

        paths = draw_all(folder)
    for path in paths:
        typer.echo(str(path))


def table(
    folder: RunFolder,
    format_: Annotated[str, typer.Option("--format", help="md, latex or csv.")] = "md",
) -> None:
    """Print a run's table."""
    with bad_usage():
        from flowlik.report.tables.formats import FORMATS
        from flowlik_models.names import unknown

        if format_ not in FORMATS:
            raise ValueError(unknown("format", format_, FORMATS))
        _need_records(folder)
    from flowlik.records.reading import read_records
    from flowlik.report.tables.run import render

    typer.echo(render(read_records(folder), format_))


def report(folder: RunFolder) -> None:
    """Write a run's report.html again."""
    with _writing(folder):
        from flowlik.report.page.write import write_report

        path = write_report(folder)
    typer.echo(str(path))


def recommend(
    task: Annotated[str, typer.Argument(metavar="TASK", help="A task, or a number of dimensions.")],
    nfe: Annotated[float | None, typer.Option(help="At most so many evaluations a sample.")] = None,
    work: Annotated[float | None, typer.Option(help="At most so many evaluations and products.")] = None,
    ms: Annotated[float | None, typer.Option(help="At most so many milliseconds a sample.")] = None,
    split: Annotated[str | None, typer.Option(help="Default: the held-out data.")] = None,
    folder: Annotated[
        Path | None, typer.Option("--in", help="Folder of a run; default: the records that come along.")
    ] = None,
) -> None:
    """Say which method to use for a task and a budget, and how wrong it is."""
    with bad_usage():
        given = {
            name: value for name, value in (("nfe", nfe), ("work", work), ("ms", ms)) if value is not None
        }
        if len(given) > 1:
            raise ValueError(f"one budget at a time, not {' and '.join('--' + name for name in given)}")
        from flowlik.report import recommend as advice

        frame = advice.load([] if folder is None else [folder])
        cost, budget = next(iter(given.items()), ("nfe", float("inf")))
        for name in advice.tasks_of(frame, task):
            found = advice.recommend(frame, name, budget, cost=cost, split=split)
            typer.echo("\n".join(found.lines()))


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE")], new: Annotated[Path, typer.Argument(metavar="NEW")]
) -> None:
    """Compare two runs cell by cell."""
    with bad_usage():
        _need_records(base)
        _need_records(new)
    from flowlik.report.compare import compare_runs, summary

    frame = compare_runs(base, new)
    typer.echo(summary(frame) if len(frame) else "no cell in common")


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
        from flowlik.checks import reproduce as reproduction

        folders = reproduction.run_folders(Path("runs")) if folder is None else [folder]
        found = reproduction.find(cell_id, folders)
        typer.echo(reproduction.described(found))
        done = reproduction.reproduce(found)
    for line in done.lines:
        typer.echo(line)
    words = {"identical": "reproduced, bit for bit", "rounding": "reproduced, up to rounding"}
    typer.echo(words.get(done.verdict, "NOT reproduced"))
    raise typer.Exit(0 if done.succeeded else 1)


def merge(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders of runs.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for all of them.")],
) -> None:
    """Join runs of several machines; runs that differ in a model or in data are refused."""
    with bad_usage():
        from flowlik.records.merging import merge_runs

        merged = merge_runs(folders, out)
    typer.echo(f"{merged.cells} cells in {merged.folder} ({merged.common} of them in several runs)")


def gallery(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="[RUN]...", help="Folders of finished runs.")
    ] = None,
) -> None:
    """Copy published figures from runs into the source tree and write docs/gallery.md; without a run the page."""
    with bad_usage():
        from flowlik.records.journal import storage
        from flowlik.report.gallery import PAGE, need_tree, publish

        for folder in runs or []:
            _need_records(folder)
        tree = need_tree()
        with storage(tree):
            names = publish(runs or [], tree)
    for name in names:
        typer.echo(name)
    typer.echo(str(PAGE))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Of a run's folder, which holds records: what the disk does not take is one line."""
    from flowlik.records.journal import storage

    with bad_usage():
        _need_records(folder)
        with storage(folder):
            yield


def _need_records(folder: Path) -> None:
    """Exit with status 2 where there are none; what killed commands left beside them is removed."""
    from flowlik.records.reading import records_file
    from flowlik_models.files import remove_leftovers

    remove_leftovers(records_file(folder).parent)
