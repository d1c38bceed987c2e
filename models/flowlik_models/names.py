"""One line for a name that is not known; nothing else, so that saying it loads no library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def unknown(kind: str, name: object, valid: Iterable[object]) -> str:
    """One line for an unknown name: the nearest match, then the valid names.

    >>> unknown("solver", "dopri", ("dopri5", "rk4"))
    "unknown solver 'dopri'; did you mean 'dopri5'? (valid: dopri5, rk4)"
    """
    names = [str(each) for each in valid]
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (valid: {', '.join(names) or 'none'})"
