"""Are the records of two runs the same? Usage: python .ci/same_records.py BEFORE AFTER (folders of two runs).

Every column of every row is compared to the last bit, cell by cell, but for the time of the run, its names, and what is
timed. Exit status 1 where anything else differs, with one line a difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

TIMED = {
    "wall_s_median",
    "wall_s_iqr",
    "cpu_s_median",
    "rounds",
    "forward_equivalents",
    "items_per_s",
    "peak_bytes",
}
NAMES = {"created_utc", "run_id", "env_id"}
TIMED_EXTRA = {"cell_s", "hardware", "timing_batch"}


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """Rows by cell id."""
    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["cell_id"]: row for row in map(json.loads, lines)}


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same, extra values by name."""
    kept = {name: value for name, value in row.items() if name not in TIMED | NAMES | {"extra"}}
    return kept | {f"extra.{name}": value for name, value in row["extra"].items() if name not in TIMED_EXTRA}


def differences(before: Path, after: Path) -> list[str]:
    """One line a difference between two runs."""
    old, new = rows(before), rows(after)
    lines = [f"{key}: only in {before if key in old else after}" for key in sorted(old.keys() ^ new.keys())]
    for key in sorted(old.keys() & new.keys()):
        a, b = plain(old[key]), plain(new[key])
        name = f"{old[key]['task']} {old[key]['model']} {old[key]['estimator_label']} ({old[key]['split']})"
        lines += [
            f"{name}: {c} {a.get(c)!r} -> {b.get(c)!r}"
            for c in sorted(a.keys() | b.keys())
            if a.get(c) != b.get(c)
        ]
        lines += [f"{name}: items {part}" for part in unlike_items(before, after, key)]
    return lines


def unlike_items(before: Path, after: Path, key: str) -> list[str]:
    """Names of the arrays beside a cell that differ."""
    files = [folder / "items" / f"{key}.npz" for folder in (before, after)]
    if not any(file.exists() for file in files):
        return []
    with np.load(files[0]) as a, np.load(files[1]) as b:
        names = sorted(set(a.files) | set(b.files))
        return [
            n
            for n in names
            if n not in a.files
            or n not in b.files
            or not np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f")
        ]


if __name__ == "__main__":
    found = differences(Path(sys.argv[1]), Path(sys.argv[2]))
    print(*found, sep="\n")
    print(
        f"{len(rows(Path(sys.argv[1])))} and {len(rows(Path(sys.argv[2])))} cells, {len(found)} differences"
    )
    sys.exit(bool(found))
