"""Records: append-only JSON Lines, one row per cell, and the one way to read them back.

A row is written by one `write` call and synced to disk before the run goes on, so a run that is killed loses at most
the row it was writing; a torn last line is left out on reading and set aside (`records.jsonl.torn`) on the next write.
Per-item arrays lie beside as `items/<cell_id>.npz`, put in place by a rename before their row is written.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowlik_models.files import write_atomically

if TYPE_CHECKING:
    import pandas as pd

SCHEMA_VERSION = 1

COLUMN_GROUPS: dict[str, tuple[str, ...]] = {
    "identity": ("schema_version", "run_id", "cell_id", "created_utc", "repeat"),
    "estimator": (
        *("estimator", "estimator_label", "family", "params", "steps", "solver", "rtol", "atol"),
        *("trace", "probes", "noise"),
    ),
    "task": (
        *("task", "model", "model_hash", "data_hash", "split", "n_items", "dim", "batch_size", "dtype"),
        *("device", "seed", "compiled", "estimator_version"),
    ),
    "status": ("status", "reason"),
    "cost": (
        *(
            "nfe_mean",
            "nfe_max",
            "vjp_mean",
            "jvp_mean",
            "work",
            "wall_s_median",
            "wall_s_iqr",
            "cpu_s_median",
        ),
        *("rounds", "forward_equivalents", "items_per_s", "peak_bytes"),
    ),
    "accuracy": (
        *("eps", "bpd", "bpd_se", "bpd_ref", "ref_id", "ref_se", "bpd_error", "bpd_error_lo", "bpd_error_hi"),
        *("bpd_mae", "bpd_mae_lo", "bpd_mae_hi", "bpd_rmse", "bpd_err_p95", "spearman", "stderr_mean"),
        *("coverage95", "invalid_share", "mass", "mass_se", "cycle_error", "dequant_draws"),
    ),
    "samples": ("frechet", "frechet_se", "extractor", "n_samples", "kid", "precision", "recall"),
    "extra": ("extra",),
    "environment": ("env_id",),
}
COLUMNS: tuple[str, ...] = tuple(name for group in COLUMN_GROUPS.values() for name in group)
NESTED = ("params", "extra")
TEXT = frozenset(
    (
        *(
            "run_id",
            "cell_id",
            "created_utc",
            "estimator",
            "estimator_label",
            "family",
            "solver",
            "trace",
            "noise",
        ),
        *(
            "task",
            "model",
            "model_hash",
            "data_hash",
            "split",
            "dtype",
            "device",
            "status",
            "reason",
            "ref_id",
        ),
        *("extractor", "env_id"),
    )
)

STATUSES = ("ok", "skipped", "refused", "timeout", "oom", "diverged", "error")
FINISHED = frozenset(("ok", "refused", "diverged"))
"""Statuses that another attempt would only repeat: `--resume` leaves these cells alone and tries the others again."""
FAILED = frozenset(("refused", "timeout", "oom", "diverged", "error"))
"""Statuses of a cell that failed: they make the exit status 1."""

# What a person would call the same cell, whatever became of it: a skipped row is dropped once another row says more.
_SAME_CELL = (
    "task",
    "model",
    "estimator_label",
    "split",
    "n_items",
    "batch_size",
    "dtype",
    "device",
    "seed",
    "repeat",
)


def utc_now() -> str:
    """The present time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_plain(value: Any) -> Any:
    """`value` as plain JSON: numpy and torch numbers become Python ones, what is not finite becomes None."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return to_plain(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def to_line(row: Mapping[str, Any]) -> bytes:
    """One row as one line of strict JSON (no NaN), newline included."""
    return (json.dumps(to_plain(row), allow_nan=False, separators=(",", ":")) + "\n").encode()


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append `row` to the JSON Lines file `path` by one write, and sync it to disk.

    A torn last line, left by a run that was killed while it wrote, is first moved to `<path>.torn`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    set_torn_line_aside(path)
    line = to_line(row)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        if os.write(descriptor, line) != len(line):
            raise OSError(f"{path}: the disk took only a part of a row")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def set_torn_line_aside(path: Path) -> bool:
    """Move what follows the last newline of `path` to `<path>.torn`; True where there was something to move."""
    if not path.exists():
        return False
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return False
        file.seek(size - 1)
        if file.read(1) == b"\n":
            return False
        file.seek(0)
        end = file.read().rfind(b"\n") + 1
        file.seek(end)
        with path.with_name(path.name + ".torn").open("ab") as aside:
            aside.write(file.read() + b"\n")
        file.truncate(end)
    return True


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole row of a JSON Lines file; a line that is torn or no JSON object is left out with a warning."""
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield row
        else:
            warnings.warn(f"{path.name}: line {number} is torn and was left out", stacklevel=2)


def records_file(path: str | Path) -> Path:
    """The records file of a run folder, or the file itself.

    Raises:
        FileNotFoundError: there is no such file; the message names it.
    """
    path = Path(path)
    file = path / "records.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no records at {file}: expected a run folder or its records.jsonl")
    return file


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a run as dicts with exactly `COLUMNS`: of a cell tried twice the last row, skipped ones only
    where nothing better is known of the same cell.
    """
    latest: dict[str, dict[str, Any]] = {}
    for row in read_lines(records_file(path)):
        cell_id = str(row.get("cell_id"))
        latest.pop(cell_id, None)
        latest[cell_id] = {name: row.get(name) for name in COLUMNS}
    known = {_same_cell(row) for row in latest.values() if row["status"] != "skipped"}
    return [row for row in latest.values() if row["status"] != "skipped" or _same_cell(row) not in known]


def _same_cell(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in _SAME_CELL)


def read_records(path: str | Path) -> pd.DataFrame:
    """Read a run into a frame with exactly the columns of `COLUMNS`.

    Args:
        path: a run's folder or its `records.jsonl`.

    Returns:
        One row per cell, in the order in which they were written; `params` and `extra` hold dicts, numbers that are
        not known are NaN, texts that are not known None. The last row of a cell that was tried twice counts.

    Raises:
        FileNotFoundError: there are no records at `path`.
    """
    import pandas as pd

    rows = read_rows(path)
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    for name in COLUMNS:
        if name in NESTED:
            frame[name] = pd.Series([row[name] or {} for row in rows], dtype=object, index=frame.index)
        elif name in TEXT:
            frame[name] = frame[name].astype(object).where(frame[name].notna(), None)
        elif name != "compiled":
            frame[name] = pd.to_numeric(frame[name])
    return frame


def finished_cells(path: Path) -> set[str]:
    """The ids of the cells that a resumed run may skip; a torn last line is set aside."""
    file = path / "records.jsonl"
    if not file.is_file():
        return set()
    set_torn_line_aside(file)
    return {str(row["cell_id"]) for row in read_rows(file) if row["status"] in FINISHED}


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write named arrays as a compressed npz, whole or not at all."""
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an npz file; nothing is unpickled.

    Raises:
        ValueError: the file is missing, truncated or no npz; the message names it.
    """
    import zipfile

    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a readable npz file of arrays ({error})") from error
