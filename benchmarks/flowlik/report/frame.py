"""Records as frames for figures, tables and the report: every column present, labelled, in order, averaged over seeds.

They read records through this module only, so that a method has the same name and place in all of them. Nothing here
computes a measure and nothing imports matplotlib.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd

from flowlik.measures.registry import own_columns
from flowlik.records.columns import BY_NAME, EXTRA, NESTED, SAME_CELL, TABLE, Column, named
from flowlik.records.reading import read_records
from flowlik.report import labels
from flowlik.report.labels import METHODS, SPLIT_ORDER, _label, _missing, as_dicts, brief, method_of
from flowlik.report.numbers import from_extra
from flowlik_models.names import unknown

NUMERIC: Final[tuple[str, ...]] = named(TABLE, "number")
TEXTS: Final[tuple[str, ...]] = named(TABLE, "text", "flag")

CELL: Final[tuple[str, ...]] = (
    *(name for name in SAME_CELL if name not in ("seed", "repeat")),
    *("hardware", "extractor", "n_samples"),
)
"""What makes two rows the same cell but for seed and repeat; times of different hardware are never averaged, nor what
different feature networks or numbers of samples say."""

JUDGED: Final = ("model_hash", "data_hash", "ref_id", "eps", "dequant_draws", "estimator_version", "compiled")
"""What a number is of: seeds of one cell agree in it."""

SPREAD: Final = named(column for column in TABLE if column.over_seeds)
"""Columns whose standard deviation over seeds `averaged` keeps beside their mean, as `<name>_sd`."""

SPREAD_EXTRA: Final = named(column for column in EXTRA if column.over_seeds)
"""The same of numbers in `extra`, where mean and `<name>_sd` then stand too."""


def load(run_dir: Path) -> pd.DataFrame:
    """Records of a run, prepared; an empty frame with all columns where there are none yet."""
    path = run_dir / "records.jsonl"
    return prepare(read_records(run_dir) if path.exists() and path.stat().st_size else pd.DataFrame())


def prepare(records: pd.DataFrame) -> pd.DataFrame:
    """Records with every column present, numbers as float64, those of registered measures out of `extra`, the latest
    row of each cell, and columns of labels. Results of one cell that are of another model or other data than the newest
    are left out with a warning: they are no seeds of it.

    `method` is a key of METHODS or the estimator's name, `series` a legend label (all but the swept parameters), `row`
    a table label (all parameters), `brief` the same without how an exact trace was taken. Sorted by task, split,
    method, model, steps, NFE.
    """
    frame = records.copy()
    for name in NUMERIC:
        frame[name] = pd.to_numeric(frame[name], errors="coerce") if name in frame else np.nan
        frame[name] = frame[name].astype("float64")
    for end in ("", "_lo", "_hi"):  # older records do not have them
        frame[f"bpd_mae_all{end}"] = frame[f"bpd_mae_all{end}"].fillna(frame[f"bpd_mae{end}"])
    for name in TEXTS:
        column = frame[name] if name in frame else pd.Series([None] * len(frame), index=frame.index)
        frame[name] = [("" if _missing(v) else str(v)) for v in column]
    for name in NESTED:
        column = frame[name] if name in frame else pd.Series([None] * len(frame), index=frame.index)
        frame[name] = pd.Series(
            [v if isinstance(v, dict) else {} for v in column], index=frame.index, dtype=object
        )
    for name in named(_of_extra()):
        frame[name] = from_extra(frame, name)
    frame["estimator_label"] = frame["estimator_label"].where(
        frame["estimator_label"] != "", frame["estimator"]
    )
    known = frame["cell_id"] != ""
    frame = pd.concat(
        [frame[known].drop_duplicates(["cell_id", "seed", "repeat"], keep="last"), frame[~known]]
    )
    frame = frame.sort_index()
    frame["hardware"] = [
        "" if math.isnan(seconds) else str(extra.get("hardware") or "")
        for seconds, extra in zip(frame["wall_s_median"], frame["extra"], strict=True)
    ]
    frame = _newest(frame)
    mixed = [name for name in ("dtype", "device", "dequant_noise") if len(set(frame[name])) > 1]
    mixed += ["hardware"] if len(machines(frame)) > 1 else []
    mixed += ["extractor"] if _several_extractors(frame) else []
    rows = as_dicts(frame)
    frame["method"] = pd.Series([method_of(row) for row in rows], index=frame.index, dtype=object)
    frame["series"] = pd.Series(
        [_label(row, mixed, swept=True) for row in rows], index=frame.index, dtype=object
    )
    frame["row"] = pd.Series(
        [_label(row, mixed, swept=False) for row in rows], index=frame.index, dtype=object
    )
    frame["brief"] = [brief(label) for label in frame["row"]]
    return _sorted(frame)


def _of_extra() -> tuple[Column, ...]:
    """Columns of `extra` that the table of accuracy and cost shows: the suite's, and those of registered measures."""
    return (BY_NAME["bpd_iw"], *own_columns())


