"""The contract that every registered estimator keeps, third-party ones too: `flowlik check --plugins`.

Each estimator is taken with its default parameters and the first closed form it supports. One whose family is exact on
a Gaussian says so by a class attribute `exact_to`, the nats by which its defaults may be off there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowlik.evaluation.models import load
from flowlik_estimators import available, get, parse_spec
from flowlik_estimators.counting import METHODS

TASKS = ("gaussian-2d", "gmm-2d", "thin-2d")
POINTS = 6
TOLERANCE = 0.05  # nats between a batch and its halves: an adaptive solver has one step size a batch
SINGLE = 0.02  # nats between float32 and float64
EXACT_TO = {"f2d2": 1e-9, "flow-map-exact": 1e-9, "generator": 1e-9, "ode": 1e-3, "whitened-ode": 1e-3}
"""Nats from the Gaussian's density for the families of this package that are exact there, up to their solver."""


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


class Watched:
    """A model that counts for itself how many rows it was asked for, and notes who asks for the answer."""

    def __init__(self, model: Any) -> None:
        self._inner = model
        self.event_shape = model.event_shape
        self.rows = 0
        self.asked_for_the_answer = False
        for name in METHODS:
            if hasattr(model, name):
                setattr(self, name, self._watched(getattr(model, name)))

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows += len(x)
            return method(x, *args, **kwargs)

        return call

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":
            raise AttributeError(name)
        if name in ("log_prob", "sample"):
            self.asked_for_the_answer = True
        return getattr(self._inner, name)


