"""One-line messages about names: what is valid, and what was probably meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(what: str, given: object, valid: Iterable[str]) -> str:
    """``what 'given' ... valid: a, b (did you mean 'a'?)``, on one line."""
    names = [str(name) for name in valid]
    near = get_close_matches(str(given), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{what} {given!r}; valid: {', '.join(names) or 'none'}{hint}"
