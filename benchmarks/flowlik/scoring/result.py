"""What a score says: the number, its two errors, what it cost, and how it was found."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowlik.measures.arrays import Array


@dataclass(frozen=True, kw_only=True)
class EstimatorError:
    """The estimator's own error of the mean, bits/dim.

    ``bias``: of solver and rule, as the pilot's items show it; the number is not corrected by it. ``bar``: half the
    95 % width of what is unknown, of the probes and of the bias. NaN where nothing converged is known.
    """

    bias: float
    bar: float

    @property
    def stated(self) -> float:
        """Half the 95 % width of the whole error: the bias's size and the bar."""
        return abs(self.bias) + self.bar


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's mean bits/dim on some items; prints as one line.

    ``bpd``, its standard error over the items ``se``, the estimator's own ``error``; ``per_item`` (n,) bits/dim, NaN
    without a value. ``nfe``: network evaluations an item, ``work``: these and derivative products, both of the scoring;
    ``pilot_work``: evaluations and products of the pilot, over all items. ``estimator``: its spelling on the command
    line, ``why`` it was chosen. ``reached``: whether the stated error is within the accuracy asked for; ``shortfall``
    says what would reach it. ``findings`` of the examination, which change no number. ``flagged``: items whose
    importance-weighted value rests on fewer than two draws. ``draws``: dequantisations of an item of discrete data,
    of which a single one gives a bound; None of continuous data.
    """

    name: str
    bpd: float
    se: float
    error: EstimatorError
    per_item: Array
    nfe: float
    work: float
    pilot_work: float
    seconds: float
    estimator: str
    why: str
    reached: bool = True
    shortfall: str | None = None
    findings: list[str] = field(default_factory=list)
    flagged: int = 0
    missing: int = 0
    draws: int | None = None

    @property
    def _kind(self) -> str:
        if self.draws is None:
            return ""
        return " (bound)" if self.draws == 1 else f" (importance-weighted, {self.draws} draws)"

    def __str__(self) -> str:
        bias = "" if not abs(self.error.bias) >= 5e-5 else f", bias {self.error.bias:+.4f}"
        notes = [
            f"{self.name}: {self.bpd:.4f} bits/dim{self._kind}",
            f"standard error {self.se:.4f} (data, {len(self.per_item)} items)",
            f"error {self.error.stated:.4f} (estimator{bias})",
            f"{self.nfe:.3g} evaluations and {self.work - self.nfe:.3g} products an item",
            f"{self.seconds:.1f} s",
            self.estimator,
        ]
        notes += [self.shortfall] if self.shortfall else []
        notes += [f"{self.missing} items have no value"] if self.missing else []
        notes += [f"{self.flagged} items rest on fewer than two draws"] if self.flagged else []
        notes += [f"examination: {'; '.join(self.findings)}"] if self.findings else []
        return "; ".join(notes)