def _newest(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame without results that are no further seed of their cell, with a warning: those of another model, other
    data or another reference than the newest, and of its seed once more."""
    cell = list(CELL)
    rows = frame[frame["status"] == "ok"]
    rows = rows[rows.duplicated(cell, keep=False)].sort_values("created_utc", kind="stable")
    left_out, why = rows.index[:0], ""
    texts = rows.astype(str).fillna("")
    for name in JUDGED if len(rows) else ():
        other = rows.index[texts[name] != texts.groupby(cell)[name].transform("last")]
        left_out, why = left_out.union(other), why or (f"another {name} than" if len(other) else "")
    left_out = left_out.union(rows.index[rows.duplicated([*cell, "seed", "repeat"], keep="last")])
    if len(left_out):
        warnings.warn(
            f"{len(left_out)} records are no further seeds ({why or 'the same as'} in the newest of the cell) and "
            f"were left out, first {frame.loc[left_out[0], 'cell_id']}: keep such runs in folders of their own",
            stacklevel=3,
        )
    return frame.drop(index=left_out)


def _several_extractors(frame: pd.DataFrame) -> bool:
    return any(len(set(part["extractor"]) - {""}) > 1 for _, part in frame.groupby("task"))


def averaged(frame: pd.DataFrame) -> pd.DataFrame:
    """One row per cell: numbers averaged over seeds and repeats, everything else from the first row.

    The column `n_seeds` counts the rows behind each, and those of `SPREAD` have their standard deviation over them
    beside, NaN for a single row, which stays as it is.
    """
    own = _of_extra()
    numeric = [*NUMERIC, *named(own)]
    spread = [*SPREAD, *named(column for column in own if column.over_seeds)]
    frame = frame.assign(n_seeds=1.0, **{f"{name}_sd": math.nan for name in spread})
    doubled = frame.duplicated(list(CELL), keep=False)
    if not doubled.any():
        return frame
    parts = [frame[~doubled]]
    for _, group in frame[doubled].groupby(list(CELL), dropna=False, sort=False):
        row = group.head(1).copy()
        row[numeric] = group[numeric].mean().to_numpy()
        row["n_seeds"] = float(len(group))
        for name in spread:
            row[f"{name}_sd"] = float(group[name].std(ddof=1))
        row["extra"] = pd.Series([_extra_over_seeds(list(group["extra"]))], index=row.index, dtype=object)
        parts.append(row)
    return _sorted(pd.concat(parts))


def _extra_over_seeds(extras: list[dict[str, Any]]) -> dict[str, Any]:
    """The first row's `extra` with mean and standard deviation of the numbers that all rows have."""
    found = dict(extras[0])
    for name in SPREAD_EXTRA:
        values = [value for extra in extras if isinstance(value := extra.get(name), int | float)]
        if len(values) == len(extras):
            found[name], found[f"{name}_sd"] = float(np.mean(values)), float(np.std(values, ddof=1))
    return found


def with_times(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with `ms_per_sample` and `cpu_ms_per_sample`; NaN where nothing was timed."""
    batch = from_extra(frame, "timing_batch")
    return frame.assign(
        ms_per_sample=1e3 / frame["items_per_s"].where(frame["items_per_s"] > 0),
        cpu_ms_per_sample=1e3 * frame["cpu_s_median"] / batch,
    )


def machines(frame: pd.DataFrame) -> list[str]:
    """The hardware that the timed rows of a frame were made on."""
    return sorted(set(frame["hardware"]) - {""})


def of_machine(frame: pd.DataFrame, machine: str) -> pd.DataFrame:
    """The rows that were timed on this hardware, and those that were not timed."""
    return frame[frame["hardware"].isin(["", machine])]


def usable(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows that hold a result."""
    return frame[frame["status"] == "ok"]


def chosen(frame: pd.DataFrame, methods: Sequence[str] = (), tasks: Sequence[str] = ()) -> pd.DataFrame:
    """The rows of these methods (by method or estimator, controls beside them) and tasks; without any, all.

    Raises:
        ValueError: the records have no such method or task.
    """
    for name in tasks:
        if name not in set(frame["task"]):
            raise ValueError(unknown("task of these records", name, sorted(set(frame["task"]))))
    of_method = frame["method"].isin(methods) | frame["estimator"].isin(methods)
    known = set(frame["method"]) | set(frame["estimator"])
    for name in methods:
        if name not in known:
            raise ValueError(unknown("method of these records", name, sorted(known)))
    if methods:
        frame = frame[of_method | (frame["method"] == "control")]
    return frame[frame["task"].isin(tasks)] if tasks else frame


def _sorted(frame: pd.DataFrame) -> pd.DataFrame:
    rank = {name: k for k, name in enumerate(METHODS)}
    known = {name: k for k, name in enumerate(SPLIT_ORDER)}
    keys = pd.DataFrame(
        {
            "task": frame["task"],
            "split": [(known.get(s, len(known))) for s in frame["split"]],
            "method": [rank.get(m, len(rank) - 1.5) for m in frame["method"]],
            "model": frame["model"],
            "series": frame["series"],
            "steps": frame["steps"].fillna(np.inf),
            "nfe": frame["nfe_mean"].fillna(np.inf),
        },
        index=frame.index,
    )
    order = keys.sort_values(list(keys.columns), kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def by_task_and_split(usable: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Task, split and their rows, tasks by name."""
    for task in sorted(usable["task"].unique()):
        of_task = usable[usable["task"] == task]
        for split in labels.splits(of_task):
            yield str(task), split, of_task[of_task["split"] == split]
