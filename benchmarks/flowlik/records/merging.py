"""Runs of several machines in one folder, where they speak of the same models and the same data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowlik.records import journal
from flowlik.records.columns import FINISHED, SCHEMA_VERSION
from flowlik.records.reading import latest_rows, records_file, run_note
from flowlik.records.writing import read_arrays, to_line, utc_now
from flowlik_models.files import alone_in, remove_leftovers, write_atomically

MIXED = "merged runs"
SAME_ANSWER = 1e-3
"""Relative difference of bits/dim that rounding makes on another machine, adaptive solvers included."""

_PLAIN_NAME = re.compile(r"[\w=|+-][\w.=|+-]*")


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge made: how many cells, how many of them several runs had, and the run that each was taken from."""

    folder: Path
    cells: int
    common: int
    taken_from: Mapping[str, Path] = field(default_factory=dict)


def merge_runs(folders: Sequence[Path], out: Path) -> Merged:
    """Join the records, environments and items of several runs in the new folder `out`.

    Of a cell that several runs have, the newest finished record is taken. Finished parts of one suite stay that suite.

    Raises:
        FileNotFoundError: a folder holds no records.
        ValueError: `out` holds records already, or the runs differ in a model, in data or in the records' schema; the
            line names the first difference.
        StorageError: the disk is full.
    """
    _refuse_records(out)
    runs = {folder: _rows(folder) for folder in folders}
    _refuse_differences(runs)
    chosen: dict[str, tuple[Path, dict[str, Any]]] = {}
    total = 0
    for folder, rows in runs.items():
        for row in rows:
            total += 1
            held = chosen.get(row["cell_id"])
            if held is not None:
                _refuse_other_answer(*held, folder, row)
            if held is None or _rank(held[1]) < _rank(row):
                chosen[row["cell_id"]] = (folder, row)
    with journal.storage(out), alone_in(out):
        _refuse_records(out)  # of another merge, for which this one waited
        _write_merged(folders, chosen, out)
    taken_from = {cell_id: folder for cell_id, (folder, _) in chosen.items()}
    return Merged(folder=out, cells=len(chosen), common=total - len(chosen), taken_from=taken_from)


def _refuse_records(out: Path) -> None:
    if (out / "records.jsonl").exists():
        raise ValueError(f"{out} holds records already; give another --out")


def _write_merged(folders: Sequence[Path], chosen: dict[str, tuple[Path, dict[str, Any]]], out: Path) -> None:
    remove_leftovers(out)
    _copy_items(chosen, out)
    _write(out / "environments.jsonl", _environments(folders))
    note = {
        "merged": [folder.name for folder in folders],
        "suite": _suite(folders),
        "argv": ["flowlik", "merge"],
    }
    write_atomically(
        out / "run.json", json.dumps(note | {"started": utc_now(), "finished": utc_now()}).encode()
    )
    _write(out / "records.jsonl", (row for _, row in chosen.values()))  # last: with it the run is there


def _rows(folder: Path) -> list[dict[str, Any]]:
    """As `read_rows`; ValueError where one is of another schema."""
    found, _ = journal.read(records_file(folder))
    for row in found:
        if row.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(
                f"{folder}: its records have schema {row.get('schema_version')}, not {SCHEMA_VERSION}"
            )
    return latest_rows(found)


def _suite(folders: Sequence[Path]) -> str:
    """The suite that all these runs are finished parts of; otherwise ``merged runs``."""
    notes = [run_note(folder) for folder in folders]
    suites = {str(note.get("suite")) for note in notes}
    return suites.pop() if len(suites) == 1 and all(note.get("finished") for note in notes) else MIXED


def _rank(row: dict[str, Any]) -> tuple[bool, str]:
    return row["status"] in FINISHED, row["created_utc"] or ""


def _refuse_differences(runs: dict[Path, list[dict[str, Any]]]) -> None:
    """ValueError where two runs mean different things by the same name."""
    seen: dict[tuple[Any, ...], tuple[str, Path]] = {}
    for folder, rows in runs.items():
        for row in rows:
            if not _PLAIN_NAME.fullmatch(row["cell_id"]):
                raise ValueError(f"{folder}: {row['cell_id']!r} is no id of a cell")
            for what, name, value in _meanings(row):
                held, where = seen.setdefault((what, name), (value, folder))
                if held != value:
                    raise ValueError(
                        f"the {what} of {name} differ: {held} in {where}, {value} in {folder}; "
                        "merge runs of the same models and data"
                    )


def _refuse_other_answer(there: Path, held: Mapping[str, Any], folder: Path, row: Mapping[str, Any]) -> None:
    """ValueError where two records of one cell, which determines the answer, say another likelihood."""
    before, now = (
        (one["bpd"], one["bpd_mae"]) if one["status"] == "ok" else (None, None) for one in (held, row)
    )
    for old, new in zip(before, now, strict=True):
        if old is not None and new is not None and not abs(new - old) <= SAME_ANSWER * (1.0 + abs(old)):
            raise ValueError(
                f"the results of cell {row['cell_id']} differ: {old:.6g} in {there}, {new:.6g} in {folder}, in "
                f"bits/dim; one was edited, is damaged or of other code: "
                f"flowlik reproduce {row['cell_id']} --in {folder}"
            )


def _meanings(row: dict[str, Any]) -> Iterable[tuple[str, str, str]]:
    if row["model_hash"]:
        yield "model hashes", f"{row['model']} on {row['task']}", row["model_hash"]
    if row["data_hash"]:
        yield "data hashes", f"{row['task']} ({row['split']})", row["data_hash"]


def _copy_items(chosen: dict[str, tuple[Path, dict[str, Any]]], out: Path) -> None:
    for cell_id, (folder, _) in chosen.items():
        source = records_file(folder).parent / "items" / f"{cell_id}.npz"
        if source.is_file():
            read_arrays(source)  # a damaged one is not passed on
            write_atomically(out / "items" / source.name, source.read_bytes())


def _environments(folders: Sequence[Path]) -> Iterable[dict[str, Any]]:
    known: set[str] = set()
    for folder in folders:
        file = records_file(folder).parent / "environments.jsonl"
        for row in journal.read(file)[0] if file.is_file() else []:
            if str(row.get("env_id")) not in known:
                known.add(str(row.get("env_id")))
                yield row


def _write(file: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(file, b"".join(map(to_line, rows)))
