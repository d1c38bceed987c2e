"""The estimators by name: a plain dict, filled by `@register` here and by entry points of other packages.

A package adds an estimator by `@register("name")` and an entry point in the group ``flowlik.estimators`` that
names the class or its module; entry points are loaded the first time a name is looked up.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from itertools import product
from typing import Any, TypeVar

from flowlik_estimators.base import Estimator, _options
from flowlik_models.names import unknown

ENTRY_POINT_GROUP = "flowlik.estimators"

_REGISTRY: dict[str, type[Estimator]] = {}
_LOADED: set[str] = set()
_SPEC = re.compile(r"\s*(?P<name>[^\[\]\s]+)\s*(?:\[(?P<options>[^\[\]]*)\])?\s*")
E = TypeVar("E", bound=Estimator)


def register(name: str) -> Callable[[type[E]], type[E]]:
    """Class decorator that enters an estimator under ``name``.

    Raises:
        ValueError: the name is taken by another class.
    """

    def enter(kind: type[E]) -> type[E]:
        held = _REGISTRY.get(name)
        if held is not None and (held.__module__, held.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(
                f"estimator {name!r} is already registered by {held.__module__}.{held.__qualname__}"
            )
        kind.name = name
        _REGISTRY[name] = kind
        return kind

    return enter


def available() -> dict[str, type[Estimator]]:
    """All registered estimators, name -> class, sorted by name."""
    _load_entry_points()
    return dict(sorted(_REGISTRY.items()))


def get(name: str, **params: Any) -> Estimator:
    """The estimator of that name with these options.

    Raises:
        ValueError: unknown name, option or value, in one line that lists the valid ones.
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
        ValueError: the text is not of that form, or as `get`.
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
    if ENTRY_POINT_GROUP in _LOADED:
        return
    _LOADED.add(ENTRY_POINT_GROUP)  # before loading: a plugin may look names up while it is imported
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded = point.load()
            if (
                isinstance(loaded, type)
                and issubclass(loaded, Estimator)
                and loaded not in _REGISTRY.values()
            ):
                register(point.name)(loaded)
        except Exception as error:  # a broken plugin must not take the suite down
            warnings.warn(f"estimator plugin {point.name!r} cannot be loaded: {error}", stacklevel=2)
