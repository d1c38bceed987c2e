"""float32 means float32: no product of matrices and no convolution is taken with fewer bits behind a caller's back.

GPUs since Ampere take products of float32 with a mantissa of 10 bits (TF32) where torch's settings allow it, as they do
for convolutions from the start; CPUs take them in bfloat16 where they are asked to, and both under an autocast that a
caller left on. Log-densities are then off by as much as estimators are told apart by. Whoever wants that speed gives a
model parameters, or an autocast inside it, of that type.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_before: tuple[str, bool | None, list[str]] | None = None


@contextmanager
def full_float32() -> Iterator[None]:
    """Full precision inside; torch's settings, which are the process's, are put back when the last thread leaves.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_float32():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'high'
    >>> torch.set_float32_matmul_precision("highest")
    """
    global _users, _before
    with _lock:
        _users += 1
        if _users == 1:
            settings = _settings()
            _before = None if _is_full(*settings) else settings
            if _before is not None:
                use_full_float32()
    try:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0 and _before is not None:
                _restore(*_before)


def use_full_float32() -> None:
    """Full precision from now on, in a process that is the suite's own."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for part in _parts():
        if part.fp32_precision not in ("none", "ieee"):  # allowed for all parts at once
            part.fp32_precision = "ieee"


@cache
def _parts() -> list[Any]:
    """What newer versions of torch have a setting of its own for."""
    backends = torch.backends
    known = [getattr(backends.cuda, "matmul", None)]
    for library, names in ((backends.cudnn, ("conv", "rnn")), (backends.mkldnn, ("matmul", "conv", "rnn"))):
        known += [getattr(library, name, None) for name in names]
    return [part for part in known if hasattr(part, "fp32_precision")]


def _settings() -> tuple[str, bool | None, list[str]]:
    try:
        convolutions: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # convolutions and recurrent networks differ
        convolutions = None
    return torch.get_float32_matmul_precision(), convolutions, [part.fp32_precision for part in _parts()]


def _is_full(products: str, convolutions: bool | None, parts: list[str]) -> bool:
    return products == "highest" and convolutions is False and all(part in ("none", "ieee") for part in parts)


def _restore(products: str, convolutions: bool | None, parts: list[str]) -> None:
    torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    for part, value in zip(_parts(), parts, strict=True):
        if part.fp32_precision != value:
            part.fp32_precision = "none"  # whatever holds for all parts
        if part.fp32_precision != value:
            part.fp32_precision = value
