"""Where a number comes from, and whether it comes again: one cell of a run, run again and held against its record.

A record names the commit, the versions and the command (its row of `environments.jsonl`), the hashes of model and
data, and all options of its cell; the id hashes what determines the answer, so a cell rebuilt from its record is known
to be the same one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from flowlik.cells import Cell, Options
from flowlik.evaluation.row import Arrays, Row
from flowlik.planning.suites import options_of, parse
from flowlik.records.columns import COUNTED, TABLE
from flowlik.records.environment import describe
from flowlik.records.journal import read
from flowlik.records.reading import read_rows
from flowlik.records.writing import read_arrays
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task

ROUNDING = {"float32": 1e-4, "float64": 1e-9}
"""Relative differences of log-densities that rounding alone makes on another machine."""

SAID = tuple(
    column.name
    for column in TABLE
    if column.measured == "items" and column.unit == "bits/dim" and not column.name.endswith(("_lo", "_hi"))
)
"""Means over the items that a record says, not known in older ones: others were not computed from its items."""

STEPS_APART = 0.05
"""Relative differences of counts that rounding makes: an adaptive solver may take a step more."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record, the folder it lies in, and the environment it was made in."""

    folder: Path
    row: Row
    environment: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What came of running a cell again: `verdict` is identical, rounding or different, `lines` say why."""

    verdict: str
    lines: tuple[str, ...]

    @property
    def succeeded(self) -> bool:
        """True where the record holds."""
        return self.verdict != "different"


WORDS = {"identical": "reproduced, bit for bit", "rounding": "reproduced, up to rounding"}
"""What is said of a record that came again."""


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A record that was run again, and what came of it in words."""

    cell_id: str
    title: str
    verdict: str
    succeeded: bool

    def line(self, run: str) -> str:
        """One line for people."""
        return f"{run}: {self.title} [{self.cell_id}]: {self.verdict}"


def checked(run: Path, count: int) -> Iterator[Checked]:
    """Run `count` records of a run again, which ones their ids decide and nobody can choose; those of controls and of
    cells without a value are left out.

    Raises:
        ValueError: a record cannot be turned into a cell.
    """
    rows = [row for row in read_rows(run) if row["status"] == "ok" and row["family"] != "control"]
    for row in sorted(rows, key=lambda row: hashlib.sha256(row["cell_id"].encode()).digest())[:count]:
        done = reproduce(Found(folder=run, row=row, environment=_environment(run, row["env_id"])))
        verdict = WORDS.get(done.verdict, f"NOT reproduced: {'; '.join(done.lines)}")
        title = f"{row['task']} · {row['model']} · {row['estimator_label']}"
        yield Checked(cell_id=row["cell_id"], title=title, verdict=verdict, succeeded=done.succeeded)


def find(cell_id: str, folders: list[Path]) -> Found:
    """The newest record whose id begins with `cell_id`.

    Raises:
        ValueError: there is none, or several cells begin so.
    """
    found = [
        Found(folder=folder, row=row, environment=_environment(folder, row["env_id"]))
        for folder in folders
        for row in read_rows(folder)
        if row["cell_id"].startswith(cell_id)
    ]
    names = sorted({one.row["cell_id"] for one in found})
    if not names:
        where = ", ".join(map(str, folders)) or "a run below runs/ (name one with --in)"
        raise ValueError(f"no cell {cell_id!r} in {where}")
    if len(names) > 1:
        raise ValueError(f"{cell_id!r} is the beginning of {len(names)} cells: {', '.join(names[:4])}")
    return max(found, key=lambda one: one.row["created_utc"] or "")


def run_folders(root: Path) -> list[Path]:
    """The folders with records below `root`."""
    return sorted(file.parent for file in root.glob("*/records.jsonl"))


def _environment(folder: Path, env_id: str | None) -> Mapping[str, Any]:
    try:
        rows, _ = read(folder / "environments.jsonl")
    except (FileNotFoundError, NotADirectoryError):  # a file of records stands alone
        rows = []
    return next((row for row in rows if row.get("env_id") == env_id), {})


def cell_of(row: Row) -> Cell:
    """The cell of a record.

    Raises:
        ValueError: the record lacks its options or names what is not there.
    """
    known = row["extra"].get("options") if isinstance(row["extra"], dict) else None
    names = {field.name for field in fields(Options)} - {"features"}  # younger than many a record
    if not isinstance(known, dict) or not names <= set(known):
        raise ValueError(
            f"the record of {row['cell_id']} does not hold the options of its cell; run it anew: flowlik run "
            f"-t {row['task']} -m {row['model']} -e '{row['estimator_label']}'"
        )
    try:
        options = options_of(known, Options())
    except ValueError as error:
        raise ValueError(
            f"the record of {row['cell_id']} does not hold the options of its cell: {error}"
        ) from None
    get_task(row["task"])
    (estimator,) = parse(row["estimator_label"])
    return Cell(
        task=row["task"], model=row["model"], estimator=estimator, options=options, device=row["device"]
    )


