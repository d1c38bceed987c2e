"""How far a diffusion's likelihood is from that of the same network's ODE, sample by sample."""

from __future__ import annotations

import math

import numpy as np

from flowlik.measures.arrays import Array


def bound_gap(errors: Array, stderr: Array | None) -> dict[str, float]:
    """Columns of the gap between an estimate of the one and the reference of the other.

    ``errors`` (n,) in bits/dim, estimate minus reference; ``stderr`` (n,), those of the estimate's own noise, which is
    taken off the spread. NaN is left out.

    >>> gap = bound_gap(np.array([0.1, 0.3, 0.2, 0.2]), None)
    >>> {name: round(value, 4) for name, value in gap.items()}
    {'ode_gap': 0.2, 'ode_gap_se': 0.0408, 'ode_gap_sd': 0.0816}
    """
    known = np.isfinite(errors) & (True if stderr is None else np.isfinite(stderr))
    if known.sum() < 2:
        return {}
    found = errors[known]
    noise = 0.0 if stderr is None else float(np.mean(stderr[known] ** 2))
    variance = float(found.var(ddof=1))
    return {
        "ode_gap": float(found.mean()),
        "ode_gap_se": math.sqrt(variance / len(found)),
        "ode_gap_sd": math.sqrt(max(variance - noise, 0.0)),
    }
