"""Rows that contradict themselves: numbers that no run writes, as where a record was edited by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flowlik.records.columns import TABLE

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = 1e-6
"""Relative difference by which two columns that say the same may differ."""

INTERVALS = tuple(column.name[:-3] for column in TABLE if column.name.endswith("_lo"))


def without_contradictions(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of records whose results can be so, with a warning that says of the others why not."""
    wrong = (frame["status"] == "ok") & False
    for why, found in _rules(frame):
        found &= (frame["status"] == "ok") & ~wrong
        if found.any():
            warnings.warn(
                f"{int(found.sum())} records contradict themselves ({why}) and were left out, first "
                f"{frame.loc[found, 'cell_id'].iloc[0]}: run these cells again",
                stacklevel=3,
            )
        wrong |= found
    return frame[~wrong].reset_index(drop=True) if wrong.any() else frame


def _rules(frame: pd.DataFrame) -> Iterator[tuple[str, pd.Series[bool]]]:
    """What cannot be, and the rows in which it is; what is not known contradicts nothing."""
    for column in TABLE:
        if column.low is not None:
            yield f"{column.name} below {column.low:g}", frame[column.name] < column.low
        if column.high is not None:
            yield f"{column.name} above {column.high:g}", frame[column.name] > column.high
    for name in INTERVALS:
        yield f"{name}_lo above {name}_hi", _less(frame[f"{name}_hi"], frame[f"{name}_lo"])
    bias, spent = frame["bpd"] - frame["bpd_ref"], frame["vjp_mean"] + frame["jvp_mean"] + frame["nfe_mean"]
    bias[frame["ref_se"] > 0] = float("nan")  # a solved reference may know fewer items than were answered
    yield "bpd_error is not bpd - bpd_ref", _differ(frame["bpd_error"], bias, 1.0 + frame["bpd"].abs())
    yield "bpd_mae below |bpd_error|", _less(frame["bpd_mae"], frame["bpd_error"].abs())
    yield "bpd_rmse below bpd_mae", _less(frame["bpd_rmse"], frame["bpd_mae"])
    yield "nfe_max below nfe_mean", _less(frame["nfe_max"], frame["nfe_mean"])
    yield "work is not nfe_mean + vjp_mean + jvp_mean", _differ(frame["work"], spent, 1.0 + spent)


def _less(value: pd.Series[float], least: pd.Series[float]) -> pd.Series[bool]:
    return value < least - ROUNDING * (1.0 + least.abs())


def _differ(value: pd.Series[float], other: pd.Series[float], size: pd.Series[float]) -> pd.Series[bool]:
    return (value - other).abs() > ROUNDING * size
