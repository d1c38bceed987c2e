"""`flowlik figures`, `table`, `report`, `compare`, `reproduce`, `merge`, `gallery`: what is done with runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from flowlik.commands.options import CheckpointsOption, RunFolder, bad_usage, fail, use_checkpoints

MethodsOption = Annotated[
    str | None, typer.Option(help="Only these, by estimator or method: f2d2,ode-euler. Controls stay.")
]
TasksOption = Annotated[str | None, typer.Option(help="Only these: gmm-64d,digits.")]


def names(given: str | None) -> list[str]:
    """What stands between the commas of an option."""
    return [name.strip() for name in (given or "").split(",") if name.strip()]


def figures(
    folder: RunFolder,
    methods: Annotated[
        str | None, typer.Option(help="Only these, by estimator or method: f2d2,ode-euler; no controls.")
    ] = None,
    tasks: TasksOption = None,
    measure: Annotated[str | None, typer.Option(help="error, bias, bpd, spearman, mass or frechet.")] = None,
    cost: Annotated[str | None, typer.Option(help="nfe, work, forwards or ms.")] = None,
    width: Annotated[str | None, typer.Option(help="single, double or millimetres: 85mm.")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="Of png,pdf,svg. Default: pdf.")] = None,
    font_size: Annotated[float | None, typer.Option(help="Points. Default: 8.")] = None,
    legend: Annotated[str | None, typer.Option(help="below, right or none.")] = None,
) -> None:
    """Draw a run's figures again; with any option one figure of your own, a measure against a cost."""
    with _writing(folder):
        chosen = {"measure": measure, "cost": cost, "width": width, "font_size": font_size, "legend": legend}
        given = {name: value for name, value in chosen.items() if value is not None}
        lists = {"methods": names(methods), "tasks": names(tasks)}
        if given or format_ or any(lists.values()):
            from flowlik.report.figures.own import write_own

            paths = write_own(folder, names(format_) or ["pdf"], **given, **lists)
        else:
            from flowlik.report.figures.kinds import draw_all

            paths = draw_all(folder)
    for path in paths:
        typer.echo(str(path))


def table(
    folder: RunFolder,
    format_: Annotated[str, typer.Option("--format", help="md, latex or csv.")] = "md",
    width: Annotated[
        str | None, typer.Option(help="Of LaTeX: column (345 pt) or page (487 pt).", show_default="column")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(help="Of accuracy and cost, by name: nfe_mean,bpd_mae. Default: all; LaTeX: main."),
    ] = None,
    methods: MethodsOption = None,
    tasks: TasksOption = None,
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

        text = render(
            read_records(folder),
            format_,
            width=width,
            columns=names(columns),
            methods=names(methods),
            tasks=names(tasks),
        )
    typer.echo(text)


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
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of a run.")],
    new: Annotated[
        Path | None, typer.Argument(metavar="[NEW]", help="Folder of another; without it -e twice.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "-e", "--estimator", help="Two methods of BASE: 'f2d2[steps=4]', 'f2d2[steps=4]@MODEL'."
        ),
    ] = None,
) -> None:
    """Compare two runs cell by cell, or two methods of one run, over the items that both have."""
    with bad_usage():
        pair = methods or []
        if (new is None) != (len(pair) == 2) or (new is not None and pair):
            raise ValueError(
                "compare: expected a second run (BASE NEW), or two methods of one (BASE -e A -e B)"
            )
        for folder in filter(None, (base, new)):
            _need_records(folder)
        from flowlik.report.compare import compare_methods, compare_runs, summary

        frame = compare_methods(base, *pair) if new is None else compare_runs(base, new)
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
    typer.echo(reproduction.WORDS.get(done.verdict, "NOT reproduced"))
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
    out: Annotated[
        Path | None, typer.Option("--out", help="Write a results site of the runs into this folder instead.")
    ] = None,
    check: Annotated[
        int | None,
        typer.Option(
            "--check", help="Of the site: run so many records of each run again, and show which.", min=1
        ),
    ] = None,
    timings: Annotated[
        Path | None, typer.Option(help="Of the site: asv's pages, shown beside it: results/asv-html.")
    ] = None,
    checkpoints: CheckpointsOption = None,
) -> None:
    """Copy published figures from runs into the source tree and write docs/gallery.md; without a run the page.

    With --out a results site: methods x tasks as static pages, every number linked to its record.
    """
    with bad_usage():
        for folder in runs or []:
            _need_records(folder)
        if out is not None:
            use_checkpoints(checkpoints)
            return _site(runs or [], out, check or 0, timings)
        if check is not None or timings:
            option = "--timings" if timings else "--check"
            raise ValueError(f"{option} is for a results site: name its folder by --out")
        from flowlik.records.journal import storage
        from flowlik.report.gallery import PAGE, need_tree, publish

        tree = need_tree()
        with storage(tree):
            names = publish(runs or [], tree)
    for name in names:
        typer.echo(name)
    typer.echo(str(PAGE))


def _site(runs: list[Path], out: Path, check: int, timings: Path | None) -> None:
    """Write the site, after running some records of each run again; exit status 1 where one does not come again."""
    if not runs:
        raise ValueError("--out writes a site of runs: name their folders")
    from flowlik.checks.reproduce import checked
    from flowlik.report.page.site import INDEX, need_own_folder, need_timings, write_site

    need_own_folder(out)
    if timings:
        need_timings(timings)
    verdicts: dict[str, str] = {}
    failed = False
    for run in runs if check else ():
        for found in checked(run, check):
            typer.echo(found.line(run.name))
            failed |= not found.succeeded
            verdicts |= {found.cell_id: found.verdict} if found.succeeded else {}
    if failed:
        raise fail("a record does not come again, so no site was written", 1)
    merged = write_site(runs, out, verdicts, timings)
    typer.echo(f"{merged.cells} records: {out / INDEX}")


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Of a run's folder, which holds records: what the disk does not take is one line."""
    from flowlik.records.journal import storage

    with bad_usage():
        if folder.is_file():
            raise ValueError(f"{folder}: expected a run folder, into which to write, found a file")
        _need_records(folder)
        with storage(folder):
            yield


def _need_records(folder: Path) -> None:
    """Exit with status 2 where there are none that can be read; what killed commands left beside them is removed."""
    from flowlik.records.reading import records_file
    from flowlik_models.files import remove_leftovers

    file = records_file(folder)
    file.open("rb").close()  # an OSError names it
    remove_leftovers(file.parent)
