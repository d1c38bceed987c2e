"""What other packages add by entry points, read in one way for every group; nothing else, so that it loads no library.

A name belongs to one owner: given twice, or by a built-in, it is refused, for a record must not depend on which came
first. A plug-in that cannot be loaded is left out with a warning of one line, and the rest works.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container, Iterator
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

T = TypeVar("T")
_LOADING: set[str] = set()


def load_plugins(group: str, builtin: Container[str], admit: Callable[[str, Any], T]) -> dict[str, T]:
    """What the entry points of a group give, by the entry points' names.

    A plug-in that looks into its own group while it is imported finds none there.

    Args:
        group: such as ``flowlik.tasks``.
        builtin: names that flowlik itself has in this group.
        admit: turns a name and the object its entry point gives into what is wanted; what it raises leaves it out.

    Raises:
        ValueError: a name is given twice, or is a built-in's; the line names both owners.

    >>> load_plugins("flowlik.nobody_gives_these", (), lambda name, thing: thing)
    {}
    """
    if group in _LOADING:
        return {}
    points = list(_owned_once(group, builtin))
    _LOADING.add(group)
    try:
        return dict(pair for point in points for pair in _loaded(point, admit))
    finally:
        _LOADING.discard(group)


def _owned_once(group: str, builtin: Container[str]) -> Iterator[EntryPoint]:
    owners: dict[str, str] = {}
    for point in entry_points(group=group):
        owner = "flowlik itself" if point.name in builtin else owners.get(point.name)
        if owner is not None:
            raise ValueError(
                f"{group}: the name {point.name!r} belongs to {owner}, and {_owner(point)} gives it too; "
                "rename or uninstall one"
            )
        owners[point.name] = _owner(point)
        yield point


def _owner(point: EntryPoint) -> str:
    return point.value if point.dist is None else f"{point.value} of {point.dist.name}"


def _loaded(point: EntryPoint, admit: Callable[[str, Any], T]) -> Iterator[tuple[str, T]]:
    """The name and the object of one entry point; nothing, and a warning, where it raises or ends the program."""
    try:
        yield point.name, admit(point.name, point.load())
    except (Exception, SystemExit) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        message = f"plug-in {point.name!r} ({_owner(point)}) is left out: {why}"
        warnings.warn_explicit(
            message, UserWarning, filename=point.group, lineno=1
        )  # no source line below it
