"""Which calls below an evaluating method of a model are evaluations of networks: the rule of the package, at work.

For the time of one call, `forward` and the evaluating methods of all that can be reached from the model are replaced by
functions that tell of the call; what they tell is looked at in the thread that made the call alone. The tensors of that
call are followed by a `TorchFunctionMode`: which descend from the point, and which modules have worked on them.
Whether something counts is known when the method returns; until then its rows are held back in a `Tally`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

from flowlik_estimators.counting.cost import Counts
from flowlik_estimators.counting.known import known_of
from flowlik_estimators.counting.networks import (
    METHODS,
    TELLING,
    Holder,
    Reachable,
    declared,
    is_compiled,
    is_layer,
    reachable,
)
from flowlik_estimators.counting.replacement import replaced
from flowlik_estimators.counting.taps import Tally, is_floating, tap

Function = Callable[..., Any]
Key = tuple[int, str]
"""Id of a part and name of its method."""


class Evaluations:
    """The evaluations of one model, a copy of ``original`` or itself, added to ``counts``."""

    def __init__(self, model: Any, counts: Counts, original: Any) -> None:
        self.model, self.counts = model, counts
        self.size = _size(getattr(model, "event_shape", ()))
        self._always = Tally(counts, kept=True)
        self._known = known_of(original)
        self._single: dict[Key, Any] = {(id(model), name): model for name in self._known}
        self._idle: dict[Key, Any] = {}
        self._found: Reachable | None = None

    def call(self, name: str, method: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The answer of a method of the model, its evaluations counted."""
        model = self.model
        if (id(model), name) in self._single or is_compiled(method) or is_layer(model):
            args, kwargs = self._tapped(self._always, model, args, kwargs)
            return method(*args, **kwargs)
        with noticed(self._below()):
            answer, tallies = self._looked_at(model, name, method, args, kwargs)
        for tally in tallies or ():
            tally.settle(True)
        return answer

    def entered(self, part: Any, name: str, original: Function, args: Any, kwargs: Any) -> Any:
        """One call of something below the model, by whichever of its methods."""
        scope = _top()
        if scope is None or (id(part), name) in self._idle or any(one.owner is part for one in _open()):
            return original(*args, **kwargs)
        by_method = name in TELLING
        if scope.names is not None:
            if id(part) not in scope.names:
                return original(*args, **kwargs)
        elif not by_method:
            if not _has_parameters(part):
                return original(*args, **kwargs)
            if not scope.trail.of((args, kwargs))[0]:
                return self._unseen(scope, original, args, kwargs)
        return self._evaluated(scope, part, name, original, args, kwargs)

    @staticmethod
    def _unseen(scope: _Scope, original: Function, args: Any, kwargs: Any) -> Any:
        """The answer of a part that is given no point."""
        with _closed():
            answer = original(*args, **kwargs)
        scope.trail.mark(answer, NOTHING)
        return answer

    def _evaluated(
        self, scope: _Scope, part: Any, name: str, original: Function, args: Any, kwargs: Any
    ) -> Any:
        """The answer of a part that may be a network."""
        by_method = name in TELLING
        about, layers = scope.trail.of((args, kwargs))
        key = (id(part), name)
        others = bool(layers - {key})
        tallies: list[Tally] | None
        if is_layer(part) or (others and not by_method and scope.names is None):
            answer, tallies = self._taken_whole(part, original, args, kwargs)
        else:
            answer, tallies = self._looked_at(part, name, original, args, kwargs)
        if tallies is None:
            scope.trail.mark(answer, (about, layers))
        else:
            scope.calls.append(_Call(part, by_method, others, key in layers, tallies))
            scope.trail.mark(answer, (True, layers if by_method else layers | {key}))
        return answer

    def _taken_whole(self, part: Any, method: Function, args: Any, kwargs: Any) -> tuple[Any, list[Tally]]:
        own = Tally(self.counts)
        with _closed():
            args, kwargs = self._tapped(own, part, args, kwargs)
            return method(*args, **kwargs), [own]

    def _looked_at(
        self, owner: Any, name: str, method: Function, args: Any, kwargs: Any
    ) -> tuple[Any, list[Tally] | None]:
        """The answer, and what is to be counted if this call of ``owner`` is; None where it runs no network."""
        if (id(owner), name) in self._single:
            return self._taken_whole(owner, method, args, kwargs)
        own = Tally(self.counts)
        args, kwargs = self._tapped(own, owner, args, kwargs)
        names = declared(owner)
        scope = _Scope(self, owner, None if names is None else _ids(names), _Trail(self.size), [])
        scope.trail.begin(args, kwargs)
        with _pushed(scope), ExitStack() as stack:
            if names is None and not _is_followed():
                stack.enter_context(_Following())
            if names:
                stack.enter_context(noticed(Reachable(names, _functions_of(owner, names))))
            answer = method(*args, **kwargs)
        tallies = scope.settled()
        if tallies:
            own.settle(False)
            return answer, tallies
        if _largest(scope.calls):  # another condition, or another time, may have it called twice
            return answer, [own]
        return answer, self._alone(owner, name, own, seen=bool(scope.calls) or names == [])

    def _alone(self, owner: Any, name: str, own: Tally, *, seen: bool) -> list[Tally] | None:
        """What counts where nothing below does: the call itself, but for a helper of a network, which runs no part."""
        if owner is not self.model and not seen and name not in ("forward", *METHODS):
            own.settle(False)
            self._idle[id(owner), name] = owner
            return None
        if seen or not self._told_of_below(owner):
            self._single[id(owner), name] = owner
            self._found = None
            if owner is self.model:
                self._known.add(name)
        return [own]

    def _told_of_below(self, owner: Any) -> bool:
        """Whether a call below ``owner`` is told of: below a model that names its networks, of these alone and of those
        that they name."""
        parts = reachable(owner).parts
        if declared(self.model) is None:
            return bool(parts)
        return any(id(part) in self._named for part in parts)

    @cached_property
    def _named(self) -> set[int]:
        every = (self.model, *reachable(self.model).parts)
        return set().union(*(_ids(names) for one in every if (names := declared(one))))

    def _below(self) -> Reachable:
        if declared(self.model) is not None:
            return Reachable([], [])
        if self._found is None:
            self._found = reachable(self.model, {part for part, _ in self._single})
        return self._found

    def _tapped(
        self, tally: Tally, part: Any, args: Any, kwargs: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with their floating tensors (x, t, s; not ``cond``) behind a tap."""
        found: list[Tensor] = []
        _gather(args, found)
        for name, value in kwargs.items():
            if name != "cond":
                _gather(value, found)
        if not found:
            found_any: list[Tensor] = []
            _gather((args, kwargs), found_any, floating=False)
            if not found_any:
                raise TypeError("a counted network is called with tensors x (and t, s)")
            tally.add("forwards", found_any[0].shape[0])
            return args, kwargs
        rows = self._rows(found[0]) * _models_of_a_vmap(part, found)
        behind = tap(tally, rows, found)
        if behind is found and not torch.is_grad_enabled():  # nothing stands before them
            return args, kwargs
        tapped = iter(behind)
        change = lambda _: next(tapped)  # noqa: E731
        cond = {"cond": kwargs["cond"]} if "cond" in kwargs else {}
        args, rest = _mapped((args, {name: kwargs[name] for name in kwargs if name != "cond"}), change)
        return args, {**rest, **cond}

    def _rows(self, x: Tensor) -> int:
        """Rows of x; of a single event, as the function in a vmap has it, one."""
        alone = x.ndim == len(getattr(self.model, "event_shape", ()))
        if alone and x.numel() == self.size and torch._C._are_functorch_transforms_active():
            return 1
        return x.shape[0]


# --- what is known of a call while it runs ---


@dataclass(frozen=True, eq=False)
class _Call:
    """A call of a part: ``touched`` by another part, or by ``itself``, before; ``tallies``: what it comes to."""

    part: Any
    by_method: bool
    touched: bool
    itself: bool
    tallies: list[Tally]


@dataclass(frozen=True)
class _Scope:
    """A call of ``owner`` that is being looked at; ``names``: ids of the networks it declares, if it does."""

    evaluations: Evaluations
    owner: Any
    names: set[int] | None
    trail: _Trail
    calls: list[_Call]

    def settled(self) -> list[Tally]:
        """What the calls come to that are evaluations of networks; that of the others is dropped."""
        counted = self._counted()
        for call in self.calls:
            if call not in counted:
                for tally in call.tallies:
                    tally.settle(False)
        return [tally for call in counted for tally in call.tallies]

    def _counted(self) -> list[_Call]:
        parts = [call for call in self.calls if not call.by_method]
        if self.names is not None or not any(_is_layer_of_another(call) for call in parts):
            return self.calls
        return [call for call in self.calls if call.by_method] or _most_of_the_weights(parts)


def _is_layer_of_another(call: _Call) -> bool:
    return call.touched or (call.itself and is_layer(call.part))


def _most_of_the_weights(calls: list[_Call]) -> list[_Call]:
    """The calls of a part with half of all parameters, if it was called several times and never on what it gave."""
    chosen = _largest(calls)
    return chosen if len(chosen) > 1 and not any(call.itself for call in chosen) else []


def _largest(calls: list[_Call]) -> list[_Call]:
    """The calls of the part that has half of all parameters and is no layer, if there is one."""
    parts = {id(call.part): call.part for call in calls if isinstance(call.part, nn.Module)}
    sizes = {key: sum(p.numel() for p in part.parameters()) for key, part in parts.items()}
    largest = max(sizes, key=lambda key: sizes[key], default=None)
    if largest is None or is_layer(parts[largest]) or 2 * sizes[largest] < sum(sizes.values()):
        return []
    return [call for call in calls if call.part is parts[largest]]


_LOCAL = threading.local()


def _told(part: Any, name: str, original: Function, *args: Any, **kwargs: Any) -> Any:
    """What stands in the place of a method: it tells of the call where one is being looked at."""
    scope = _top()
    if scope is None:
        return original(*args, **kwargs)
    return scope.evaluations.entered(part, name, original, args, kwargs)


noticed = partial(replaced, _told)


def _open() -> list[_Scope]:
    scopes: list[_Scope] = getattr(_LOCAL, "scopes", [])
    return [scope for scope in scopes if scope is not None]


def _top() -> _Scope | None:
    scopes = getattr(_LOCAL, "scopes", [])
    return scopes[-1] if scopes else None


@contextmanager
def _pushed(scope: _Scope | None) -> Iterator[None]:
    before = getattr(_LOCAL, "scopes", [])
    _LOCAL.scopes = [*before, scope]
    try:
        yield
    finally:
        _LOCAL.scopes = before


@contextmanager
def _closed() -> Iterator[None]:
    """Nothing is told of what happens in the block."""
    with _pushed(None), ExitStack() as stack:
        if _is_followed():
            stack.enter_context(_pop_mode_temporarily())
        yield


# --- where tensors come from ---

Mark = tuple[bool, frozenset[Key]]
"""Whether a tensor descends from the point, and the methods of parts that have worked on it."""

NOTHING: Mark = (False, frozenset())


class _Trail:
    def __init__(self, size: int) -> None:
        self._marks: Any = WeakTensorKeyDictionary()
        self._size = size

    def begin(self, args: Any, kwargs: Any) -> None:
        """The first floating tensor is the point; the others, times and conditions, are not."""
        found: list[Tensor] = []
        _gather((args, kwargs), found)
        for tensor in found[1:]:
            self._marks[tensor] = NOTHING
        for tensor in found[:1]:
            self._marks[tensor] = (True, frozenset())

    def of(self, values: Any) -> Mark:
        """What the tensors in ``values`` have behind them together."""
        found: list[Tensor] = []
        _gather(values, found, floating=False)
        marks = [mark for tensor in found if (mark := self._of(tensor)) is not None]
        return any(about for about, _ in marks), frozenset[Key]().union(*(layers for _, layers in marks))

    def _of(self, tensor: Tensor) -> Mark | None:
        mark: Mark | None = self._marks.get(tensor)
        if mark is not None or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return mark
        # a transform or a function of its own has made it: as large as a point it may well be one
        return (True, frozenset()) if tensor.numel() >= self._size else None

    def mark(self, values: Any, mark: Mark) -> None:
        """Note what the tensors in ``values`` have behind them."""
        found: list[Tensor] = []
        _gather(values, found, floating=False)
        for tensor in found:
            if not isinstance(tensor, nn.Parameter):
                self._marks[tensor] = mark


class _Following(TorchFunctionMode):
    """Marks what torch's functions answer by what they are given."""

    def __torch_function__(
        self, func: Function, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        scope = _top()
        if scope is not None and (isinstance(answer, Tensor | tuple | list) or func is Tensor.__setitem__):
            mark = scope.trail.of((args, kwargs))
            scope.trail.mark(args[0] if func is Tensor.__setitem__ else answer, mark)
        return answer


def _is_followed() -> bool:
    return isinstance(_get_current_function_mode(), _Following)  # type: ignore[no-untyped-call]


def _gather(value: Any, found: list[Tensor], *, floating: bool = True) -> None:
    """Add the tensors in tuples, lists and dicts to those that were found."""
    if isinstance(value, Tensor):
        if not floating or is_floating(value):
            found.append(value)
    elif type(value) is dict:
        for part in value.values():
            _gather(part, found, floating=floating)
    elif type(value) in (tuple, list):
        for part in value:
            _gather(part, found, floating=floating)


def _mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """``value`` with the floating tensors in its tuples, lists and dicts changed."""
    if isinstance(value, Tensor):
        return change(value) if is_floating(value) else value
    if type(value) is dict:
        return {name: _mapped(part, change) for name, part in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(part, change) for part in value)
    return value


def _functions_of(owner: Any, names: list[Any]) -> list[Holder]:
    """Where an owner holds declared networks that are plain functions or methods."""
    state = getattr(owner, "__dict__", {})
    functions = (FunctionType, MethodType, partial)
    return [
        (state, name)
        for name, value in state.items()
        if isinstance(value, functions) and any(value is one for one in names)
    ]


def _ids(names: list[Any]) -> set[int]:
    """Of the networks themselves, also where one of their methods is named."""
    return {id(one.__self__ if isinstance(one, MethodType) else one) for one in names}


# --- sizes ---


def _size(event_shape: Any) -> int:
    size = 1
    for number in event_shape if isinstance(event_shape, tuple | list | torch.Size) else ():
        size *= int(number)
    return size


def _has_parameters(part: Any) -> bool:
    return isinstance(part, nn.Module) and next(part.parameters(), None) is not None


def _models_of_a_vmap(part: Any, inputs: list[Tensor]) -> int:
    """Models that one call stands for, in vmaps over the parameters that the inputs take no part in."""
    if not isinstance(part, nn.Module) or not torch._C._are_functorch_transforms_active():
        return 1
    known = {level for tensor in inputs for level, _ in _levels(tensor)}
    weights = next(part.parameters(), None)
    count = 1
    for level, size in [] if weights is None else _levels(weights):
        count *= 1 if level in known else size
    return count


def _levels(tensor: Tensor) -> Iterator[tuple[int, int]]:
    """Level and size of every vmap that the tensor is batched in."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        inner = functorch.get_unwrapped(tensor)
        if functorch.is_batchedtensor(tensor):
            yield functorch.maybe_get_level(tensor), inner.shape[functorch.maybe_get_bdim(tensor)]
        tensor = inner
