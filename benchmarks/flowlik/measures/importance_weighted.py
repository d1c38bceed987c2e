"""Discrete data from several dequantisation draws: the mass of an item's cell instead of the mean of its logarithm.

``P(k) = E_u[p(k + u)] x volume`` over uniform u in the cell (docs/math.md section 13). The mean of log p over draws
bounds log P from below; the logarithm of the mean is nearer, and reaches it as the draws become many.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy
from numpy.typing import NDArray

from flowlik.measures.arrays import Array

ENOUGH_DRAWS = 8
"""Below, nothing is said of cells that hold more than 1."""

FEW_WEIGHTS = 2.0
"""An effective number of draws below this is one draw's weight alone."""


@dataclass(frozen=True, eq=False)
class CellMasses:
    """Logarithms of the masses of n cells, (n,) each: ``variance`` and ``bias`` of these by the jackknife (Efron and
    Stein 1981), ``draws`` the effective number of draws."""

    log_mass: Array
    variance: Array
    bias: Array
    draws: Array


def cell_masses(log_prob: Array, volume: float) -> CellMasses:
    """Of log-densities (draws, n) in nats, at least two draws; ``volume`` is the logarithm of a cell's.

    >>> found = cell_masses(np.log([[0.1, 0.5], [0.3, 0.5]]), volume=0.0)
    >>> np.exp(found.log_mass).round(3).tolist(), found.draws.round(3).tolist()
    ([0.2, 0.5], [1.6, 2.0])
    >>> found.variance.round(3).tolist()
    [0.302, 0.0]
    """
    count = len(log_prob)
    whole = scipy.special.logsumexp(log_prob, axis=0)
    share = np.exp(log_prob - whole)
    left = np.log1p(-np.minimum(share, 1.0 - 1e-12)) + math.log(
        count / (count - 1)
    )  # change without the draw
    return CellMasses(
        log_mass=whole - math.log(count) + volume,
        variance=(count - 1) * left.var(axis=0),
        bias=(count - 1) * left.mean(axis=0),
        draws=1.0 / np.square(share).sum(axis=0),
    )


def importance_weighted(
    log_prob: Array, valid: NDArray[np.bool_], *, dim: int, levels: int
) -> dict[str, float]:
    """Columns of items of discrete data, (draws, n) nats; nothing of a single draw.

    Items of which a draw has no value are left out. Those that one draw decides are counted in `iw_one_draw_share`;
    their jackknife is large, as it should be.
    """
    known = (valid & np.isfinite(log_prob)).all(axis=0)
    if len(log_prob) < 2 or not known.any():
        return {}
    cells = cell_masses(log_prob[:, known], volume=dim * math.log(2.0 / levels))
    unit, n = dim * math.log(2.0), int(known.sum())
    row = {
        "bpd_iw": float(-cells.log_mass.mean() / unit),
        "bpd_iw_error": math.hypot(math.sqrt(cells.variance.sum()) / n, cells.bias.mean()) / unit,
        "iw_one_draw_share": float(np.mean(cells.draws < FEW_WEIGHTS)),
    }
    if len(log_prob) >= ENOUGH_DRAWS:
        error = np.sqrt(cells.variance + np.square(cells.bias))
        row["cells_above_one"] = float(np.mean(cells.log_mass > 1.96 * error))
    return row
