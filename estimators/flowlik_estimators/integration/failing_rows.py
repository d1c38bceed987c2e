"""Rows that make a call fail are set aside, so that the others are answered.

An adaptive solver has one step size for the whole batch: a single row whose velocity is NaN, or that is too stiff, ends
the solve for all. Where the failure says which rows it was, these are left out; where it only says which are suspect,
the eighth that is most so is tried apart from the rest; else the batch is halved, as where memory runs out. Each row is
charged the evaluations of all batches that it was in.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from flowlik_estimators.call import Diverged, Estimate, Run, Samples
from flowlik_estimators.counting import METHODS, POLICY_METHODS, Cost, Counts
from flowlik_models.numerics.finite import all_finite

A = TypeVar("A", Estimate, Samples)
Attempt = Callable[[Run, Tensor | None, bool], A]
"""The answer for a part of a call: its run, which rows of the whole these are (None: all), and whether to `watched`."""

ATTEMPTS = 64
"""Batches that are tried before the rows that are left are given up with the others."""

LONE, FROM = 4, 16
"""Of at least `FROM` rows of which nothing is known, so many are tried alone: where all fail, it is not a few rows."""

SUSPECTS = 8
"""One in so many rows is suspect where rows can be ranked."""


class Unanswered(Exception):  # noqa: N818 - an outcome, turned into a status, never seen by a caller
    """No row of a call could be answered; ``cost`` is what was spent."""

    def __init__(self, reason: str, cost: Cost) -> None:
        super().__init__(reason)
        self.cost = cost


def answered(attempt: Attempt[A], run: Run) -> tuple[A, Cost, bool]:
    """The answer for all rows, NaN in those that have none; what it cost; whether all are known to be finite.

    Raises:
        Unanswered: no row has an answer.
    """
    search = _Search(attempt, run)
    try:
        answer = attempt(run, None, False)
    except Diverged as failure:
        search.charge(run.counts, torch.arange(run.batch))
        answer = search.apart(failure)
    else:
        search.charge(run.counts, None)
        answer = search.named(answer)
    return answer, search.cost(), search.whole


def watched(model: Any) -> Any:
    """The model, which raises `Diverged` with the method and the time where it answers NaN or infinity to finite x."""
    return _Watched(model)


@dataclass
class _Search(Generic[A]):
    attempt: Attempt[A]
    run: Run
    spent: list[tuple[Counts, Tensor | None]] = field(default_factory=list)
    failed: list[tuple[Tensor, Diverged]] = field(default_factory=list)
    done: list[tuple[Tensor, A]] = field(default_factory=list)
    tried: int = 0
    whole: bool = False

    def charge(self, counts: Counts, rows: Tensor | None) -> None:
        """Note what was spent on rows; None: on all."""
        self.spent.append((counts, rows))

    def cost(self) -> Cost:
        """Per sample: a number where all rows were in one batch, (batch,) elsewhere."""
        if len(self.spent) == 1:
            return self.spent[0][0].per_sample(self.run.batch)
        totals = {f.name: torch.zeros(self.run.batch, dtype=torch.float64) for f in fields(Counts)}
        for counts, rows in self.spent:
            rows = torch.arange(self.run.batch) if rows is None else rows
            for name, total in totals.items():
                total[rows] += getattr(counts, name) / len(rows)
        return Cost(**{name: total.to(self.run.device) for name, total in totals.items()})

    # --- rows that end the call of all ---

    def apart(self, failure: Diverged) -> A:
        """The answer of all rows that can be answered without those that made it fail."""
        self._split(torch.arange(self.run.batch), failure, first=True)
        if not self.done:
            why = self._why()
            raise Unanswered(why, self.cost()) from failure
        return self._joined()

    def _split(self, rows: Tensor, failure: Diverged, *, first: bool = False) -> None:
        if len(rows) == 1 or self.tried >= ATTEMPTS:
            self.failed.append((rows, failure))
            return
        bad, score = _of_length(failure.rows, len(rows)), _of_length(failure.suspicion, len(rows))
        if bad is not None:
            self.failed.append((rows[bad], failure))
            if not bool(bad.all()):
                self._try(rows[~bad])
            return
        if first and len(rows) >= FROM:
            rest = self._without_lone(rows)
            if not self.done:
                self.failed.append((rows[rest], failure))
                return
            rows, score = rows[rest], None if score is None else score[rest]
        for part in _parts(rows, score):
            self._try(part)

    def _without_lone(self, rows: Tensor) -> Tensor:
        """Which rows are left (bool) when a few have been tried alone."""
        lone = torch.linspace(0, len(rows) - 1, LONE).long()
        for row in rows[lone]:
            self._try(row[None])
        return ~torch.isin(torch.arange(len(rows)), lone)

    def _try(self, rows: Tensor) -> None:
        part = self._part(rows)
        self.tried += 1
        try:
            answer = self.attempt(part, rows, False)
        except Diverged as failure:
            self.charge(part.counts, rows)
            self._split(rows, failure)
        else:
            self.charge(part.counts, rows)
            self.done.append((rows, answer))

    def _part(self, rows: Tensor) -> Run:
        return replace(self.run.rows(rows.to(self.run.device)), counts=Counts())

    def _joined(self) -> A:
        why = f"{sum(len(rows) for rows, _ in self.failed)} of {self.run.batch} rows have no value: {self._why()}"
        rows = torch.cat([rows for rows, _ in (*self.done, *self.failed)])
        order = torch.empty_like(rows)
        order[rows] = torch.arange(len(rows))
        parts = [(len(rows), answer) for rows, answer in self.done]
        joined: A = _join(parts, order.to(self.run.device), why)
        return joined

    # --- what it was ---

    def _why(self) -> str:
        """The commonest failure; where a model's NaN is behind it, by which of its methods and when."""
        messages = Counter(str(failure) for rows, failure in self.failed for _ in range(len(rows)))
        message = messages.most_common(1)[0][0]
        for rows, failure in self.failed:
            if failure.rows is not None and not failure.explained:
                return self._found(rows[:1]) or message
        return message

    def named(self, answer: A) -> A:
        """An answer with NaN in some rows, with the reason where it is the model's own NaN."""
        values = answer.log_prob if isinstance(answer, Estimate) else answer.x.detach().flatten(1).sum(1)
        assert values is not None
        plain = answer.status == "ok" and (isinstance(answer, Estimate) or answer.log_prob is None)
        if plain and all_finite(values):
            self.whole = True
            return answer
        finite = torch.isfinite(values)
        if isinstance(answer, Samples) and answer.log_prob is not None:
            finite &= torch.isfinite(answer.log_prob)
        self.whole = answer.status == "ok" and bool(finite.all())
        if answer.status != "ok" or answer.reason is not None or self.whole:
            return answer
        bad = torch.isnan(values).nonzero().flatten().cpu()
        why = self._found(bad[:1]) if len(bad) else None
        return (
            answer
            if why is None
            else replace(answer, reason=f"{len(bad)} of {len(values)} rows have no value: {why}")
        )

    def _found(self, row: Tensor) -> str | None:
        part = self._part(row)
        try:
            self.attempt(part, row, True)
        except _NotFinite as found:
            return str(found)
        except Diverged:
            return None
        finally:
            self.charge(part.counts, row)
        return None