class Spoiled:
    """What a model answered with that is no tensor (a policy), its own answers spoiled."""

    def __init__(self, inner: Any, spoil: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._spoil = inner, spoil

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not callable(value):
            return value
        return lambda *args, **kwargs: spoiled(value(*args, **kwargs), self._spoil)


def spoiled(answer: Any, spoil: Callable[[Tensor], Tensor]) -> Any:
    """The answer with every tensor in it spoiled; flags and None stay."""
    if isinstance(answer, Tensor):
        return spoil(answer) if answer.is_floating_point() else answer
    if isinstance(answer, tuple):
        return tuple(spoiled(part, spoil) for part in answer)
    return answer if answer is None else Spoiled(answer, spoil)


class Broken(Watched):
    """A model all of whose answers are NaN."""

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: spoiled(method(*args, **kwargs), lambda part: part * float("nan"))


class Misshapen(Watched):
    """A model whose answers lack their last row."""

    def _watched(self, method: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: spoiled(method(*args, **kwargs), lambda part: part[:-1])


def contract_verdicts(names: tuple[str, ...] | None = None) -> Iterator[ContractVerdict]:
    """Every rule on every registered estimator (or on those named)."""
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
    """The rule says nothing about this estimator; the message says why."""


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise BrokenContractError(message)


def _points(estimator: Any) -> tuple[Any, Tensor]:
    if (why := estimator.unavailable()) is not None:
        raise NotApplicableError(why)
    for task in TASKS:
        model = _closed_form(task)
        if estimator.supports(model) is None:
            generator = torch.Generator().manual_seed(0)
            return model, model.sample(POINTS, generator=generator, dtype=torch.float64)
    raise NotApplicableError("no closed form supports it")


def _closed_form(task: str) -> Any:
    """A task's closed form with the moments that its models carry."""
    return load(task, "closed-form", "cpu", "float64")[0]


def _estimate(estimator: Any, model: Any, x: Tensor, items: Tensor | None = None) -> Any:
    return estimator.log_prob(model, x, generator=torch.Generator().manual_seed(1), items=items)


def _label_names_it(estimator: Any) -> None:
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


def _dtypes(estimator: Any) -> None:
    model, x = _points(estimator)
    double, single = _estimate(estimator, model, x), _estimate(estimator, model, x.float())
    _need(single.log_prob.dtype == torch.float64, f"of float32 points log_prob is {single.log_prob.dtype}")
    gap = float((single.log_prob - double.log_prob).abs().max())
    allowed = SINGLE * (1 + float(double.log_prob.abs().max()))
    _need(gap <= allowed, f"float32 and float64 differ by {gap:.2g} nats")


def _one_point(estimator: Any) -> None:
    model, x = _points(estimator)
    out = _estimate(estimator, model, x[:1])
    _need(out.log_prob.shape == (1,), f"of one point log_prob has shape {tuple(out.log_prob.shape)}")


def _cost_is_counted(estimator: Any) -> None:
    model, x = _points(estimator)
    cost = _estimate(estimator, model, x).cost
    total = torch.as_tensor(cost.forwards + cost.policy_calls, dtype=torch.float64)
    _need(bool((total >= 1).all()), "no evaluation was counted")


def _same_seed_same_answer(estimator: Any) -> None:
    model, x = _points(estimator)
    first, second = (_estimate(estimator, model, x).log_prob for _ in range(2))
    _need(torch.equal(first, second), "two calls with the same seed differ")


def _cost_is_honest(estimator: Any) -> None:
    model, x = _points(estimator)
    watched = Watched(model)
    _estimate(estimator, watched, x)  # the first call may look at the model's graph beside its evaluations
    watched.rows = 0
    cost = _estimate(estimator, watched, x).cost
    counted = float(torch.as_tensor(cost.forwards + cost.policy_calls, dtype=torch.float64).mean()) * POINTS
    _need(counted >= watched.rows - 0.5, f"{watched.rows} rows were evaluated and {counted:g} counted")
    _need(not watched.asked_for_the_answer, "it asks the model for its log_prob or sample")


def _draws_follow_the_items(estimator: Any) -> None:
    model, x = _points(estimator)
    ids = torch.arange(POINTS)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    whole = _estimate(estimator, model, x, ids).log_prob
    moved = _estimate(estimator, model, x[order], ids[order]).log_prob
    gap = float((moved - whole[order]).abs().max())
    _need(gap <= 1e-6, f"the same items in another order differ by {gap:.2g} nats")


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


def _a_broken_model_is_a_status(estimator: Any) -> None:
    model, x = _points(estimator)
    out = _estimate(estimator, Broken(model), x)
    _need(out.status != "ok", "a model that answers NaN gives status ok")
    _need(bool(out.reason), f"status {out.status} has no reason")
    _need(not bool(out.valid.any()), "a model that answers NaN gives valid items")


def _a_misshapen_model_is_misuse(estimator: Any) -> None:
    model, x = _points(estimator)
    try:
        out = _estimate(estimator, Misshapen(model), x)
    except (ValueError, RuntimeError):
        return
    _need(out.status != "ok", "a model whose answers lack a row is taken for sound")


def _samples(estimator: Any) -> None:
    model, _ = _points(estimator)
    first, second = (
        estimator.sample(model, POINTS, generator=torch.Generator().manual_seed(2)) for _ in range(2)
    )
    if first.status == "refused":
        raise NotApplicableError(first.reason)
    _need(first.x.shape == (POINTS, *model.event_shape), f"samples have shape {tuple(first.x.shape)}")
    _need(torch.equal(first.x, second.x), "two draws with the same seed differ")


def _exact_on_a_gaussian(estimator: Any) -> None:
    allowed = getattr(estimator, "exact_to", EXACT_TO.get(estimator.name))
    if allowed is None:
        raise NotApplicableError("its family is not said to be exact")
    if (why := estimator.unavailable()) is not None:
        raise NotApplicableError(why)
    model = _closed_form("gaussian-2d")
    if (why := estimator.supports(model)) is not None:
        raise NotApplicableError(why)
    x = model.sample(POINTS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    truth = model.log_prob(x, estimator.data_end(model))
    gap = float((_estimate(estimator, model, x).log_prob - truth).abs().max())
    _need(gap <= allowed, f"off the Gaussian's density by {gap:.2g} nats, {allowed:g} allowed")


RULES: dict[str, Callable[[Any], None]] = {
    "label spells the estimator": _label_names_it,
    "shapes and validity": _shapes,
    "dtypes": _dtypes,
    "a single point": _one_point,
    "cost is counted": _cost_is_counted,
    "cost is honest": _cost_is_honest,
    "same seed, same answer": _same_seed_same_answer,
    "draws follow the items": _draws_follow_the_items,
    "batching changes nothing": _batching_changes_nothing,
    "samples": _samples,
    "misuse raises ValueError": _misuse_is_refused,
    "an unsuitable model is a status": _unsuitable_model_is_a_status,
    "a broken model is a status": _a_broken_model_is_a_status,
    "a misshapen model is misuse": _a_misshapen_model_is_misuse,
    "exact on a Gaussian": _exact_on_a_gaussian,
}
