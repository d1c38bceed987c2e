"""Objects of other libraries are known by the names of their classes, so that none of the libraries is imported."""

from __future__ import annotations


def class_names(thing: object) -> set[str]:
    """``library.Class`` of the object's class and of all that it derives from.

    >>> "collections.OrderedDict" in class_names(__import__("collections").OrderedDict())
    True
    """
    return {f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(thing).__mro__}