def _of_length(values: Tensor | None, length: int) -> Tensor | None:
    """On the CPU; None where they are of another batch, such as a pilot's."""
    return None if values is None or len(values) != length else values.cpu()


def _parts(rows: Tensor, score: Tensor | None) -> Iterator[Tensor]:
    """The rest and the suspects, where there are some; else halves."""
    if score is None or len(rows) < 2 * SUSPECTS:
        yield from (part for part in rows.tensor_split(2) if len(part))
        return
    order = score.nan_to_num(math.inf).argsort(descending=True)
    suspects = len(rows) // SUSPECTS
    yield rows[order[suspects:].sort().values]
    yield rows[order[:suspects].sort().values]


# --- answers of parts as one ---


def _join(parts: Sequence[tuple[int, Any]], order: Tensor, why: str) -> Any:
    """One answer of those for parts of so many rows each; the rows that are missing come last in ``order``."""
    sizes, answers = [size for size, _ in parts], [answer for _, answer in parts]
    missing = len(order) - sum(sizes)

    def joined(values: Sequence[Any]) -> Tensor | None:
        if any(value is None for value in values):
            return None
        found = [v.expand(size) if v.ndim == 0 else v for v, size in zip(values, sizes, strict=True)]
        fill = math.nan if found[0].is_floating_point() else 0
        return torch.cat([*found, found[0].new_full((missing, *found[0].shape[1:]), fill)])[order]

    first = answers[0]
    changed: dict[str, Any] = {
        "log_prob": joined([answer.log_prob for answer in answers]),
        "valid": joined([answer.valid.to(order.device) for answer in answers]),
        "reason": "; ".join([why, *dict.fromkeys(answer.reason for answer in answers if answer.reason)]),
    }
    if isinstance(first, Samples):
        changed["x"] = joined([answer.x for answer in answers])
        return replace(first, **changed)
    names = [name for name in first.extra if all(name in answer.extra for answer in answers)]
    changed["extra"] = {name: joined([answer.extra[name] for answer in answers]) for name in names}
    return replace(first, stderr=joined([answer.stderr for answer in answers]), **changed)


# --- the model's own NaN ---


class _NotFinite(Diverged):
    pass


class _Watched:
    def __init__(self, model: Any) -> None:
        self._model = model
        for name in METHODS:
            if hasattr(model, name):
                setattr(self, name, _looking(name, getattr(model, name)))

    def __getattr__(self, name: str) -> Any:
        if name == "_model":
            raise AttributeError(name)
        return getattr(self._model, name)


class _WatchedPolicy:
    def __init__(self, policy: Any) -> None:
        self._policy = policy

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._policy, name)
        return _looking(f"policy's {name}", found) if name in POLICY_METHODS else found


def _looking(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, *times: Tensor, **kwargs: Any) -> Any:
        answer = method(x, *times, **kwargs)
        if name == "policy":
            return _WatchedPolicy(answer)
        if not torch._C._are_functorch_transforms_active() and bool(torch.isfinite(x).all()):
            for part in answer if isinstance(answer, tuple) else (answer,):
                if isinstance(part, Tensor) and not bool(torch.isfinite(part).all()):
                    what = "NaN" if bool(torch.isnan(part).any()) else "infinite"
                    when = f" at t = {float(times[0].detach().flatten()[0]):.6g}" if times else ""
                    raise _NotFinite(f"the model's {name.replace('_', ' ')} is {what}{when} for finite x")
        return answer

    return call
