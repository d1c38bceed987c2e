"""One call of an estimator: what it is given (`Run`) and what it answers (`Estimate`, `Samples`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

from flowlik_estimators.counting import Cost, Counts
from flowlik_estimators.grids import time_grid
from flowlik_estimators.model_checks.answers import described, mapped
from flowlik_models.interfaces import Source, VelocityField
from flowlik_models.numerics import random
from flowlik_models.numerics.standard_normal import standard_normal_log_prob as standard_normal_log_prob
from flowlik_models.numerics.streams import PROBE_STREAM as PROBE_STREAM
from flowlik_models.numerics.streams import SAMPLE_STREAM

Status = Literal["ok", "diverged", "refused"]
Noise = Literal["rademacher", "gaussian"]
Condition = Tensor | Mapping[str, Tensor] | None
"""What a model is conditioned on: a tensor, or several by name, one row an item."""


class Diverged(Exception):  # noqa: N818 - an outcome, turned into a status, never seen by a caller
    """Raised inside an estimator when a call cannot be finished; its message becomes ``reason``.

    ``rows`` (batch,) bool: those that were found to be the cause; ``suspicion`` (batch,): how likely each is to be.
    ``explained``: the message says what is wrong with the model.
    """

    def __init__(
        self,
        message: str,
        *,
        rows: Tensor | None = None,
        suspicion: Tensor | None = None,
        explained: bool = False,
    ) -> None:
        super().__init__(message)
        self.rows, self.suspicion, self.explained = rows, suspicion, explained


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The answer of `Estimator.log_prob`.

    ``log_prob`` (batch,) float64 nats, not finite where there is no value; ``stderr`` (batch,) the estimator's own
    standard error or None; ``error`` (batch,) all of its own error, that of rule and solver with it, where
    `flowlik_estimators.with_error` asked for it, or None; ``cost`` per sample; ``valid`` (batch,) bool; ``status`` of
    the call: ok if any item is valid; ``reason`` one line when it is not ok or fell short of what was asked; ``extra``
    tensors of the family's own, stored with the record.
    """

    log_prob: Tensor
    stderr: Tensor | None = None
    error: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    valid: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    status: Status = "ok"
    reason: str | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The answer of `Estimator.sample`: ``x`` (n, *event), ``log_prob`` (n,) float64 or None; the rest as above."""

    x: Tensor
    log_prob: Tensor | None = None
    cost: Cost = field(default_factory=Cost)
    valid: Tensor = field(default_factory=lambda: torch.ones((), dtype=torch.bool))
    status: Status = "ok"
    reason: str | None = None


Answer = TypeVar("Answer", Estimate, Samples)


def checked_answer(name: str, answer: Answer, kind: type[Answer], batch: int) -> Answer:
    """What a family answered for so many rows; ValueError where a number would be another row's, or none at all."""
    if not isinstance(answer, kind):
        raise ValueError(f"{name}: answered {described(answer)}, expected {kind.__name__}(...)")
    for part in ("log_prob", "stderr", "error"):
        value = getattr(answer, part, None)
        if value is None and (part, kind) != ("log_prob", Estimate):
            continue
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.shape != (batch,):
            raise ValueError(
                f"{name}: its {part} is {described(value)}, expected floating-point numbers of shape ({batch},)"
            )
    valid = answer.valid
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.shape not in ((), (batch,)):
        raise ValueError(f"{name}: its valid is {described(valid)}, expected bool of shape ({batch},) or ()")
    if answer.status not in get_args(Status):
        raise ValueError(
            f"{name}: its status is {answer.status!r}, expected one of {', '.join(get_args(Status))}"
        )
    return answer


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one call hands to a family besides the model and x."""

    batch: int
    event_shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    cond: Any
    key: int
    items: Tensor
    differentiable: bool
    data_end: float
    counts: Counts
    first_time: float = 0.0
    law: Source | None = None
    read: set[str] = field(default_factory=set)
    """What the family has read of `noise_end` and `source_log_prob`."""

    @property
    def noise_end(self) -> float:
        """The time at which the source stands: 0, or the model's noisy end."""
        self.read.add("noise_end")
        return self.first_time

    def source_log_prob(self, x: Tensor) -> Tensor:
        """Log-density of the source at x (batch, *event), (batch,) float64 nats: N(0, I), or the model's own."""
        self.read.add("source_log_prob")
        if self.law is None:
            return standard_normal_log_prob(x)
        value = self.law.log_prob(x)
        return self._shaped(value, x.shape[:1], "source's log_prob").double()

    def zeros(self) -> Tensor:
        """A float64 accumulator, (batch,)."""
        return torch.zeros(self.batch, dtype=torch.float64, device=self.device)

    def at(self, t: float | Tensor) -> Tensor:
        """The time t as models want it: (batch,) in x's dtype and on its device, where a number is not copied to."""
        if not isinstance(t, Tensor) or (t.ndim == 0 and t.device.type == "cpu" != self.device.type):
            return torch.full((self.batch,), float(t), dtype=self.dtype, device=self.device)
        return t.to(self.device, self.dtype).expand(self.batch).contiguous()

    def times(self, grid: str, steps: int, start: float, end: float) -> list[float]:
        """A time grid rounded to x's dtype, so that s - t is the same here and inside the model."""
        return list(_rounded_times(grid, steps, start, end, self.dtype))

    def source(self) -> Tensor:
        """Starting points of the source, (batch, *event), keyed by item."""
        normal = random.gaussian(
            self.key,
            self.items,
            self.event_shape,
            stream=SAMPLE_STREAM,
            dtype=self.dtype,
            device=self.device,
        )
        if self.law is None:
            return normal
        drawn = (
            self.law.from_normal(normal) if hasattr(self.law, "from_normal") else self._one_by_one(self.law)
        )
        return self.event(drawn, "source's draw").to(self.device)

    def _one_by_one(self, law: Source) -> Tensor:
        """Draws of a law that knows only ``sample``, a generator a row so that the draws are keyed by item."""
        unit = random.uniform(self.key, self.items, (), stream=SAMPLE_STREAM, dtype=torch.float64)
        seeds = [int(u * 2**53) for u in unit.flatten().tolist()]
        return torch.cat([law.sample(1, torch.Generator().manual_seed(seed)) for seed in seeds])

    def rows(self, index: Tensor) -> Run:
        """The same call for some of its items; costs add up in the same counts."""
        items = self.items[index.to(self.items.device)]
        return replace(self, batch=len(index), items=items, cond=self.condition(index))

    def condition(self, rows: slice | Tensor) -> Any:
        """The condition of some of the items."""
        return mapped(self.cond, lambda value: value[rows])

    def repeated(self, times: int) -> Run:
        """The same call on ``times`` copies of its items, one copy after the other; costs add up in the same counts."""
        cond = mapped(self.cond, lambda value: torch.cat([value] * times))
        return replace(self, batch=times * self.batch, items=self.items.repeat(times), cond=cond)

    def probes(self, count: int, noise: Noise, *, stream: int = PROBE_STREAM) -> Tensor:
        """Probe vectors with E[e e^T] = I, (batch, count, *event), keyed by item and stream."""
        draw = {"rademacher": random.rademacher, "gaussian": random.gaussian}[noise]
        return draw(
            self.key,
            self.items,
            (count, *self.event_shape),
            stream=stream,
            dtype=self.dtype,
            device=self.device,
        )

    def velocity(self, model: VelocityField, x: Tensor, t: Tensor) -> Tensor:
        """The model's velocity at x (batch, *event) and t (batch,), with this call's condition, shape checked."""
        return self.event(model.velocity(x, t, cond=self.cond), "velocity")

    def event(self, value: Tensor, what: str) -> Tensor:
        """A model's (batch, *event) answer in x's dtype; ValueError where the shape is another, never a broadcast."""
        return self._shaped(value, (self.batch, *self.event_shape), what).to(self.dtype)

    def scalar(self, value: Tensor, what: str) -> Tensor:
        """A model's (batch,) answer in float64; ValueError where the shape is another, never a broadcast."""
        return self._shaped(value, (self.batch,), what).double()

    def _shaped(self, value: Tensor, shape: Sequence[int], what: str) -> Tensor:
        if value.shape != tuple(shape):
            raise ValueError(f"the model's {what} has shape {tuple(value.shape)}, expected {tuple(shape)}")
        return value

    def stepped(self, accepted: bool = True) -> None:
        """Note one solver step of the whole batch."""
        if accepted:
            self.counts.accepted_steps += self.batch
        else:
            self.counts.rejected_steps += self.batch


@lru_cache(maxsize=64)
def _rounded_times(grid: str, steps: int, start: float, end: float, dtype: torch.dtype) -> tuple[float, ...]:
    return tuple(time_grid(grid, steps, start, end).to(dtype).tolist())


def mean_over_probes(log_probs: Tensor, population: int | None = None) -> tuple[Tensor, Tensor | None]:
    """Mean and standard error over the probes of (batch, probes) values; no error from a single probe.

    ``population``: the probes were drawn without replacement from so many, whose mean is the truth.

    >>> mean, stderr = mean_over_probes(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    >>> round(float(mean), 3), round(float(stderr), 3)
    (2.5, 0.645)
    """
    probes = log_probs.shape[1]
    drawn = 0.0 if population is None else probes / population
    if probes == 1:
        return log_probs[:, 0], log_probs.new_zeros(len(log_probs)) if drawn == 1.0 else None
    return log_probs.mean(1), log_probs.std(1) * math.sqrt((1.0 - drawn) / probes)
