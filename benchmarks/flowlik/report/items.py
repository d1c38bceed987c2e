"""The per-item arrays beside a record."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowlik.records.writing import read_arrays


def items(run_dir: Path, cell_id: str) -> dict[str, NDArray[Any]]:
    """Arrays kept beside a record (`items/<cell_id>.npz`); empty where there are none, or with a warning where
    they cannot be read."""
    path = run_dir / "items" / f"{cell_id}.npz"
    if not cell_id or Path(cell_id).name != cell_id:
        return {}
    try:
        return read_arrays(path) if path.is_file() else {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{' '.join(str(error).split())}; its items are left out", stacklevel=2)
        return {}


def estimate_and_reference(
    stored: dict[str, NDArray[Any]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """log-densities and their references in nats, both (draws, n); NaN where invalid or not known, (1, 0) without any.

    `stored` holds the arrays of `items`; where it keeps every dequantisation draw, those are taken.
    """
    nothing = np.empty((1, 0))
    estimate, ref = stored.get("log_prob_draws"), stored.get("ref_draws")
    if estimate is None or ref is None:
        estimate, ref = stored.get("log_prob"), stored.get("ref")
    if estimate is None or ref is None or estimate.shape != ref.shape or estimate.ndim not in (1, 2):
        return nothing, nothing
    valid = stored.get("valid", np.ones(estimate.shape[-1], dtype=bool))
    usable = np.isfinite(estimate) & (valid if valid.shape == estimate.shape[-1:] else True)
    estimate = np.where(usable, estimate, np.nan).astype(np.float64)
    return np.atleast_2d(estimate), np.atleast_2d(np.where(np.isfinite(ref), ref, np.nan).astype(np.float64))
