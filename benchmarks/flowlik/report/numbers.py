"""Numbers as they are printed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd


def from_extra(frame: pd.DataFrame, *path: str) -> pd.Series[float]:
    """A number out of each row's `extra`, by its path of keys; NaN where there is none."""

    def value(extra: Any) -> float:
        for key in path:
            extra = extra.get(key) if isinstance(extra, dict) else None
        return float(extra) if isinstance(extra, int | float) else math.nan

    return pd.Series([value(extra) for extra in frame["extra"]], index=frame.index, dtype="float64")


def number(value: float, digits: int = 3) -> str:
    """A number for a reader: `digits` significant ones, no exponent between 0.0001 and 99,999, a dash for none.

    >>> number(0.012345), number(123456.0), number(float("nan"))
    ('0.0123', '1.23e5', '–')
    """
    if value is None or not isinstance(value, int | float | np.number) or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size >= 5:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    else:
        text = f"{value:.{max(digits - 1 - size, 0)}f}"
    return text.replace("-", "−")


def with_spread(text: str, spread: Any) -> str:
    """A number's text with its standard deviation over seeds, where there are several."""
    return text if spread is None or math.isnan(spread) else f"{text} ± {number(float(spread), 2)}"


def fixed(value: float, places: int = 3) -> str:
    """A number with fixed decimals (columns that are compared down the page), a dash for none."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:.{places}f}".replace("-", "−")
