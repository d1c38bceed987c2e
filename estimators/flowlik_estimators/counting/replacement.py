"""Methods of a model's parts replaced for the time of a call, and put back when the last call that needs it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from flowlik_estimators.counting.networks import METHODS, Reachable, is_layer

_ABSENT = object()
_LOCK = threading.Lock()


@dataclass
class _Place:
    """A place where a function lies, what lay there before, and how many calls need another in its place."""

    holder: Any
    key: Any
    before: Any
    users: int = 0


_PLACES: dict[Hashable, _Place] = {}


@contextmanager
def replaced(told: Callable[..., Any], found: Reachable) -> Iterator[None]:
    """``told(part, name, original, ...)`` takes the place of every method of these parts."""
    done: list[Hashable] = []
    try:
        with _LOCK:
            for holder, key in found.bound:
                method = _at(holder, key)
                if isinstance(method, partial) and method.func is told:  # replaced already, by another call
                    method = method.args[2]
                part, name = _part_and_name(method)
                done.append(_replace(holder, key, partial(told, part, name, method)))
            for part in found.parts:
                state = getattr(part, "__dict__", None)
                for name in () if state is None else _methods(part):
                    place = _PLACES.get((id(state), name))
                    original = place.before if place else getattr(part, name, None)
                    done.append(_replace(state, name, partial(told, part, name, original)))
        yield
    finally:
        with _LOCK:
            for place_key in done:
                _put_back(place_key)


def _part_and_name(method: Any) -> tuple[Any, str]:
    if isinstance(method, MethodType):
        return method.__self__, method.__func__.__name__
    return method, "forward"


def _replace(holder: Any, key: Any, function: Any) -> Hashable:
    name = (id(holder), key)
    place = _PLACES.setdefault(name, _Place(holder, key, _at(holder, key)))
    if place.users == 0:
        _put(holder, key, function)
    place.users += 1
    return name


def _put_back(name: Hashable) -> None:
    place = _PLACES[name]
    place.users -= 1
    if place.users == 0:
        del _PLACES[name]
        _put(place.holder, place.key, place.before)


def _at(holder: Any, key: Any) -> Any:
    if isinstance(holder, CellType):
        return holder.cell_contents
    return holder.get(key, _ABSENT) if isinstance(holder, dict) else holder[key]


def _put(holder: Any, key: Any, value: Any) -> None:
    if isinstance(holder, CellType):
        holder.cell_contents = value
    elif value is _ABSENT:
        holder.pop(key, None)
    else:
        holder[key] = value


def _methods(part: Any) -> list[str]:
    """Names of the methods of a part that may evaluate it: of a network of one's own all that its class defines."""
    names = list(METHODS)
    if isinstance(part, nn.Module):
        compiled = getattr(part, "_compiled_call_impl", None) is not None
        names += ["forward", *(["_compiled_call_impl"] if compiled else [])]
        names += [] if is_layer(part) else _own_functions(type(part))
    return [name for name in dict.fromkeys(names) if callable(getattr(part, name, None))]


def _own_functions(kind: type) -> list[str]:
    found = []
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] != "torch":
            found += [name for name, value in vars(base).items() if isinstance(value, FunctionType)]
    return [name for name in found if not name.startswith("__")]
