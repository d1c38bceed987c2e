"""float32 means float32: no product of matrices and no convolution is taken with fewer bits behind a caller's back.

GPUs since Ampere take products of float32 with a mantissa of 10 bits (TF32) where torch's settings allow it, as they do
for convolutions from the start; CPUs take them in bfloat16 where they are asked to, and both under an autocast that a
caller left on. Log-densities are then off by as much as estimators are told apart by. Whoever wants that speed gives a
model parameters, or an autocast inside it, of that type.
"""

from __future__ import annotations

import threading
from contextlib import ContextDecorator, ExitStack
from functools import cache
from typing import Any

import torch

_lock = threading.Lock()
_users = 0
_before: tuple[str, bool | None, list[str]] | None = None


def full_float32() -> FullFloat32:
    """Full precision inside; torch's settings, which are the process's, are put back when the last thread leaves.

    >>> torch.set_float32_matmul_precision("high")
    >>> with full_float32():
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'high'
    >>> torch.set_float32_matmul_precision("highest")
    """
    return FullFloat32()


class FullFloat32(ContextDecorator):
    """What `full_float32` gives: of its own, as every call of an estimator passes it and a generator takes longer."""

    def _recreate_cm(self) -> FullFloat32:
        return FullFloat32()  # one a call of a decorated function

    def __enter__(self) -> None:
        global _users, _before
        with _lock:
            _users += 1
            if _users == 1:
                settings = _settings()
                _before = None if _is_full(*settings) else settings
                if _before is not None:
                    use_full_float32()
        self._autocast = [device for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)]
        if self._autocast:
            self._stack = ExitStack()
            for device in self._autocast:
                self._stack.enter_context(torch.autocast(device, enabled=False))

    def __exit__(self, *failure: object) -> None:
        global _users
        try:
            if self._autocast:
                self._stack.close()
        finally:
            with _lock:
                _users -= 1
                if _users == 0 and _before is not None:
                    _restore(*_before)


def use_full_float32() -> None:
    """Full precision from now on, in a process that is the suite's own."""
    products, convolutions, _ = _settings()
    if products != "highest":  # written anew it is slow, and another setting of the parts
        torch.set_float32_matmul_precision("highest")
    if convolutions is not False:
        torch.backends.cudnn.allow_tf32 = False
    for part, value in zip(_parts(), _precisions(), strict=True):
        if value not in ("none", "ieee"):  # allowed for all parts at once
            part.fp32_precision = "ieee"


_PARTS = (
    ("cuda", "matmul"),
    ("cuda", "conv"),
    ("cuda", "rnn"),
    ("mkldnn", "matmul"),
    ("mkldnn", "conv"),
    ("mkldnn", "rnn"),
)


@cache
def _known() -> list[tuple[tuple[str, str], Any]]:
    """Names of the parts that this version of torch has a setting of its own for, and where it is set."""
    backends = torch.backends
    places = [getattr(backends.cuda, "matmul", None)]
    for library, names in ((backends.cudnn, ("conv", "rnn")), (backends.mkldnn, ("matmul", "conv", "rnn"))):
        places += [getattr(library, name, None) for name in names]
    known = zip(_PARTS, places, strict=True)
    return [(name, place) for name, place in known if hasattr(place, "fp32_precision")]


def _parts() -> list[Any]:
    return [place for _, place in _known()]


_READ = getattr(torch._C, "_get_fp32_precision_getter", None)
"""What the properties of the parts read, in half of their time."""


def _precisions() -> list[str]:
    if _READ is None:
        return [place.fp32_precision for _, place in _known()]
    return [_READ(*name) for name, _ in _known()]


def _settings() -> tuple[str, bool | None, list[str]]:
    try:
        convolutions: bool | None = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # convolutions and recurrent networks differ
        convolutions = None
    return torch.get_float32_matmul_precision(), convolutions, _precisions()


def _is_full(products: str, convolutions: bool | None, parts: list[str]) -> bool:
    return products == "highest" and convolutions is False and all(part in ("none", "ieee") for part in parts)


def _restore(products: str, convolutions: bool | None, parts: list[str]) -> None:
    if torch.get_float32_matmul_precision() != products:
        torch.set_float32_matmul_precision(products)
    if convolutions is not None:
        torch.backends.cudnn.allow_tf32 = convolutions
    if _precisions() == parts:
        return
    for part, value in zip(_parts(), parts, strict=True):
        if part.fp32_precision != value:
            part.fp32_precision = "none"  # whatever holds for all parts
        if part.fp32_precision != value:
            part.fp32_precision = value
