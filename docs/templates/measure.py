"""A measure: a function on the items of a cell, and the columns it fills; every record, table and report has them."""

import math

import numpy as np

from flowlik.measures import Column, JudgedItems, Measure


def half_of_the_errors(items: JudgedItems) -> dict[str, float]:
    """The median of |error|; unlike the mean it does not notice a few items that are far off.

    Arrays are (n,) in bits/dim, NaN where estimator or reference has no value: `bpd`, `ref`, `errors` (their
    difference) and `stderr`, which is None where the estimator gives none.
    """
    known = np.abs(items.errors[~np.isnan(items.errors)])
    return {"bpd_err_median": float(np.median(known)) if len(known) else math.nan}  # a value for each column


MEDIAN_ERROR = Measure(
    columns=(
        Column(
            "bpd_err_median",  # its key in `extra` of a record, its column in frames and in the CSV
            "Half of the items have a smaller absolute error.",  # the report's glossary, the list of columns
            unit="bits/dim",
            better="less",  # or more, zero, one; left out: neither
            head="median |error|",  # over its column in the tables; left out: not there
            digits=2,
            over_seeds=True,  # its standard deviation over seeds stands with the mean
            tolerance=1e-3,  # `flowlik compare` prints a larger relative difference
        ),
    ),
    compute=half_of_the_errors,
)
