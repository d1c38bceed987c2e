"""Parameters frozen constant for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No graph to these parameters, only through them to the input; afterwards they are as before."""
    found = [p for p in parameters if p.requires_grad and p.is_leaf]
    for p in found:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in found:
            p.requires_grad_(True)
