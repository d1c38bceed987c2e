"""Gates: limits on accuracy and NFE that pass or fail, from `results/baselines/*.json`.

A file holds `{"gates": [...]}`; a gate names a cell and one column of its record, or one key of `extra`:

    {"id": "...", "task": "gmm-2d", "model": "closed-form", "estimator": "ode[solver=dopri5,...]",
     "n_items": 5000, "column": "bpd_mae", "max": 2e-4, "measured": 1.1e-5}

Optional: any field of `flowlik.cells.Options` (split, batch_size, dtype, seed, density, samples ...), `min`, `slow`
(more than ten seconds), and `minus`: what another cell differs in (`{"split": "train"}`, `{"estimator": "control-mean",
"model": "teacher"}`), whose value is then subtracted.
`flowlik check` measures them all and prints verdicts; the tests read the same file through `run_gate`. After a change
that is meant to move a number, `flowlik check --update` notes what was measured; limits are edited by hand, in review.
Timings never gate.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowlik.cells import Cell, Options
from flowlik.measures.registry import own_columns
from flowlik.planning.suites import expand, options_of
from flowlik.records.columns import BY_NAME, Column, named
from flowlik.records.paths import results_dir
from flowlik.running.run import run_cell
from flowlik_models.files import write_atomically
from flowlik_models.names import unknown

_KEYS = ("id", "task", "model", "estimator", "column", "min", "max", "measured", "minus", "slow")
_NEEDED = ("id", "task", "model", "estimator", "column")
_OPTIONS = tuple(field.name for field in fields(Options))
_ANY_EXTRA = Column("", "A key of `extra` that the table does not know: a measure of a task or a package.")


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One limit: `low <= column of the cell's record <= high`."""

    id: str
    cell: Cell
    column: str
    low: float = -math.inf
    high: float = math.inf
    measured: float | None = None
    minus: Cell | None = None
    slow: bool = False
    file: Path | None = None

    @property
    def limits(self) -> str:
        """The limits as text."""
        if self.low == self.high:
            return f"= {self.high:g}"
        parts = [f">= {self.low:g}"] if math.isfinite(self.low) else []
        return " and ".join([*parts, *([f"<= {self.high:g}"] if math.isfinite(self.high) else [])])


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A gate with what was measured; `note` says why there is no value."""

    gate: Gate
    value: float | None
    passed: bool
    note: str | None = None

    def line(self) -> str:
        """One line for people."""
        value = self.note if self.value is None else f"{self.value:.4g}"
        verdict = "pass" if self.passed else "FAIL"
        return f"{verdict}  {self.gate.id:<44} {self.gate.column} {value} ({self.gate.limits})"


def load_gates(folder: Path | None = None, only: str | None = None) -> list[Gate]:
    """All gates of the baselines, or those whose id contains `only`.

    Raises:
        ValueError: a broken file (named), or no gate left.
    """
    folder = folder or results_dir() / "baselines"
    gates = [gate for file in sorted(folder.glob("*.json")) for gate in _read(file)]
    ids = [gate.id for gate in gates]
    for name in set(ids):
        if ids.count(name) > 1:
            raise ValueError(f"{folder}: the gate {name!r} is there twice")
    chosen = [gate for gate in gates if only is None or only in gate.id]
    if not chosen:
        raise ValueError(f"no gate contains {only!r}" if gates else f"{folder}: expected files of gates")
    return chosen


def _read(file: Path) -> list[Gate]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))["gates"]
        return [_gate(entry, file) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a file of gates ({error})") from error


def _gate(entry: dict[str, Any], file: Path) -> Gate:
    for key in entry:
        if key not in (*_KEYS, *_OPTIONS):
            raise ValueError(unknown("key", key, (*_KEYS, *_OPTIONS)))
    if missing := [key for key in _NEEDED if key not in entry]:
        raise ValueError(f"gate {entry.get('id')!r} has no {missing[0]!r}")
    if BY_NAME.get(entry["column"], _ANY_EXTRA).kind != "number":
        raise ValueError(f"gate {entry['id']!r} names the column {entry['column']!r}, which holds no numbers")
    minus = entry.get("minus")
    return Gate(
        id=entry["id"],
        cell=_cell(entry),
        minus=None if minus is None else _cell({**entry, **minus}),
        slow=bool(entry.get("slow", False)),
        column=entry["column"],
        low=entry.get("min", -math.inf),
        high=entry.get("max", math.inf),
        measured=entry.get("measured"),
        file=file,
    )


def _cell(entry: dict[str, Any]) -> Cell:
    options = options_of(entry, Options(rounds=0))
    cells = expand([entry["task"]], [entry["model"]], [entry["estimator"]], options)
    if len(cells) != 1:
        raise ValueError(f"gate {entry['id']!r} names {len(cells)} estimators; one is needed")
    return cells[0]


@lru_cache(maxsize=256)
def _row(cell: Cell) -> dict[str, Any]:
    return run_cell(cell)[0]


def run_gate(gate: Gate, device: str = "cpu") -> Verdict:
    """Measure one gate; gates of the same cell share one run within a process."""
    value, note = _value(gate.cell, gate.column, device)
    if value is not None and gate.minus is not None:
        other, note = _value(gate.minus, gate.column, device)
        value = None if other is None else value - other
    if value is None:
        return Verdict(gate=gate, value=None, passed=False, note=note)
    return Verdict(gate=gate, value=value, passed=bool(gate.low <= value <= gate.high))


def _value(cell: Cell, column: str, device: str) -> tuple[float | None, str | None]:
    row = _row(cell if cell.is_control else replace(cell, device=device))
    if row["status"] != "ok":
        return None, f"{row['status']}: {row['reason']}"
    value = row.get(column, row["extra"].get(column))
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None, f"no value ({row['reason'] or _why_missing(row, column)})"
    return float(value), None


def _why_missing(row: dict[str, Any], column: str) -> str:
    if column in row or column in row["extra"] or column in BY_NAME:
        return "not measured"
    return unknown("column", column, (*named(BY_NAME.values(), "number"), *named(own_columns())))


def run_gates(gates: Iterable[Gate], device: str = "cpu") -> Iterator[Verdict]:
    """Measure gates one after the other."""
    for gate in gates:
        yield run_gate(gate, device)


def note_measured(verdicts: Iterable[Verdict]) -> None:
    """Write the measured values beside the limits in the files the gates came from."""
    values = {(verdict.gate.file, verdict.gate.id): verdict.value for verdict in verdicts}
    for file in {file for file, _ in values if file is not None}:
        content = json.loads(file.read_text(encoding="utf-8"))
        for entry in content["gates"]:
            value = values.get((file, entry["id"]))
            if value is not None:
                entry["measured"] = float(f"{value:.4g}")
        write_atomically(file, json.dumps(content, indent=2).encode() + b"\n")
