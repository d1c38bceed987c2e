"""Two runs compared: the same cells, item by item.

Cells are matched by estimator label, task, model and split. Over the items that both have (of a split a cell takes the
first ones) the difference of the absolute errors (new minus base, bits/dim) gets a paired bootstrap interval; where
their items differ, or a cell is in one run only, the row says so in `note` and claims nothing. Two methods of one run
are compared in the same way.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from flowlik.measures.bootstrap import bootstrap_intervals
from flowlik.measures.registry import own_columns
from flowlik.records.columns import SAME_CELL, TABLE, Column
from flowlik.records.reading import read_records
from flowlik.report import frame as frames
from flowlik.report import items, numbers
from flowlik.report.labels import as_dicts
from flowlik_models.names import unknown

KEYS: Final = ("estimator_label", "task", "model", "split")
OPTIONS: Final = tuple(name for name in SAME_CELL if name not in KEYS)
"""Beyond the keys: told apart only where a run holds the same cell with several of them."""

ITEMS: Final = "n_items"
"""Two cells that differ in this alone are compared on the items that both have."""

SIDES: Final = ("base", "new")

PAIRED: Final = {column.compared: column for column in TABLE if column.compared and column.tolerance}
"""What is compared item by item, by its name here; a difference below its share `tolerance` of the error itself (of
bits/dim without a reference) is rounding, not a finding."""

OTHERS: Final = {column.compared: column for column in TABLE if column.compared and not column.tolerance}
"""What both runs say, side by side."""

COLUMNS: Final[tuple[str, ...]] = (
    *(*KEYS, "n_paired"),
    *(f"{name}_{end}" for name in PAIRED for end in (*SIDES, "diff", "diff_lo", "diff_hi")),
    "significant",
    *(f"{name}_{side}" for name in (*OTHERS, "status") for side in SIDES),
    "note",
)

ROUNDING: Final = 1e-9
SAME_ERROR: Final = 1e-6
"""Relative difference between a record's errors and the means of its items that rounding makes."""
SAME_REFERENCE: Final = 1e-6
"""Nats by which references of the same items may differ (float32 rounding of a stored array aside)."""


def compare_runs(base: Path, new: Path) -> pd.DataFrame:
    """Paired differences between two runs, one row per cell of either.

    Args:
        base: folder of the older run. new: folder of the newer run; each with `records.jsonl` and `items/`.

    Returns:
        A frame with COLUMNS, then those of registered measures. `mae_diff` is the mean over items of |error| in `new`
        minus |error| in `base` (negative: better), `bpd_diff` the same for bits/dim; `_lo` and `_hi` 95 % bootstrap
        intervals over the items. `significant` says that the interval of `mae_diff` leaves out 0 (of `bpd_diff` where
        no reference is known) and that the difference is more than the column's `tolerance`; it is not corrected for
        the number of rows.

    Raises:
        FileNotFoundError: a folder holds no records.
    """
    rows: list[dict[str, Any]] = []
    old, fresh = _cells(base), _cells(new)
    for key in [*old, *(key for key in fresh if key not in old)]:
        befores, afters = old.get(key, []), fresh.get(key, [])
        for before, after in _paired(befores, afters):
            rows.append(_compare(key, before, base, after, new))
    return pd.DataFrame(rows, columns=_all_columns())


def _all_columns() -> list[str]:
    return [*COLUMNS, *(f"{column.name}_{side}" for column in own_columns() for side in SIDES)]


def compare_methods(run_dir: Path, first: str, second: str) -> pd.DataFrame:
    """Paired differences between two methods of one run, one row per task and split that has both (and per seed,
    repeat, dtype and device, where there are several).

    Args:
        run_dir: folder of the run. first: the base, as its estimator's label (`f2d2[steps=4]`), or as label and model
            (`f2d2[steps=4]@direct-f2d2`); without a model every one it was run on. second: what is held against it.

    Returns:
        A frame as `compare_runs` gives; labels and models that differ stand as `base -> new`.

    Raises:
        ValueError: the run has no such method, or no task and split with both.
    """
    rows = as_dicts(frames.prepare(read_records(run_dir)))
    bases, news = _of_method(rows, first), _of_method(rows, second)
    found = []
    for place, befores in _grouped(bases).items():
        for other, afters in _grouped(news).items():
            for before, after in _paired(befores, afters) if other[:2] == place[:2] else ():
                if before and after and before["cell_id"] != after["cell_id"]:
                    key = tuple(_changed(str(before[name]), str(after[name])) for name in KEYS)
                    found.append(_compare(key, before, run_dir, after, run_dir))
    if not found:
        raise ValueError(f"{first} and {second} are on no common task and split of {run_dir}")
    return pd.DataFrame(found, columns=_all_columns())


