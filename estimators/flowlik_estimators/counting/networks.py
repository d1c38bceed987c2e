"""Where the networks of a model lie: those it names, and all that can be reached from it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import nn
from torch.jit import ScriptModule

from flowlik_models.interfaces import CAPABILITIES, EVALUATING_METHODS

METHODS = EVALUATING_METHODS

OF_FLOWS = (*CAPABILITIES["exact inverse"].attributes, *CAPABILITIES["exact sampler"].attributes)
TELLING = tuple(name for name in METHODS if name not in OF_FLOWS)
"""Methods whose name says that a part is a network; an `inverse` scalers and layers have too."""

MOST = 20_000
"""Objects looked at; beyond that a model holds something that is no part of it."""

LONGEST = 1_000
"""A longer list or dict is a record of something, not a collection of networks."""

_ATOMS = (str, bytes, int, float, complex, bool, type(None), type)
_LIBRARIES = frozenset({"torch", "numpy", "scipy", "pandas", "sklearn"}) | sys.stdlib_module_names - {
    "__main__"
}
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def inner_networks(model: object) -> tuple[str, ...]:
    """The attributes that a model of several networks lists in ``networks``; empty where it names none."""
    named = getattr(model, "networks", ())
    if isinstance(named, str):
        return (named,)
    if isinstance(named, nn.Module | Mapping) or not isinstance(named, Iterable):
        return ()
    return tuple(name for name in named if isinstance(name, str))


def declared(model: object) -> list[Any] | None:
    """The networks that the model names in ``networks``, one by one; None where it says nothing of them.

    ``networks`` is a sequence of attributes (``"net"``, ``"pair.weak"``), each a network or a collection of some, or it
    is such a collection itself.
    """
    if not hasattr(model, "networks"):
        return None
    named: Any = model.networks
    names = inner_networks(model)
    held = [attrgetter(name)(model) for name in names] if names else [named]
    found = [network for value in held for network in _each(value)]
    return found if found or (isinstance(named, Sequence) and not named) else None


def _each(value: Any) -> Iterator[Any]:
    if isinstance(value, nn.ModuleDict | Mapping):
        value = list(value.values())
    if isinstance(value, nn.ModuleList | list | tuple | set | frozenset):
        for part in value:
            yield from _each(part)
    elif callable(value) or any(hasattr(value, name) for name in METHODS):
        yield value


Holder = tuple[Any, Any]
"""A dict or list with a key, or a cell with None: where a function lies."""


@dataclass(frozen=True)
class Reachable:
    """``parts``: modules, and objects with evaluating methods; ``bound``: where a module's method is held by itself."""

    parts: list[Any]
    bound: list[Holder]


def reachable(model: Any, closed: Iterable[int] = ()) -> Reachable:
    """All to which the model leads, itself left out.

    It leads there by attributes, collections, bound methods, partials, and functions by what they close over, default
    to or name among the globals of their module. What lies below the objects whose ids are ``closed`` is left out, and
    so is what lies below modules of torch that run their parts themselves.
    """
    search = _Search(model, frozenset(closed))
    return Reachable(search.parts, search.bound)


def is_layer(module: Any) -> bool:
    """A module of torch or a compiled or scripted one, and no container: what it is made of does not count."""
    if not isinstance(module, nn.Module) or isinstance(module, _CONTAINERS):
        return False
    return _is_library(type(module)) or isinstance(module, ScriptModule) or _is_compiled(module)


def is_compiled(function: Any) -> bool:
    """Whether torch.compile made it: what runs inside is not to be looked at."""
    function = getattr(function, "__func__", function)
    return hasattr(function, "_torchdynamo_orig_callable")


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_library(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _LIBRARIES


class _Search:
    def __init__(self, model: Any, closed: frozenset[int]) -> None:
        self.parts: list[Any] = []
        self.bound: list[Holder] = []
        self.seen: set[int] = set()
        self.open = [model]
        while self.open and len(self.seen) < MOST:
            value = self.open.pop()
            if id(value) in self.seen or isinstance(value, _ATOMS):
                continue
            self.seen.add(id(value))
            if value is not model and _may_evaluate(value):
                self.parts.append(value)
                if id(value) in closed or is_layer(value):
                    continue
            self.open.extend(self._held(value))

    def _held(self, value: Any) -> Iterable[Any]:
        if isinstance(value, FunctionType):
            return self._of_function(value)
        if isinstance(value, MethodType):
            return (value.__self__, value.__func__)
        if isinstance(value, partial):
            return (value.func, *value.args, *value.keywords.values())
        if isinstance(value, Mapping | list | tuple | set | frozenset):
            return self._of_collection(value) if len(value) <= LONGEST else ()
        return self._of_object(value)

    def _of_collection(self, value: Any) -> Iterator[Any]:
        if isinstance(value, dict | list):
            for key, part in list(value.items() if isinstance(value, dict) else enumerate(value)):
                self._note(value, key, part)
        yield from list(value.values()) if isinstance(value, Mapping) else value

    def _note(self, holder: Any, key: Any, value: Any) -> None:
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            self.bound.append((holder, key))

    def _of_function(self, function: FunctionType) -> Iterator[Any]:
        for cell in function.__closure__ or ():
            try:
                self._note(cell, None, cell.cell_contents)
                yield cell.cell_contents
            except ValueError:  # not yet filled
                continue
        yield from function.__defaults__ or ()
        yield from (function.__kwdefaults__ or {}).values()
        yield getattr(function, "__wrapped__", None)
        for name in _names(function.__code__):
            value = function.__globals__.get(name)
            if isinstance(value, nn.Module | list | tuple | dict) or (
                isinstance(value, FunctionType) and value.__module__ == function.__module__
            ):
                yield value

    def _of_object(self, value: Any) -> Iterator[Any]:
        kind = type(value)
        if isinstance(value, nn.Module):
            yield from value._modules.values()
        elif _is_library(kind) and kind.__name__ != "SimpleNamespace":
            return
        state = getattr(value, "__dict__", {})
        for name, part in list(state.items()):
            if not (isinstance(value, nn.Module) and name in _OF_MODULES):
                self._note(state, name, part)
                yield part
        for base in kind.__mro__:
            if _is_library(base):
                continue
            for slot in vars(base).get("__slots__", ()):
                yield getattr(value, slot, None)
            for part in vars(base).values():
                part = getattr(part, "__func__", getattr(part, "fget", part))
                if isinstance(part, FunctionType | nn.Module):
                    yield part


_OF_MODULES = frozenset(vars(nn.Module()))


def _may_evaluate(value: Any) -> bool:
    if isinstance(value, nn.Module):
        return True
    kind = type(value)
    return (
        hasattr(value, "__dict__") and not _is_library(kind) and any(hasattr(kind, name) for name in TELLING)
    )


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _names(inner)
