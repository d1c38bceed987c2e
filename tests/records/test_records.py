"""Records survive being cut off, read back exactly, and never hold half a row."""

from __future__ import annotations

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import flowlik
from flowlik.records.columns import COLUMNS
from flowlik.records.reading import read_rows
from flowlik.records.writing import append_line, read_arrays, to_plain, write_arrays


def row(cell: str, status: str = "ok", **values: Any) -> dict[str, Any]:
    named = {
        "cell_id": cell,
        "status": status,
        "task": "gmm-2d",
        "model": cell,
        "n_items": 3,
        "split": "test",
    }
    return dict.fromkeys(COLUMNS) | named | values


def test_rows_come_back_with_exactly_the_columns(tmp_path: Path) -> None:
    append_line(tmp_path / "records.jsonl", row("a", bpd=1.5, params={"steps": 4}, extra={"x": 1.0}))
    append_line(tmp_path / "records.jsonl", {"cell_id": "b", "status": "error", "unheard_of": 1})
    frame = flowlik.read_records(tmp_path)
    assert tuple(frame.columns) == COLUMNS
    assert frame["params"].tolist() == [{"steps": 4}, {}]
    assert frame["bpd"][0] == 1.5
    assert math.isnan(frame["bpd"][1])
    assert frame["task"].tolist() == ["gmm-2d", None]
    assert pd.api.types.is_numeric_dtype(frame["bpd_error"])


def test_records_are_read_from_the_file_too_and_an_empty_run_is_empty(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.touch()
    assert len(flowlik.read_records(file)) == 0
    assert tuple(flowlik.read_records(tmp_path).columns) == COLUMNS
    with pytest.raises(FileNotFoundError, match="elsewhere"):
        flowlik.read_records(tmp_path / "elsewhere")


def test_a_torn_last_line_is_left_out_and_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_line(file, row("a"))
    with file.open("ab") as stream:
        stream.write(b'{"cell_id": "b", "stat')
    with pytest.warns(UserWarning, match="torn"):
        assert [r["cell_id"] for r in read_rows(file)] == ["a"]
    append_line(file, row("c"))
    assert (tmp_path / "records.jsonl.torn").read_bytes() == b'{"cell_id": "b", "stat\n'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [r["cell_id"] for r in read_rows(file)] == ["a", "c"]


def test_a_row_is_one_write_and_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[bytes] = []
    synced: list[int] = []
    real_write, real_sync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: writes.append(data) or real_write(fd, data))
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(fd) or real_sync(fd))
    append_line(tmp_path / "records.jsonl", row("a"))
    assert len(writes) == len(synced) == 1
    assert writes[0].endswith(b"\n")
    assert writes[0].count(b"\n") == 1


def test_numbers_that_are_not_finite_become_null() -> None:
    plain = to_plain(
        {"a": math.nan, "b": np.float32("inf"), "c": np.arange(2), "d": (True, None, np.int64(3))}
    )
    assert json.dumps(plain, allow_nan=False) == '{"a": null, "b": null, "c": [0, 1], "d": [true, null, 3]}'


def test_the_last_row_of_a_cell_counts(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    for entry in (row("a", "timeout"), row("b"), row("a", bpd=2.0)):
        append_line(file, entry)
    assert [(r["cell_id"], r["status"]) for r in read_rows(file)] == [("b", "ok"), ("a", "ok")]


def test_a_skipped_row_goes_once_the_same_cell_has_run(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append_line(file, row("before", "skipped", model="meanflow"))
    append_line(file, row("other", "skipped", model="teacher"))
    append_line(file, row("after", "ok", model="meanflow"))
    assert [r["cell_id"] for r in read_rows(file)] == ["other", "after"]


def test_arrays_are_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "items" / "a.npz"
    write_arrays(file, {"log_prob": np.arange(3.0)})
    assert read_arrays(file)["log_prob"].tolist() == [0.0, 1.0, 2.0]
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"]

    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_arrays(file, {"log_prob": np.arange(9.0)})
    monkeypatch.undo()
    assert read_arrays(file)["log_prob"].tolist() == [0.0, 1.0, 2.0]
    assert [path.name for path in file.parent.iterdir()] == ["a.npz"]


def test_a_damaged_array_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    write_arrays(file, {"log_prob": np.arange(1000.0)})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_arrays(file)
    np.savez(file, what=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"a\.npz"):
        read_arrays(file)


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ({"bpd_mae": -0.1}, "bpd_mae below 0"),
        ({"spearman": 1.2}, "spearman above 1"),
        ({"invalid_share": 2.0}, "invalid_share above 1"),
        ({"bpd_mae": 0.1, "bpd_mae_lo": 0.2, "bpd_mae_hi": 0.1}, "bpd_mae_lo above bpd_mae_hi"),
        ({"bpd": 2.0, "bpd_ref": 1.5, "bpd_error": 0.1}, "bpd_error is not bpd - bpd_ref"),
        ({"bpd_mae": 0.1, "bpd_error": -0.2}, r"bpd_mae below \|bpd_error\|"),
        ({"bpd_rmse": 0.1, "bpd_mae": 0.2}, "bpd_rmse below bpd_mae"),
        ({"nfe_mean": 4.0, "nfe_max": 2.0}, "nfe_max below nfe_mean"),
        ({"nfe_mean": 4, "vjp_mean": 4, "jvp_mean": 0, "work": 4}, "work is not"),
    ],
)
def test_a_record_that_contradicts_itself_is_left_out_by_name(
    tmp_path: Path, says: dict[str, float], why: str
) -> None:
    # the reference of the second knows some of the items that were answered
    some = {"bpd": 4.61, "bpd_ref": 3.56, "ref_se": 0.003, "bpd_error": 1.12, "bpd_mae": 1.12}
    for one in (
        row("sound", bpd=2.0),
        row("beyond", **some),
        row("edited", **says),
        row("failed", "error", **says),
    ):
        append_line(tmp_path / "records.jsonl", one)
    with pytest.warns(UserWarning, match=rf"1 records contradict themselves \({why}.*first edited"):
        frame = flowlik.read_records(tmp_path)
    assert frame["cell_id"].tolist() == ["sound", "beyond", "failed"]
