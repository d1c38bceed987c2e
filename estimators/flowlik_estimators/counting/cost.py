"""What a call cost: totals in rows while it runs (`Counts`), numbers per sample when it is done (`Cost`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one estimate cost per sample: network forwards, derivative products, solver steps.

    >>> cost = Cost(forwards=8, vjps=16)
    >>> cost.nfe, cost.work
    (8, 24.0)
    """

    forwards: float | Tensor = 0.0
    vjps: float | Tensor = 0.0
    jvps: float | Tensor = 0.0
    policy_calls: float | Tensor = 0.0
    accepted_steps: float | Tensor = 0.0
    rejected_steps: float | Tensor = 0.0

    @property
    def nfe(self) -> float | Tensor:
        """Network evaluations: forwards only, as published figures count."""
        return self.forwards

    @property
    def work(self) -> float | Tensor:
        """Forwards plus derivative products: exact, the same on every machine, fit for gates."""
        return self.forwards + self.vjps + self.jvps

    def plus(self, other: Cost) -> Cost:
        """The cost of both."""
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})


@dataclass
class Counts:
    """Running totals of one call, in rows; solver steps are whole-batch steps and counted once a row too."""

    forwards: int = 0
    vjps: int = 0
    jvps: int = 0
    policy_calls: int = 0
    accepted_steps: int = 0
    rejected_steps: int = 0

    def reset(self) -> None:
        """Begin anew."""
        for name in vars(self):
            setattr(self, name, 0)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is evaluated in the block is not counted."""
        before = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def per_sample(self, batch: int) -> Cost:
        """The totals over the batch."""
        return Cost(**{name: total / batch for name, total in vars(self).items()})
