"""Finished runs, for the tests of what interrupts them: the same records, whole and once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import flowlik
from flowlik.records.writing import read_arrays

MEASURED = (
    *("run_id", "created_utc", "env_id", "wall_s_median", "wall_s_iqr", "cpu_s_median", "items_per_s"),
    *("peak_bytes", "forward_equivalents", "rounds"),
)


def table(out: Path) -> pd.DataFrame:
    """A run's records without what was measured by a clock."""
    frame = flowlik.read_records(out).drop(columns=list(MEASURED))
    frame["extra"] = [
        {name: value for name, value in extra.items() if name not in ("cell_s", "timing_batch")}
        for extra in frame["extra"]
    ]
    return frame.sort_values("cell_id").reset_index(drop=True)


def lines(out: Path) -> list[dict[str, Any]]:
    """Every line of the records file, each of which has to be whole."""
    text = (out / "records.jsonl").read_bytes()
    assert text.endswith(b"\n")
    return [json.loads(line) for line in text.splitlines()]


def assert_same_run(out: Path, whole: Path) -> None:
    counts = Counter(line["cell_id"] for line in lines(out))
    assert set(counts.values()) == {1}, "a record is doubled"
    pd.testing.assert_frame_equal(table(out), table(whole))
    for cell_id in counts:
        files = [folder / "items" / f"{cell_id}.npz" for folder in (out, whole)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            found, expected = map(read_arrays, files)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(found[name], expected[name], equal_nan=True) for name in expected)
    known = {line["env_id"] for line in lines(out)}
    environments = [json.loads(line) for line in (out / "environments.jsonl").read_text().splitlines()]
    assert known <= {row["env_id"] for row in environments}
