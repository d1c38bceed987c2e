"""The report of a run: one HTML file that holds its figures, tables, statuses and environment and needs no network.

Everything shown comes from the run's folder; nothing is measured or drawn anew, except that figures are drawn where
the folder has none. Every text that stems from a record is escaped by the template.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from flowlik.records.reading import run_note
from flowlik.report import frame as frames
from flowlik.report import labels, numbers
from flowlik.report.figures import drawn
from flowlik.report.figures.kinds import draw_all
from flowlik.report.frame import by_task_and_split
from flowlik.report.page import glossary
from flowlik.report.page.explorer import explorer_data
from flowlik.report.page.pictures import Picture, _overview, _pictures, _scaling
from flowlik.report.page.summaries import _failed, _glance, _impossible, _masses, _notes, _origins
from flowlik.report.tables.accuracy import MASS_WITHIN, by_steps, in_detail
from flowlik.report.tables.published import with_published
from flowlik.report.tables.run import use_tables
from flowlik.report.tables.table import Table
from flowlik.tasks.registry import get_task
from flowlik_models.files import write_atomically


@dataclass(frozen=True)
class Section:
    """Everything the page says about one task."""

    anchor: str
    task: str
    about: str
    facts: tuple[tuple[str, str], ...]
    pictures: tuple[Picture, ...]
    tables: tuple[Table, ...]
    masses: Table | None


def write_report(run_dir: Path) -> Path:
    """Write `report.html` of a run into its folder and return its path; a run without records says so.

    Figures are taken from `run_dir/figures` and drawn first where that folder holds none, or not all of a drawing that
    was interrupted.
    """
    records = frames.load(run_dir)
    if len(records) and not drawn.are_there(run_dir / "figures"):
        draw_all(run_dir)
    usable = frames.averaged(frames.usable(records))
    page = page_template("report.html.j2").render(
        unique=_unique_ids(),
        run=_run(run_dir, records),
        counts=[(str(status), int(n)) for status, n in records["status"].value_counts().items()],
        total=len(records),
        glance=_glance(usable),
        explorer=explorer_data(usable, str(run_dir)),
        overview=_overview(run_dir, usable),
        scaling=_scaling(run_dir, usable),
        sections=[_section(run_dir, str(task), usable) for task in sorted(usable["task"].unique())],
        impossible=_impossible(usable),
        failed=_failed(records),
        notes=_notes(usable),
        origins=_origins(usable),
        environments=_environments(run_dir),
        methods=[method for name, method in labels.METHODS.items() if name in set(records["method"])],
        costs=glossary.costs(),
        measures=glossary.measures(),
        controls=glossary.CONTROLS,
        mass_within=MASS_WITHIN,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    path = run_dir / "report.html"
    write_atomically(path, page.encode(errors="backslashreplace"))
    return path


def page_template(name: str) -> Template:
    """A template of the pages; every text is escaped."""
    environment = Environment(
        loader=PackageLoader("flowlik.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    environment.filters["holds_words"] = lambda place, table: table.holds_words(place)
    environment.tests["waits"] = lambda place, table: table.waits(place)
    return environment.get_template(name)


def _unbroken(text: str) -> str:
    """The text with its intervals kept on one line."""
    return re.sub(r"\[[^\[\]]{1,40}\]", lambda found: found[0].replace(" ", "\u00a0"), text)


def _unique_ids() -> Callable[[str], str]:
    """Makes an id of any text; of the same text again another one."""
    seen: Counter[str] = Counter()

    def unique(text: str) -> str:
        name = labels.slug(text)
        seen[name] += 1
        return name if seen[name] == 1 else f"{name}.{seen[name]}"

    return unique


# --------------------------------------------------------------------------------------------------------- the run
def _run(run_dir: Path, records: pd.DataFrame) -> dict[str, str]:
    known = run_note(run_dir)
    argv = known.get("argv")
    return {
        "name": run_dir.resolve().name,
        "suite": _words(known.get("suite")),
        "command": " ".join(str(a) for a in argv) if isinstance(argv, list) else _words(argv),
        "started": _words(known.get("started")),
        "finished": _words(known.get("finished")),
        "ids": ", ".join(sorted(set(records["run_id"]) - {""})),
    }


def _environments(run_dir: Path) -> list[list[tuple[str, str]]]:
    """Every environment of the run as name and words, nested ones flattened, each once."""
    file = run_dir / "environments.jsonl"
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    except (OSError, UnicodeDecodeError):
        return []
    found: dict[str, list[tuple[str, str]]] = {}
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            found[str(row.get("env_id", line))] = list(_flat(row))
    return list(found.values())


def _flat(row: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and words of an environment; what it does not know is left out."""
    for name, value in row.items():
        if value is None:
            continue
        if isinstance(value, dict):
            yield name, ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
        elif name.endswith("_bytes") and isinstance(value, int | float):
            yield name.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.1f} GiB"
        elif name == "argv" and isinstance(value, list):
            yield "command", " ".join(str(a) for a in value)
        else:
            yield name, _words(value)


def _words(value: object) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


# ------------------------------------------------------------------------------------------------------------- tasks
def _section(run_dir: Path, task: str, usable: pd.DataFrame) -> Section:
    frame = usable[usable["task"] == task]
    likelihoods = frame[frame["bpd"].notna()]
    tables = [table for _, _, part in by_task_and_split(likelihoods) for table in with_published(part)]
    tables += [make(part) for _, _, part in by_task_and_split(likelihoods) for make in (by_steps, in_detail)]
    tables += [table for _, _, part in by_task_and_split(frame) for table in use_tables(part)]
    return Section(
        anchor=f"task-{labels.slug(task)}",
        task=task,
        about=_about(task),
        facts=_facts(frame),
        pictures=tuple(_pictures(run_dir, task, frame)),
        tables=tuple(table for table in tables if table.rows),
        masses=_masses(frame),
    )


def _about(task: str) -> str:
    try:
        return get_task(task).description
    except ValueError:
        return ""


def _facts(frame: pd.DataFrame) -> tuple[tuple[str, str], ...]:
    """What a reader needs to know of a task before its numbers."""
    facts = [("dimensions", ", ".join(f"{d:.0f}" for d in sorted(frame["dim"].dropna().unique())))]
    for split in labels.splits(frame):
        part = frame[frame["split"] == split]
        words = f"{part['n_items'].max():.0f} items"
        row = labels.reference(part)
        if row:
            error = f" ± {numbers.number(row['ref_se'], 1)}" if row["ref_se"] > 0 else ""
            words += f", reference {numbers.fixed(row['bpd_ref'])}{error} bits/dim ({row['ref_id']})"
        facts.append((labels.split_title(split), words))
    eps = labels.eps_words(frame)
    if eps:
        words = "p at t = 1 (eps = 0)" if eps == "0" else f"p at t = 1 − eps, eps = {eps}"
        facts.append(("what is estimated", words))
    return tuple(facts)
