"""What is remembered of a model from one call of an estimator to the next: the methods in which it is one network."""

from __future__ import annotations

import weakref
from typing import Any

_KNOWN: dict[int, tuple[Any, tuple[Any, ...], set[str]]] = {}


def known_of(model: Any) -> set[str]:
    """The set of these methods, to be added to; empty again where an attribute of the model has become another."""
    state = _state(model)
    found = _KNOWN.get(id(model))
    if found is not None and found[0]() is model and found[1] == state:
        return found[2]
    methods: set[str] = set()
    key = id(model)
    try:
        reference = weakref.ref(model, lambda _: _KNOWN.pop(key, None))
    except TypeError:  # of a class with slots
        return methods
    _KNOWN[key] = (reference, state, methods)
    return methods


def _state(model: Any) -> tuple[Any, ...]:
    own = getattr(model, "__dict__", {})
    parts = own.get("_modules", {})
    return (type(model), *((name, id(value)) for held in (own, parts) for name, value in held.items()))
