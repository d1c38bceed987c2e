"""A results site: runs of several people as static pages, methods x tasks, every number linked to its record.

`index.html` has the best record of each method on each task, `<task>.html` every record with what made it and the
command that makes it again, `run/` the merged run itself with its report, `timings/` asv's pages over the commits
where they are given. Nothing is fetched from elsewhere, every text that stems from a record is escaped, and what the
site lacks it leaves out.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pandas as pd

from flowlik.records import journal
from flowlik.records.merging import Merged, merge_runs
from flowlik.records.writing import to_plain
from flowlik.report import frame as frames
from flowlik.report import labels, numbers
from flowlik.report.labels import as_dicts
from flowlik.report.page.write import page_template, write_report
from flowlik_models.files import alone_in, write_atomically

INDEX: Final = "index.html"
RUN: Final = "run"
TIMINGS: Final = "timings"
MARK: Final = "flowlik results site"
"""What the first page says of itself: a folder without it is not written over."""


@dataclass(frozen=True)
class Number:
    """A number of the first page: its text, the record that it is of, and whether that was run again."""

    text: str
    link: str
    checked: str


@dataclass(frozen=True)
class Entry:
    """A record as its page shows it: `title`, the main numbers, everything it says, and where it comes from."""

    anchor: str
    title: str
    main: tuple[tuple[str, str], ...]
    columns: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    source: str
    checked: str


def write_site(
    runs: Sequence[Path],
    out: Path,
    verdicts: Mapping[str, str] | None = None,
    timings: Path | None = None,
) -> Merged:
    """Write the site of these runs into the folder `out`; what was merged.

    `verdicts` says by cell id what came of running a record again. The folder is new, empty, or an earlier site.
    `timings`, the folder that `asv publish` wrote, is copied beside the records.

    Raises:
        FileNotFoundError: a folder holds no records.
        ValueError: the runs differ in a model, in data or in the records' schema, no record can be shown, `timings`
            holds no pages of asv, or `out` is an installed package or holds something else.
        StorageError: the disk is full.
    """
    need_own_folder(out)
    if timings:
        need_timings(timings)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / RUN
        merged = merge_runs(runs, folder)
        sources = {cell_id: run.resolve().name for cell_id, run in merged.taken_from.items()}
        pages = _pages(folder, sources, verdicts or {}, timings=bool(timings))
        write_report(folder)
        with journal.storage(out), alone_in(out):
            for old in (*out.glob("*.html"), out / RUN, out / TIMINGS):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            shutil.copytree(folder, out / RUN)
            if timings:
                shutil.copytree(timings, out / TIMINGS)
            for name, text in pages.items():
                write_atomically(out / name, text.encode(errors="backslashreplace"))
    return merged


def need_own_folder(out: Path) -> None:
    """Raise ValueError where the folder is inside an installed package or holds what is no site of ours."""
    package = Path(__file__).resolve().parents[2]
    if out.resolve().is_relative_to(package) or "site-packages" in out.resolve().parts:
        raise ValueError(f"{out}: a site is never written into an installed package; give another --out")
    index = out / INDEX
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: expected a folder, found a file")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not (index.is_file() and MARK in index.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"{out}: holds something that is no results site; give an empty --out")


def need_timings(folder: Path) -> None:
    """Raise ValueError where the folder does not hold the pages that `asv publish` writes."""
    if not all((folder / name).is_file() for name in ("index.html", "index.json")):
        raise ValueError(f"{folder}: holds no pages of asv; `make asv` writes them into results/asv-html")


def _pages(
    folder: Path, sources: Mapping[str, str], verdicts: Mapping[str, str], *, timings: bool
) -> dict[str, str]:
    """The pages by file name; ``sources`` names the run that each record was taken from."""
    records = frames.load(folder)
    usable = frames.usable(records)
    if usable.empty:
        raise ValueError("no record of these runs has a number to show")
    environments = {str(row.get("env_id")): row for row in journal.read(folder / "environments.jsonl")[0]}
    tasks = sorted(set(usable["task"]))
    entries: dict[str, list[Entry]] = {task: [] for task in tasks}
    for row in as_dicts(usable):
        entries[row["task"]].append(_entry(row, environments, sources, verdicts))
    template = page_template("site.html.j2")
    shared = {
        "mark": MARK,
        "tasks": [(task, _file(task)) for task in tasks],
        "report": f"{RUN}/report.html",
        "timings": f"{TIMINGS}/index.html" if timings else "",
    }
    pages = {
        _file(task): template.render(**shared, title=task, entries=found, rows=None)
        for task, found in entries.items()
    }
    rows, counts = _table(usable, tasks, verdicts), Counter(sources.values()).items()
    pages[INDEX] = template.render(**shared, title="Results", entries=None, rows=rows, runs=counts)
    return pages


def _file(task: str) -> str:
    return f"task-{labels.slug(task)}.html"


def _table(
    usable: pd.DataFrame, tasks: Sequence[str], verdicts: Mapping[str, str]
) -> list[tuple[str, list[Number | None]]]:
    """A row a method: of each task the record of least mean |error| on held-out data, or nothing."""
    held_out = usable[(usable["split"] == "test") & usable["bpd_mae_all"].notna()]
    best = held_out.sort_values("bpd_mae_all", kind="stable").drop_duplicates(["method", "task"])
    found = {(row["method"], row["task"]): row for row in as_dicts(best)}
    methods = [name for name in labels.METHODS if name in set(best["method"])]
    methods += sorted(set(best["method"]) - set(methods))
    table = []
    for method in methods:
        cells = [
            _number(found[method, task], verdicts) if (method, task) in found else None for task in tasks
        ]
        known = labels.METHODS.get(method)
        table.append((known.label if known else method, cells))
    return table


def _number(row: Mapping[str, Any], verdicts: Mapping[str, str]) -> Number:
    text = f"{numbers.number(row['bpd_mae_all'])} ({row['nfe_mean']:.0f})"
    return Number(text, f"{_file(row['task'])}#{row['cell_id']}", verdicts.get(row["cell_id"], ""))


SHOWN: Final = (
    ("bits/dim", "bpd"),
    ("mean |error|", "bpd_mae_all"),
    ("from", "bpd_mae_all_lo"),
    ("to", "bpd_mae_all_hi"),
    ("bias", "bpd_error"),
    ("rank correlation", "spearman"),
    ("evaluations", "nfe_mean"),
    ("evaluations and products", "work"),
)
"""Numbers of a record that stand above the others."""


def _entry(
    row: Mapping[str, Any],
    environments: Mapping[str, Mapping[str, Any]],
    sources: Mapping[str, str],
    verdicts: Mapping[str, str],
) -> Entry:
    known = [(name, row.get(name)) for name in frames.TEXTS + frames.NUMERIC]
    return Entry(
        anchor=row["cell_id"],
        title=f"{row['row']} · {row['model']} · {labels.split_title(row['split'])}",
        main=tuple((head, numbers.number(row[name])) for head, name in SHOWN if row[name] == row[name]),
        columns=tuple(
            (name, str(value)) for name, value in known if value not in ("", None) and value == value
        ),
        environment=tuple(
            (str(name), str(to_plain(value))) for name, value in environments.get(row["env_id"], {}).items()
        ),
        source=sources.get(row["cell_id"], ""),
        checked=verdicts.get(row["cell_id"], ""),
    )
