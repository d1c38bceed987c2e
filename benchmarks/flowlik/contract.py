"""The contract that every registered estimator keeps, third-party ones too: `flowlik check --plugins`.

Each estimator is taken with its default parameters and the first closed form it supports.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TASKS = ("gaussian-2d", "gmm-2d", "thin-2d")
POINTS = 6
TOLERANCE = 0.05  # nats between a batch and its halves: an adaptive solver has one step size a batch


class BrokenContractError(AssertionError):
    """What an estimator did that it must not."""


@dataclass(frozen=True, kw_only=True)
class ContractVerdict:
    """One rule on one estimator."""

    estimator: str
    rule: str
    passed: bool
    note: str = ""

    def line(self) -> str:
        """One line for people."""
        note = f": {self.note}" if self.note else ""
        return f"{'pass' if self.passed else 'FAIL'}  {self.estimator:<18} {self.rule}{note}"


class Nothing(torch.nn.Module):
    """A model that offers only its shape: nothing fits it."""

    event_shape = (2,)


def contract_verdicts(names: tuple[str, ...] | None = None) -> Iterator[ContractVerdict]:
    """Every rule on every registered estimator (or on those named)."""
    from flowlik_estimators import available, get

    for name in names or tuple(available()):
        try:
            estimator = get(name)
        except Exception as error:
            yield ContractVerdict(estimator=name, rule="has defaults", passed=False, note=str(error))
            continue
        for rule, test in RULES.items():
            yield _verdict(name, rule, test, estimator)


def _verdict(name: str, rule: str, test: Callable[[Any], None], estimator: Any) -> ContractVerdict:
    try:
        test(estimator)
    except NotApplicableError as error:
        return ContractVerdict(estimator=name, rule=rule, passed=True, note=f"not applicable, {error}")
    except Exception as error:
        note = " ".join(f"{type(error).__name__}: {error}".split())
        return ContractVerdict(estimator=name, rule=rule, passed=False, note=note)
    return ContractVerdict(estimator=name, rule=rule, passed=True)


class NotApplicableError(Exception):
    """No closed form here supports the estimator."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenContractError(message)


def _points(estimator: Any) -> tuple[Any, Tensor]:
    from flowlik_models.synthetic import closed_form

    for task in TASKS:
        model = closed_form(task)
        if estimator.supports(model) is None:
            generator = torch.Generator().manual_seed(0)
            return model, model.sample(POINTS, generator=generator, dtype=torch.float64)
    raise NotApplicableError("no closed form supports it")


def _estimate(estimator: Any, model: Any, x: Tensor, items: Tensor | None = None) -> Any:
    return estimator.log_prob(model, x, generator=torch.Generator().manual_seed(1), items=items)


def _label_names_it(estimator: Any) -> None:
    from flowlik_estimators import parse_spec

    again = parse_spec(estimator.label)
    _need(again == [estimator], f"label {estimator.label!r} does not give the same estimator back")
    _need(bool(estimator.family), "family is empty")


def _shapes(estimator: Any) -> None:
    model, x = _points(estimator)
    out = _estimate(estimator, model, x)
    _need(out.status == "ok", f"status {out.status}: {out.reason}")
    _need(out.log_prob.shape == (POINTS,), f"log_prob has shape {tuple(out.log_prob.shape)}, not ({POINTS},)")
    _need(out.log_prob.dtype == torch.float64, f"log_prob is {out.log_prob.dtype}, not float64")
    _need(out.valid.shape == (POINTS,) and out.valid.dtype == torch.bool, "valid is not (batch,) bool")
    _need(bool(torch.isfinite(out.log_prob[out.valid]).all()), "a valid item has no finite value")
    _need(not out.log_prob.requires_grad, "a graph is kept although differentiable=False")


def _cost_is_counted(estimator: Any) -> None:
    model, x = _points(estimator)
    cost = _estimate(estimator, model, x).cost
    total = torch.as_tensor(cost.forwards + cost.policy_calls, dtype=torch.float64)
    _need(bool((total >= 1).all()), "no evaluation was counted")


def _same_seed_same_answer(estimator: Any) -> None:
    model, x = _points(estimator)
    first, second = (_estimate(estimator, model, x).log_prob for _ in range(2))
    _need(torch.equal(first, second), "two calls with the same seed differ")


def _batching_changes_nothing(estimator: Any) -> None:
    model, x = _points(estimator)
    ids = torch.arange(POINTS)
    whole = _estimate(estimator, model, x, ids).log_prob
    half = POINTS // 2
    parts = [
        _estimate(estimator, model, x[part], ids[part]).log_prob for part in (slice(half), slice(half, None))
    ]
    gap = float((torch.cat(parts) - whole).abs().max())
    _need(gap <= TOLERANCE, f"halving the batch moves log p by {gap:.2g} nats")


def _misuse_is_refused(estimator: Any) -> None:
    model, x = _points(estimator)
    broken = x.clone()
    broken[0] = float("nan")
    cases = {
        "an empty batch": x[:0],
        "a wrong event shape": x[:, :1],
        "NaN in x": broken,
        "integers": x.long(),
    }
    for what, points in cases.items():
        try:
            _estimate(estimator, model, points)
        except ValueError:
            continue
        raise BrokenContractError(f"{what} raised no ValueError")


def _unsuitable_model_is_a_status(estimator: Any) -> None:
    out = _estimate(estimator, Nothing(), torch.zeros(POINTS, 2))
    _need(
        out.status == "refused" and bool(out.reason),
        f"status {out.status!r} instead of refused with a reason",
    )
    _need(not bool(out.valid.any()), "a refused call has valid items")


RULES: dict[str, Callable[[Any], None]] = {
    "label spells the estimator": _label_names_it,
    "shapes, dtypes, validity": _shapes,
    "cost is counted": _cost_is_counted,
    "same seed, same answer": _same_seed_same_answer,
    "batching changes nothing": _batching_changes_nothing,
    "misuse raises ValueError": _misuse_is_refused,
    "an unsuitable model is a status": _unsuitable_model_is_a_status,
}
