"""Answers of a worker through its pipe: each behind a token, so that nothing else that gets into the pipe passes.

A cell is anybody's code and lives in the worker, so its answers are read as what records hold, plain values and numpy
arrays, and nothing that they name is called.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Mapping
from typing import Any, Final

TOKEN = 16
_LENGTH = 8
_HEAD = TOKEN + _LENGTH
_PIECE = 1 << 20
_ARRAYS: Final = frozenset({"_reconstruct", "_frombuffer", "scalar", "ndarray", "dtype"})
"""What numpy's pickles of arrays and numbers name; a dtype of objects holds values that are restricted likewise."""


class ForeignBytesError(Exception):
    """The pipe holds what no worker wrote there."""


class _Reader(pickle.Unpickler):
    """Reads plain values and numpy arrays; ValueError for anything else."""

    def find_class(self, module: str, name: str) -> Any:
        """Only numpy's own, by name."""
        if _is_numpys(module) and name in _ARRAYS:
            return super().find_class(module, name)
        raise ValueError(
            f"the cell's answer holds a {module}.{name}; records hold plain values and numpy arrays"
        )


def send(descriptor: int, token: bytes, answer: Any) -> None:
    """Write an answer; what is neither a plain value nor an array goes as the records would write it."""
    data = pickle.dumps(_plain(answer))
    message = memoryview(token + len(data).to_bytes(_LENGTH, "little") + data)
    while message:
        message = message[os.write(descriptor, message) :]


def _plain(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str) or _is_numpys(type(value).__module__):
        return value
    if isinstance(value, Mapping):
        return {str(name): _plain(held) for name, held in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_plain, value)] if isinstance(value, list) else (*map(_plain, value),)
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _is_numpys(module: str) -> bool:
    return module.partition(".")[0] == "numpy"


class Answers:
    """The other end: what has come so far."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._came = bytearray()

    def take(self) -> tuple[bool, Any] | None:
        """The answer, once it has come whole.

        Raises:
            ForeignBytesError: it is none, or something follows it that nobody asked for.
            ValueError: it holds something other than plain values and arrays.
        """
        if not self._token.startswith(bytes(self._came[:TOKEN])):
            raise ForeignBytesError
        if len(self._came) < _HEAD:
            return None
        end = _HEAD + int.from_bytes(self._came[TOKEN:_HEAD], "little")
        if len(self._came) < end:
            return None
        if len(self._came) > end:
            raise ForeignBytesError
        data, self._came = bytes(self._came[_HEAD:]), bytearray()
        try:
            understood, answer = _Reader(io.BytesIO(data)).load()
        except ValueError:
            raise
        except Exception:  # of whatever kind: pickles raise as they like
            raise ForeignBytesError from None
        return understood, answer

    def read_from(self, descriptor: int) -> None:
        """Read what is there. Raises EOFError at the end."""
        piece = os.read(descriptor, _PIECE)
        if not piece:
            raise EOFError
        self._came += piece
