"""What every likelihood estimator is: a frozen set of options with one method that turns points into log-densities.

`Estimator.log_prob` and `Estimator.sample` are final. They check what comes in, hold the model still by a stand-in,
wrap it in a counter, look at every answer, and fill cost, validity and status. A family implements `_log_prob`, may
implement `_sample`, and says in `supports` which models it can work with.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, replace
from inspect import get_annotations
from numbers import Integral
from threading import Lock
from typing import Any, ClassVar, Literal, Union, final, get_args, get_origin, get_type_hints
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from flowlik_estimators.call import Answer, Condition, Estimate, Run, Samples, Status, checked_answer
from flowlik_estimators.counting import Cost, Counts, counted
from flowlik_estimators.integration.failing_rows import Unanswered, answered, watched
from flowlik_estimators.model_checks import stand_in
from flowlik_estimators.model_checks.answers import check_cond, check_event_shape, described, mapped
from flowlik_estimators.model_checks.calls import asks_one_time, checked_model
from flowlik_estimators.model_checks.guards import DTYPES, check_points, device_of, mode, one_dtype, own_copy
from flowlik_estimators.model_checks.unchanged import Unchanged
from flowlik_models.interfaces import data_end_of, ends_of, source_of
from flowlik_models.names import unknown
from flowlik_models.numerics import random
from flowlik_models.numerics.float32 import full_float32


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """Base of all estimators; ``eps`` None takes the model's own (0 where it has none).

    Subclasses are frozen keyword-only dataclasses whose fields are the options. An option left at None may
    stand for a value that depends on the other options: `implied` says which, and the value is filled in, so
    that two spellings of the same estimator are equal.
    """

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    version: ClassVar[int] = 1

    eps: float | None = None

    def __post_init__(self) -> None:
        """Check the options; raises ValueError in one line."""
        for option, hint in _options(type(self)).items():
            object.__setattr__(self, option, self._checked(option, getattr(self, option), hint))
        if self.eps is not None and not 0.0 <= self.eps < 1.0:
            raise ValueError(f"{self.name}: eps must be in [0, 1), got {self.eps}")
        self._check()
        for option, value in self.implied().items():
            if getattr(self, option) is None:
                object.__setattr__(self, option, value)

    # --- what a family says ---

    differentiates: ClassVar[bool] = True
    """Whether the estimate needs derivatives of the model; a family that needs none may say so, which saves time."""

    def supports(self, model: object) -> str | None:
        """None, or one line why this estimator cannot work with the model."""
        return None

    def adapted(self, model: Any) -> Any:
        """The model that is estimated; a family with an option that changes the field says which."""
        return model

    def finer(self, dtype: torch.dtype) -> tuple[Estimator, float] | None:
        """The same with the same probes and a much smaller error of rule and solver, for points of that dtype.

        Beside it what the difference of the two is multiplied by, to be the error of this one. None: there is none.
        """
        return None

    def unavailable(self) -> str | None:
        """None, or one line what to install first: the estimator needs a library that is not there."""
        return None

    def implied(self) -> dict[str, Any]:
        """Values that options left at None take, given the others."""
        return {}

    def _check(self) -> None:
        """Raise ValueError when options do not go together."""

    def _log_prob(self, model: Any, x: Tensor, run: Run) -> Estimate:
        raise NotImplementedError

    def _sample(self, model: Any, x0: Tensor, run: Run, *, log_prob: bool) -> Samples:
        raise NotImplementedError

    # --- what it is called ---

    def params(self) -> dict[str, Any]:
        """All options with their values, implied ones filled in.

        >>> from flowlik_estimators import get
        >>> get("f2d2", steps=2).params()
        {'steps': 2, 'grid': 'uniform', 'eps': None}
        """
        return {option: getattr(self, option) for option in _options(type(self))}

    @property
    def label(self) -> str:
        """The canonical spelling, ``name[key=value,...]``: steps, and what differs from the defaults."""
        implied = self.implied()
        default = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        given = [
            f"{option}={_spelled(value)}"
            for option, value in self.params().items()
            # steps always: labels of one sweep must read alike
            if (option == "steps" and value is not None)
            or (value != default.get(option, MISSING) and value != implied.get(option, MISSING))
        ]
        return f"{self.name}[{','.join(given)}]" if given else self.name

    def data_end(self, model: object) -> float:
        """The time at which the density is estimated, 1 - eps; without an eps a model's own clean end."""
        return data_end_of(model) if self.eps is None else 1.0 - float(self.eps)

    # --- what it does ---

    @final
    def log_prob(
        self,
        model: Any,
        x: Tensor,
        *,
        cond: Condition = None,
        generator: torch.Generator | None = None,
        items: Tensor | None = None,
        differentiable: bool = False,
    ) -> Estimate:
        """Estimate log p at t = 1 - eps of every row of x, in nats; float32 is taken in full, whatever torch allows.

        A model with a clean end t_1 of its own (`HasSource`) is estimated there, ``log p_{t_1}(t_1 x) + d log t_1``,
        unless ``eps`` is given: then it is log p_{1 - eps}(x) as everywhere.

        Args:
            model: the flow; what it must offer depends on the family.
            x: (batch, *event), float32 or float64, finite.
            cond: anything the model is conditioned on, sliced along with x.
            generator: source of the call's random key; None stands for seed 0.
            items: int64 (batch,) ids that key the random draws; default 0 .. batch - 1.
            differentiable: keep the graph to x and to the model's parameters: the result can be a loss.

        Raises:
            ValueError: misuse (empty batch, wrong event shape or dtype, NaN or infinity in x, lengths that
                differ, parameters of another type than x), or a model whose answers have the wrong shape. A
                model that does not fit, or a solve that fails, is a status, not an exception.

        >>> from flowlik_estimators import get
        >>> from flowlik_models.synthetic import closed_form
        >>> model = closed_form("gaussian-2d")
        >>> x = model.sample(3, generator=torch.Generator().manual_seed(0))
        >>> out = get("ode", rtol=1e-6, atol=1e-6).log_prob(model, x)
        >>> bool((out.log_prob - model.log_prob(x)).abs().max() < 1e-3)
        True
        >>> out.status, out.valid.tolist()
        ('ok', [True, True, True])
        >>> get("f2d2", steps=4).log_prob(model, x).cost.forwards
        4.0
        """
        _check_events(model)
        check_points(x, getattr(model, "event_shape", None))
        refusal = self._refusal(model)
        if refusal is not None:
            return _failed(x, "refused", refusal, Cost())
        model = self.adapted(model)
        with (
            full_float32(),
            mode(differentiable),
            stand_in.held(model, differentiable=differentiable, differentiated=self.differentiates) as held,
            one_dtype(held.tensors, x),
        ):
            x = own_copy(x, differentiable=differentiable)
            run = self._run(model, x, cond, generator, items, differentiable)
            return self._estimated(model, held, x, run, lambda part: _asked(model, held, part))

    @final
    def bind(self, model: Any) -> Bound:
        """The same estimator for many calls on one model: what of the checks concerns the model is done once, here.

        A model that changes afterwards is told, or answered for as it is then: `Bound.log_prob`.

        Raises:
            ValueError: a model of which this is no estimator; the line says why.

        >>> from flowlik_estimators import get
        >>> from flowlik_models.synthetic import closed_form
        >>> model, estimator = closed_form("gaussian-2d"), get("f2d2", steps=1)
        >>> x = model.sample(1, generator=torch.Generator().manual_seed(0))
        >>> bound = estimator.bind(model)
        >>> bool((bound.log_prob(x).log_prob == estimator.log_prob(model, x).log_prob).all())
        True
        """
        _check_events(model)
        if (why := self._refusal(model)) is not None:
            raise ValueError(f"{self.name} {why}")
        return Bound(self, model)

    def _estimated(
        self, model: Any, held: stand_in.StandIn, x: Tensor, run: Run, ask: Callable[[Run], Any]
    ) -> Estimate:
        """The finished answer at x; ``ask`` gives the model as a run of some of the rows sees it."""
        scale = self._scale(model)

        def attempt(part: Run, rows: Tensor | None, watch: bool) -> Estimate:
            asked = ask(part)
            points = x if rows is None else x[rows.to(x.device)]
            points = points if scale == 1.0 else scale * points
            found = self._log_prob(watched(asked) if watch else asked, points, part)
            return checked_answer(self.name, found, Estimate, part.batch)

        try:
            estimate, cost, whole = answered(attempt, run)
        except Unanswered as failure:
            return _failed(x, "diverged", str(failure), failure.cost)
        if estimate.status == "ok" and _is_free(cost):
            return _failed(x, "refused", UNCOUNTED, cost)
        if (why := self._ignores_source(run, "noise_end", "source_log_prob")) is not None:
            return _failed(x, "refused", why, cost)
        estimate = estimate if scale == 1.0 else _rescaled(estimate, scale, run)
        return _finished(_with_mode(estimate, held) if run.differentiable else estimate, run, cost, whole)

    @final
    def sample(
        self,
        model: Any,
        n: int,
        *,
        cond: Condition = None,
        generator: torch.Generator | None = None,
        items: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        log_prob: bool = True,
    ) -> Samples:
        """Draw n samples at t = 1 - eps by the same steps, 0 -> 1 - eps, on the model's device.

        Those of a model with ends of its own run from its source to its clean end t_1 and are divided by t_1.

        Args:
            model: the flow.
            n: number of samples.
            cond: as in `log_prob`, n rows.
            generator: source of the call's random key; None stands for seed 0.
            items: int64 (n,) ids that key the starting points; default 0 .. n - 1.
            dtype: float32 or float64.
            log_prob: also accumulate the log-density in the same pass, where the family can.

        Raises:
            ValueError: misuse. A model that does not fit, a family that cannot sample, or a solve that fails, is a
                status, and x is NaN.

        >>> from flowlik_estimators import get
        >>> from flowlik_models.synthetic import closed_form
        >>> drawn = get("f2d2", steps=1).sample(closed_form("gmm-64d"), 5)
        >>> drawn.status, drawn.reason
        ('refused', 'needs a joint flow map (a `joint` method)')
        >>> get("f2d2", steps=1).sample(closed_form("gaussian-2d"), 5).x.shape
        torch.Size([5, 2])
        """
        if not isinstance(n, Integral) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n must be at least 1 and a whole number, got {n!r}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be float32 or float64, got {dtype}")
        _check_events(model)
        event_shape, device = getattr(model, "event_shape", ()), device_of(stand_in.found(model))
        like = torch.full((n, *event_shape), math.nan, dtype=dtype, device=device)
        refusal = self._refusal(model)
        if refusal is None and type(self)._sample is Estimator._sample:
            refusal = f"{self.name} cannot sample"
        if refusal is not None:
            return _no_samples(like, "refused", refusal, Cost())
        model = self.adapted(model)
        with (
            full_float32(),
            mode(differentiable=False),
            stand_in.held(model, differentiable=False, differentiated=self.differentiates) as held,
            one_dtype(held.tensors, like),
        ):
            run = self._run(model, like, cond, generator, items, differentiable=False)

            def attempt(part: Run, _: Tensor | None, watch: bool) -> Samples:
                asked = _asked(model, held, part)
                found = self._sample(
                    watched(asked) if watch else asked, part.source(), part, log_prob=log_prob
                )
                return replace(
                    checked_answer(self.name, found, Samples, part.batch), x=part.event(found.x, "sample")
                )

            try:
                samples, cost, whole = answered(attempt, run)
            except Unanswered as failure:
                return _no_samples(like, "diverged", str(failure), failure.cost)
        if samples.status == "ok" and _is_free(cost):
            return _no_samples(like, "refused", UNCOUNTED, cost)
        if (why := self._ignores_source(run, "noise_end")) is not None:
            return _no_samples(like, "refused", why, cost)
        if (scale := self._scale(model)) != 1.0:
            samples = _rescaled(replace(samples, x=samples.x / scale), scale, run)
        valid = torch.isfinite(samples.x).flatten(1).all(1)
        if samples.log_prob is not None:
            valid &= torch.isfinite(samples.log_prob)
        status, reason = (
            (samples.status, samples.reason) if whole else _verdict(samples.status, samples.reason, valid)
        )
        return replace(samples, cost=cost, valid=valid, status=status, reason=reason)

    # --- inside ---

    def _refusal(self, model: object) -> str | None:
        if not hasattr(model, "event_shape"):
            return "needs a model with an event_shape"
        return self._beyond_ends(model) or self.supports(model)

    def _beyond_ends(self, model: object) -> str | None:
        """None, or why a given eps leaves the times between which the model knows its field."""
        ends = ends_of(model)
        if ends is None or self.eps is None or ends.noisy_end < 1.0 - self.eps <= ends.clean_end:
            return None
        return (
            f"eps={self.eps:g} asks for t = {1.0 - self.eps:g}, the model knows its field from t = "
            f"{ends.noisy_end:g} to {ends.clean_end:g}; leave eps out"
        )

    def _scale(self, model: object) -> float:
        """The clean end t_1 of a model with ends of its own, by which data are multiplied; 1 elsewhere."""
        return 1.0 if self.eps is not None or ends_of(model) is None else self.data_end(model)

    def _ignores_source(self, run: Run, *needed: str) -> str | None:
        """None, or why the answer is not that of a model with a source of its own."""
        if run.law is None or run.read.issuperset(needed):
            return None
        return (
            f"{self.name} starts from N(0, I) at t = 0, the model from a source of its own at "
            f"t = {run.first_time:g}; a family that reads run.noise_end and run.source_log_prob, such as ode, can"
        )

    def _run(
        self,
        model: Any,
        x: Tensor,
        cond: Condition,
        generator: torch.Generator | None,
        items: Tensor | None,
        differentiable: bool,
        counts: Counts | None = None,
    ) -> Run:
        batch = x.shape[0]
        check_cond(cond, batch)
        cond = mapped(cond, lambda value: own_copy(value, differentiable=differentiable))
        if items is None:
            items = torch.arange(batch)
        elif not isinstance(items, Tensor):
            raise ValueError(
                f"items is {described(items)}, expected int64 of shape ({batch},): torch.as_tensor(items)"
            )
        elif items.shape != (batch,) or items.dtype != torch.int64:
            raise ValueError(
                f"items must be int64 of shape ({batch},), got {items.dtype} of shape {tuple(items.shape)}"
            )
        ends = ends_of(model)
        return Run(
            batch=batch,
            event_shape=tuple(x.shape[1:]),
            dtype=x.dtype,
            device=x.device,
            cond=cond,
            key=random.draw_key(generator),
            items=items,
            differentiable=differentiable,
            data_end=self.data_end(model),
            counts=Counts() if counts is None else counts,
            first_time=0.0 if ends is None else float(ends.noisy_end),
            law=source_of(model),
        )

    def _checked(self, option: str, value: Any, hint: Any) -> Any:
        kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        if value is None and type(None) in kinds:
            return None
        for kind in kinds:
            if get_origin(kind) is Literal:
                if value in get_args(kind):
                    return value
                raise ValueError(f"{self.name}: {unknown(option, value, get_args(kind))}")
            if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
                if not math.isfinite(value):
                    break
                return float(value)
            if isinstance(kind, type) and type(value) is kind:
                return value
        expected = " or ".join(_KIND_NAMES.get(kind, str(kind)) for kind in kinds)
        raise ValueError(f"{self.name}: {option} must be {expected}, got {value!r}")

    def _at_least_one(self, *options: str) -> None:
        for option in options:
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ValueError(f"{self.name}: {option} must be at least 1, got {value}")

    def _no_effect(self, because: str, *options: str) -> None:
        """Refuse options that were given although the others leave them without effect."""
        for option in options:
            if getattr(self, option) is not None:
                raise ValueError(f"{self.name}: {option} has no effect {because}")