def reproduce(found: Found) -> Reproduction:
    """Run a record's cell again and compare what does not depend on a clock.

    Raises:
        ValueError: the record cannot be turned into a cell.
    """
    row, arrays = run_cell(cell_of(found.row))
    old = found.row
    lines = list(_changes(found, row))
    if row["cell_id"] != old["cell_id"]:
        return Reproduction(verdict="different", lines=(*lines, "so it is another cell now"))
    if row["status"] != old["status"]:
        lines.append(f"status {old['status']} -> {row['status']}: {row['reason'] or ''}".rstrip(": "))
        return Reproduction(verdict="different", lines=tuple(lines))
    worst = _largest_difference(found, arrays)
    counted = [name for name in COUNTED if old[name] != row[name]]
    lines += [f"{name} {old[name]} -> {row[name]}" for name in counted]
    said = [name for name in SAID if _apart(old[name], row[name]) > ROUNDING[row["dtype"]]]
    lines += [f"{name} {old[name]} -> {row[name]}" for name in said]
    near = not said and all(_apart(old[name], row[name]) <= STEPS_APART for name in counted)
    if worst is None:
        same = not counted and not said and old["bpd"] == row["bpd"]
        lines.append("no log-densities were kept beside the record; its columns were compared")
        return Reproduction(verdict="identical" if same else "different", lines=tuple(lines))
    lines.append(f"largest relative difference of a log-density: {worst:.2g}")
    if worst == 0 and not counted and not said:
        return Reproduction(verdict="identical", lines=tuple(lines))
    within = worst <= ROUNDING[row["dtype"]] and near
    return Reproduction(verdict="rounding" if within else "different", lines=tuple(lines))


def _apart(old: float | None, new: float | None) -> float:
    if old is None:
        return 0.0
    if new is None:
        return math.inf
    return abs(new - old) / max(abs(old), 1.0)


def _changes(found: Found, row: Row) -> list[str]:
    """What is not as it was when the record was made."""
    old = found.row
    lines = [
        f"{name.removesuffix('_hash')} hash {old[name]} -> {row[name]}"
        for name in ("model_hash", "data_hash")
        if old[name] != row[name]
    ]
    if old["estimator_version"] != row["estimator_version"]:
        lines.append(f"estimator version {old['estimator_version']} -> {row['estimator_version']}")
    now = describe()
    made_in = found.environment
    return lines + [
        f"{name} {made_in.get(name)} -> {now[name]}"
        for name in ("commit", "dirty", "torch", "gpu", "cpu", "threads")
        if made_in and made_in.get(name) != now[name]
    ]


def _largest_difference(found: Found, arrays: Arrays) -> float | None:
    """Of the log-densities, relative to 1 + |log p|; infinite where one has a value and the other has none."""
    file = found.folder / "items" / f"{found.row['cell_id']}.npz"
    if not file.is_file() or "log_prob" not in arrays:
        return None
    old, new = read_arrays(file).get("log_prob"), arrays["log_prob"]
    if old is None or old.shape != new.shape:
        return math.inf
    apart = np.abs(new - old) / (1 + np.abs(old))
    same = (old == new) | (np.isnan(old) & np.isnan(new))
    apart = np.where(same, 0.0, np.where(np.isfinite(apart), apart, math.inf))
    return float(apart.max(initial=0.0))


def described(found: Found) -> str:
    """Where a record comes from, in lines for people."""
    row, environment = found.row, found.environment
    dirty = " with changes" if environment.get("dirty") else ""
    return "\n".join(
        (
            f"{row['task']} ({row['split']}) · {row['model']} · {row['estimator_label']}  [{row['cell_id']}]",
            f"made    {row['created_utc']} by run {row['run_id']} in {found.folder}",
            f"commit  {environment.get('commit') or 'unknown'}{dirty}; torch {environment.get('torch', 'unknown')}",
            f"command {' '.join(map(str, environment.get('argv') or ['unknown']))}",
            f"model   {row['model_hash']}   data {row['data_hash']}   reference {row['ref_id']}",
            f"options {json.dumps((row['extra'] or {}).get('options'))}",
        )
    )
