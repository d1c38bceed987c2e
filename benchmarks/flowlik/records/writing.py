"""Records and arrays as they are written."""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from flowlik.records import journal
from flowlik_models.files import write_atomically


def utc_now() -> str:
    """The present time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def to_plain(value: Any) -> Any:
    """`value` as plain JSON: numpy and torch numbers become Python ones, what is not finite becomes None.

    >>> to_plain({"bpd": np.float64(2.5), "bpd_se": float("nan"), "roots": (1, 2)})
    {'bpd': 2.5, 'bpd_se': None, 'roots': [1, 2]}
    """
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
    """Append `row` to the JSON Lines file `path`, whole or not at all, and sync it to disk.

    Raises:
        StorageError: the disk is full or cannot be written; the file is as it was before.
    """
    journal.append(path, to_line(row))


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write named arrays as a compressed npz, whole or not at all."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **dict(arrays))  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """The arrays of an npz file; nothing is unpickled.

    Raises:
        ValueError: the file is missing, truncated or no npz; the message names it.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            return {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: expected a readable npz file of arrays ({error})") from error
