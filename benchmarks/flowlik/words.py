"""One line for a name that is not known; nothing else, so that saying it loads no library."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def unknown(kind: str, name: str, valid: Sequence[str]) -> str:
    """One line for an unknown name: the nearest match and the valid names."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}{hint} (valid: {', '.join(valid)})"
