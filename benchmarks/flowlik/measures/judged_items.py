"""The items of one cell as a measure sees them."""

from __future__ import annotations

from dataclasses import dataclass

from flowlik.measures.arrays import Array


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedItems:
    """Arrays over the n items of a cell, (n,) in bits/dim; means over the dequantisation draws where there are several.

    NaN stands where the estimator gave up (`bpd`), where there is no reference (`ref`), where either is so (`errors`,
    estimate minus reference). `bpd` is the mean over all draws, `ref` and `errors` are those over the draws that have
    a reference: `ref + errors` is the estimate of the same draws.
    """

    bpd: Array
    ref: Array
    errors: Array
    stderr: Array | None
    """The estimator's own standard error of one draw; None where it gives none."""
    dim: int
    """Dimensions of one item: a value times `dim * log(2)` is in nats."""