class Bound:
    """An estimator and a model that belong together (`Estimator.bind`)."""

    def __init__(self, estimator: Estimator, model: Any) -> None:
        self.estimator, self.model = estimator, model
        self._estimated = model = estimator.adapted(model)
        with stand_in.held(model, differentiable=False, differentiated=estimator.differentiates) as held:
            self._held = held
        self._unchanged = Unchanged(self.model, held, model)
        self._counts = Counts()
        self._asked: Any = None
        self._lock = Lock()

    def log_prob(
        self,
        x: Tensor,
        *,
        cond: Condition = None,
        generator: torch.Generator | None = None,
        items: Tensor | None = None,
    ) -> Estimate:
        """What `Estimator.log_prob` answers at x (batch, *event), bit for bit, in nats; threads take turns.

        What the model looks up as it is called is answered for as it is then: hooks, writes through ``.data`` and
        numpy, global variables, other functions and properties of its classes, torch's default type, autocast. What
        is kept from call to call, which is all else, is compared, and told where it is another.

        Not seen: a ``velocity``, say, that a property or a ``__getattr__`` makes anew out of global variables; and
        that a network needs eval mode which first comes in by a set, a deque or a global variable that held none.

        Raises:
            ValueError: as there; and where the model has changed since it was bound: its weights, its mode, its
                device, a part or an attribute of it, a list or dict of these, their classes, what these say of the
                methods that evaluate it, a function, its defaults or a variable that it encloses.
        """
        held = self._held
        with self._lock:
            self._unchanged.check()
            check_points(x, self.model.event_shape)
            try:
                with (
                    full_float32(),
                    mode(differentiable=False),
                    stand_in.evaluating(held.shared),
                    one_dtype(held.tensors, x),
                ):
                    x = own_copy(x, differentiable=False)
                    self._counts.reset()
                    run = self.estimator._run(
                        self._estimated, x, cond, generator, items, differentiable=False, counts=self._counts
                    )
                    return self.estimator._estimated(self._estimated, held, x, run, self._ask)
            finally:
                if held.copies or held.objects or held.shared:  # what the call wrote to them is the model's
                    held.write_back()
                    self._unchanged.take()

    def _ask(self, run: Run) -> Any:
        if run.counts is not self._counts:  # rows that are set aside
            return _asked(self._estimated, self._held, run)
        if self._asked is None:
            self._asked = _asked(self._estimated, self._held, run)
        self._asked.begin()
        return self._asked


_KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a name",
    bool: "true or false",
    type(None): "none",
}


_OPTIONS: WeakKeyDictionary[type[Estimator], dict[str, Any]] = WeakKeyDictionary()


def _options(kind: type[Estimator]) -> dict[str, Any]:
    """Option -> type, those of the class itself first and those of `Estimator` last."""
    if (known := _OPTIONS.get(kind)) is not None:
        return known
    hints, names = get_type_hints(kind), {f.name for f in fields(kind)}
    found = {name: hints[name] for base in kind.__mro__ for name in get_annotations(base) if name in names}
    return _OPTIONS.setdefault(kind, found)


def _spelled(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return str(value)


def _check_events(model: object) -> None:
    if hasattr(model, "event_shape"):  # a model without one is refused
        check_event_shape(model.event_shape)


def _asked(model: Any, held: stand_in.StandIn, run: Run) -> Any:
    """The model as a family sees it: counted, and looked at call by call."""
    one_time = asks_one_time(model, held)
    seen = counted(held.model, run.counts, original=model)
    return checked_model(seen, model, held.model, run.counts, scalar_time=one_time)


def _with_mode(estimate: Estimate, held: stand_in.StandIn) -> Estimate:
    """The estimate, with a reason where modules that answer otherwise in training mode were in it."""
    training = stand_in.active_in_training(held.modules)
    if not training:
        return estimate
    mode_used = f"computed with the model in training mode ({', '.join(training)}); model.eval() for its own likelihood"
    return replace(estimate, reason="; ".join(filter(None, (estimate.reason, mode_used))))


UNCOUNTED = (
    "no evaluation of the model was counted: the estimator asks for none, or past the evaluating methods"
)


def _is_free(cost: Cost) -> bool:
    """Whether nothing of the model was evaluated, networks or policies."""
    spent = cost.forwards + cost.policy_calls
    return not (bool(spent.any()) if isinstance(spent, Tensor) else spent)


def _failed(x: Tensor, status: Status, reason: str, cost: Cost) -> Estimate:
    nothing = torch.full(x.shape[:1], math.nan, dtype=torch.float64, device=x.device)
    return Estimate(log_prob=nothing, cost=cost, valid=torch.isfinite(nothing), status=status, reason=reason)


def _no_samples(x: Tensor, status: Status, reason: str, cost: Cost) -> Samples:
    nothing = torch.zeros(x.shape[:1], dtype=torch.bool, device=x.device)
    return Samples(x=x, cost=cost, valid=nothing, status=status, reason=reason)


def _rescaled(answer: Answer, scale: float, run: Run) -> Answer:
    """The log-density of x where that of ``scale * x`` is given: d log scale more."""
    if answer.log_prob is None:
        return answer
    return replace(answer, log_prob=answer.log_prob.double() + math.prod(run.event_shape) * math.log(scale))


def _finished(estimate: Estimate, run: Run, cost: Cost, whole: bool) -> Estimate:
    log_prob, stderr = estimate.log_prob.double(), estimate.stderr
    if not run.differentiable:
        log_prob = log_prob.detach() if log_prob.requires_grad else log_prob
        stderr = None if stderr is None else stderr.detach()
    status, reason = estimate.status, estimate.reason
    if whole and estimate.valid.ndim == 0 and bool(estimate.valid):
        valid = torch.ones(run.batch, dtype=torch.bool, device=run.device)
    else:
        # one truth for all rows stays where it is: to take it to a device would make the host wait
        usable = estimate.valid if estimate.valid.ndim == 0 else estimate.valid.to(run.device)
        valid = torch.isfinite(log_prob) & usable
        status, reason = _verdict(status, reason, valid)
    return replace(
        estimate, log_prob=log_prob, stderr=stderr, cost=cost, valid=valid, status=status, reason=reason
    )


def _verdict(status: Status, reason: str | None, valid: Tensor) -> tuple[Status, str | None]:
    if status == "ok" and not bool(valid.any()):
        return "diverged", reason or "no item has a finite value"
    return status, reason
