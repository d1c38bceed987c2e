"""The estimators by name: a plain dict, filled by `@register` in this package's modules and by other packages.

The public modules of this package are all imported with it (`load_families`), so that a new one needs no entry
anywhere.
A package adds an estimator by an entry point in the group ``flowlik.estimators`` that names the class, whose name is
then the entry point's, or a module that registers some; entry points are loaded the first time a name is looked up.
"""

from __future__ import annotations

import copyreg
import math
import pkgutil
import re
from collections.abc import Callable
from importlib import import_module
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from flowlik_estimators.base import Estimator, _options
from flowlik_models.names import unknown
from flowlik_models.plugins import load_plugins

ENTRY_POINT_GROUP = "flowlik.estimators"
MOST = 10_000
"""Estimators that one specification may spell."""

_REGISTRY: dict[str, type[Estimator]] = {}
_LOADED: set[str] = set()
_SPEC = re.compile(r"\s*(?P<name>[^\[\]\s]+)\s*(?:\[(?P<options>[^\[\]]*)\])?\s*")
E = TypeVar("E", bound=Estimator)


def register(name: str) -> Callable[[type[E]], type[E]]:
    """Class decorator that enters an estimator under ``name``.

    Raises:
        ValueError: the name is taken by another class.

    >>> from dataclasses import dataclass
    >>> @register("zero")
    ... @dataclass(frozen=True, kw_only=True)
    ... class Zero(Estimator):
    ...     level: float = 0.0
    >>> get("zero", level=2.0).label
    'zero[level=2.0]'
    """

    def enter(kind: type[E]) -> type[E]:
        owner = _REGISTRY.get(name)
        if owner is not None and (owner.__module__, owner.__qualname__) != (
            kind.__module__,
            kind.__qualname__,
        ):
            raise ValueError(
                f"estimator {name!r} is already registered by {owner.__module__}.{owner.__qualname__}"
            )
        kind.name = name
        _REGISTRY[name] = kind
        return kind

    return enter


def load_families() -> None:
    """Import every public module of this package; one that holds estimators enters them by `register`."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if not module.name.startswith("_"):
            import_module(f"{__package__}.{module.name}")


def available() -> dict[str, type[Estimator]]:
    """All registered estimators, name -> class, sorted by name.

    >>> {"ode", "f2d2"} <= set(available())
    True
    """
    _load_entry_points()
    return dict(sorted(_REGISTRY.items()))


def get(name: str, **params: Any) -> Estimator:
    """The estimator of that name with these options.

    Raises:
        ValueError: unknown name, option or value, in one line that lists the valid ones.

    >>> get("ode", solver="rk4", steps=8).label
    'ode[solver=rk4,steps=8]'
    >>> get("ode", solver="rk5")
    Traceback (most recent call last):
        ...
    ValueError: ode: unknown solver 'rk5'; did you mean 'rk4'? (valid: dopri5, ...)
    """
    kinds = available()
    if name not in kinds:
        raise ValueError(unknown("estimator", name, kinds))
    kind = kinds[name]
    for option in params:
        if option not in _options(kind):
            raise ValueError(f"{name}: {unknown('parameter', option, _options(kind))}")
    return kind(**params)


def parse_spec(spec: str) -> list[Estimator]:
    """Estimators from ``name[key=value,key=v1|v2]``; values apart by ``|`` are crossed, the last key fastest.

    Raises:
        ValueError: the text is not of that form, spells more than `MOST`, or as `get`.

    >>> [estimator.label for estimator in parse_spec("f2d2[steps=1|2,grid=cosine]")]
    ['f2d2[steps=1,grid=cosine]', 'f2d2[steps=2,grid=cosine]']
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"cannot read estimator {spec!r}; the form is name[key=value,key=value|value]")
    choices: dict[str, list[Any]] = {}
    for part in (match["options"] or "").split(","):
        if not part.strip():
            if (match["options"] or "").strip():
                raise ValueError(f"cannot read estimator {spec!r}: an option is empty")
            continue
        key, equals, values = (piece.strip() for piece in part.partition("="))
        if not (key and equals and values):
            raise ValueError(
                f"cannot read {part.strip()!r} in {spec!r}; the form is key=value or key=value|value"
            )
        if key in choices:
            raise ValueError(f"parameter {key!r} is given twice in {spec!r}")
        choices[key] = [_value(value.strip()) for value in values.split("|")]
    if (number := math.prod(map(len, choices.values()))) > MOST:
        raise ValueError(f"{match['name']}[...] spells {number:,} estimators, expected at most {MOST:,}")
    return [
        get(match["name"], **dict(zip(choices, pick, strict=True))) for pick in product(*choices.values())
    ]


def _value(text: str) -> Any:
    """The value a text spells: none, true, false, a whole number, a number, or else itself."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load_entry_points() -> None:
    if ENTRY_POINT_GROUP not in _LOADED:
        load_plugins(ENTRY_POINT_GROUP, dict(_REGISTRY), _admitted)
        _LOADED.add(ENTRY_POINT_GROUP)


def _admitted(name: str, loaded: object) -> None:
    """Enter a class under its entry point's name; a module, or a class with `@register`, has entered by itself.

    Raises:
        TypeError: neither a module nor an estimator. ValueError: the class goes by another name.
    """
    if isinstance(loaded, ModuleType):
        return
    if not (isinstance(loaded, type) and issubclass(loaded, Estimator)):
        raise TypeError(f"expected a subclass of Estimator, or a module that registers some, got {loaded!r}")
    own = next((known for known, kind in _REGISTRY.items() if kind is loaded), None)
    if own is None:
        register(name)(loaded)
        copyreg.pickle(loaded, _with_its_name)  # type: ignore[arg-type]
    elif own != name:
        raise ValueError(f"it is registered as {own!r}, the name to use")


def _with_its_name(estimator: Estimator) -> tuple[Any, ...]:
    """A pickle that carries the entry point's name: the process that reads it may not have read the entry points."""
    return (_named, (type(estimator), estimator.name), *estimator.__reduce_ex__(2)[2:])


def _named(kind: type[Estimator], name: str) -> Estimator:
    kind.name = name
    return kind.__new__(kind)
