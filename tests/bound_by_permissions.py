"""Permissions that count: the root of a container may read and write everything, and most people may not."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION_3 = 0x20080522
_OVERRIDE = 0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of linux/capability.h


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _Data(ctypes.Structure):
    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inherited", ctypes.c_uint32),
    ]


@contextmanager
def bound_by_permissions() -> Iterator[None]:
    """This thread heeds the permissions of files in the block, root or not."""
    if not sys.platform.startswith("linux"):
        yield
        return
    library, header, data = ctypes.CDLL(None), _Header(_VERSION_3, 0), (_Data * 2)()
    assert library.capget(ctypes.byref(header), data) == 0
    before = data[0].effective
    data[0].effective = before & ~_OVERRIDE
    assert library.capset(ctypes.byref(header), data) == 0
    try:
        yield
    finally:
        data[0].effective = before
        assert library.capset(ctypes.byref(header), data) == 0