def _grouped(rows: list[dict[str, Any]]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Rows of one method by task, split and model."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["task"], row["split"], row["model"]), []).append(row)
    return found


def _of_method(rows: list[dict[str, Any]], method: str) -> list[dict[str, Any]]:
    label, _, model = method.partition("@")
    found = [row for row in rows if row["estimator_label"] == label and model in ("", row["model"])]
    if not found:
        valid = {
            f"{row['estimator_label']}@{row['model']}" if model else row["estimator_label"] for row in rows
        }
        raise ValueError(unknown("method of this run", method, sorted(valid)))
    return found


def _changed(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def summary(frame: pd.DataFrame) -> str:
    """A comparison as lines for a terminal: cells that differ first, then the counts of the others.

    `frame` is what `compare_runs` gives.
    """
    lines = []
    differing = frame[frame["significant"] | (frame["status_base"] != frame["status_new"])]
    for row in as_dicts(differing):
        name = _name(row)
        if row["note"]:
            lines.append(f"{name}: {row['note']} ({row['status_base']} -> {row['status_new']})")
            continue
        kind = _decided(row)
        unit = "|error|" if kind == "mae" else "bits/dim"
        better = "" if kind == "bpd" else "better: " if row["mae_diff"] < 0 else "worse: "
        before, after = numbers.number(row[f"{kind}_base"]), numbers.number(row[f"{kind}_new"])
        low, high = numbers.number(row[f"{kind}_diff_lo"], 2), numbers.number(row[f"{kind}_diff_hi"], 2)
        lines.append(
            f"{name}: {better}{unit} {before} -> {after} "
            f"(difference {numbers.number(row[f'{kind}_diff'], 2)}, 95 % [{low}, {high}], {row['n_paired']} items)"
        )
    lines += _own_differences(frame)
    paired = frame[frame["n_paired"] > 0]
    lines.append(
        f"{len(frame)} cells, {len(paired)} paired item by item, {int(frame['significant'].sum())} differ significantly"
    )
    for note, count in frame.loc[frame["note"] != "", "note"].value_counts().items():
        lines.append(f"{count} not compared: {note}")
    return "\n".join(lines)


def _own_differences(frame: pd.DataFrame) -> list[str]:
    """A line for each cell in which a registered measure says another thing, beyond its tolerance."""
    lines = []
    for column in own_columns():
        for row in as_dicts(frame):
            before, after = (row[f"{column.name}_{side}"] for side in SIDES)
            if _differs(column, after - before, max(abs(before), abs(after), ROUNDING)):
                values = f"{numbers.number(before)} -> {numbers.number(after)}"
                lines.append(f"{_name(row)}: {column.head or column.name} {values}")
    return lines


def _name(row: dict[str, Any]) -> str:
    return f"{row['task']} ({row['split']}) · {row['model']} · {row['estimator_label']}"


def _cells(run_dir: Path) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in as_dicts(frames.prepare(read_records(run_dir))):
        found.setdefault(tuple(row[name] for name in KEYS), []).append(row)
    return found


def _paired(
    befores: list[dict[str, Any]], afters: list[dict[str, Any]]
) -> list[tuple[dict[str, Any] | None, dict[str, Any] | None]]:
    """Rows of the same cell side by side: by their options where there are several, None for what is missing."""
    if len(befores) <= 1 and len(afters) <= 1:
        return [(befores[0] if befores else None, afters[0] if afters else None)]
    left = {_options(row): row for row in befores}
    right = {_options(row): row for row in afters}
    pairs: list[tuple[dict[str, Any] | None, dict[str, Any] | None]]
    pairs = [(left[key], right[key]) for key in left if key in right]
    waiting: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, row in right.items():
        if key not in left:
            waiting.setdefault(_options(row, ITEMS), []).append(row)
    for key, row in left.items():
        if key not in right:
            others = waiting.get(_options(row, ITEMS))
            pairs.append((row, others.pop() if others else None))
    return [*pairs, *((None, row) for rows in waiting.values() for row in rows)]


def _options(row: dict[str, Any], without: str = "") -> tuple[str, ...]:
    return tuple(str(row[name]) for name in OPTIONS if name != without)


def _compare(
    key: tuple[str, ...], before: dict[str, Any] | None, base: Path, after: dict[str, Any] | None, new: Path
) -> dict[str, Any]:
    row: dict[str, Any] = dict(zip(KEYS, key, strict=True)) | {
        "n_paired": 0,
        "significant": False,
        "note": "",
    }
    shown = {name: column.name for name, column in (PAIRED | OTHERS).items()}
    shown |= {column.name: column.name for column in own_columns()}
    for side, known in zip(SIDES, (before, after), strict=True):
        row |= {f"{name}_{side}": known[source] if known else math.nan for name, source in shown.items()}
        row[f"status_{side}"] = known["status"] if known else "absent"
    for name in PAIRED:
        row |= {f"{name}_diff{end}": math.nan for end in ("", "_lo", "_hi")}
    if before is None or after is None:
        return row | {"note": f"only in {'new' if before is None else 'base'}"}
    if before["status"] != "ok" or after["status"] != "ok":
        return row | {"note": "" if before["status"] == after["status"] else "status changed"}
    bits = 1.0 / (before["dim"] * math.log(2.0)) if before["dim"] > 0 else math.nan
    estimates_a, refs_a = items.estimate_and_reference(items.items(base, before["cell_id"]))
    estimates_b, refs_b = items.estimate_and_reference(items.items(new, after["cell_id"]))
    errors_a, errors_b = _over_draws(estimates_a - refs_a), _over_draws(estimates_b - refs_b)
    estimates_a, estimates_b, refs_a, refs_b = _common(estimates_a, estimates_b, refs_a, refs_b)
    reason = _why_unpaired(before, after, estimates_a, estimates_b, refs_a, refs_b)
    if reason:
        return row | {"note": reason}
    for known, folder, errors in ((before, base, errors_a), (after, new, errors_b)):
        if _contradicts(known, bits * errors):
            return row | {"note": f"items that are not those of the record {known['cell_id']} in {folder}"}
    row |= _differences("bpd_diff", -bits * (_over_draws(estimates_b) - _over_draws(estimates_a)))
    error_a, error_b = _over_draws(estimates_a - refs_a), _over_draws(estimates_b - refs_b)
    row |= _differences("mae_diff", bits * (np.abs(error_b) - np.abs(error_a)))
    kind = _decided(row)  # of the items that its reference knows, or of all that both answered
    pairs = error_a + error_b if kind == "mae" else _over_draws(estimates_a) + _over_draws(estimates_b)
    row["n_paired"] = int(np.isfinite(pairs).sum())
    size = np.nanmax([before["bpd_mae"], after["bpd_mae"], ROUNDING]) if kind == "mae" else abs(before["bpd"])
    apart = row[f"{kind}_diff_lo"] > 0 or row[f"{kind}_diff_hi"] < 0
    row["significant"] = bool(apart and _differs(PAIRED[kind], row[f"{kind}_diff"], size))
    return row


def _decided(row: dict[str, Any]) -> str:
    """What a difference is judged by: the error where there is a reference, otherwise bits/dim."""
    return "mae" if math.isfinite(row["mae_diff"]) else "bpd"


def _differs(column: Column, difference: float, size: float) -> bool:
    """Whether a difference is more than rounding; never where the column has no tolerance."""
    return column.tolerance is not None and abs(difference) > column.tolerance * abs(size)


def _common(*arrays: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """The draws and items that all of them have: a cell takes the first ones of its split."""
    draws, count = (min(array.shape[axis] for array in arrays) for axis in (0, 1))
    return [array[:draws, :count] for array in arrays]


def _why_unpaired(
    before: dict[str, Any],
    after: dict[str, Any],
    estimates_a: NDArray[np.float64],
    estimates_b: NDArray[np.float64],
    refs_a: NDArray[np.float64],
    refs_b: NDArray[np.float64],
) -> str:
    if estimates_a.size == 0 or estimates_b.size == 0:
        return "no items kept"
    if before["data_hash"] != after["data_hash"]:
        return "other items (data hash)"
    known = np.isfinite(refs_a) & np.isfinite(refs_b)
    if known.any() and not np.allclose(refs_a[known], refs_b[known], rtol=1e-9, atol=SAME_REFERENCE):
        return "other references"
    return ""


def _contradicts(row: dict[str, Any], errors: NDArray[np.float64]) -> bool:
    """Whether a record says other errors than its items, (n,) in bits/dim of log p, have."""
    known = errors[np.isfinite(errors)]
    if known.size == 0:
        return False
    means = {"bpd_mae": np.abs(known).mean(), "bpd_error": -known.mean()}
    return any(abs(row[name] - mean) > SAME_ERROR * (1.0 + abs(mean)) for name, mean in means.items())


def _over_draws(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the dequantisation draws that are known, (n,); NaN where none is."""
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=0)
    return np.asarray(np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan))


def _differences(column: str, values: NDArray[np.float64]) -> dict[str, float]:
    if not np.isfinite(values).any():
        return {}
    ((low, high),) = bootstrap_intervals(values)
    return {column: float(np.nanmean(values)), f"{column}_lo": low, f"{column}_hi": high}
