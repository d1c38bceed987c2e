"""Answers of a worker through its pipe: each behind a token, so that nothing else that gets into the pipe passes."""

from __future__ import annotations

import os
import pickle
from typing import Any

TOKEN = 16
_LENGTH = 8
_HEAD = TOKEN + _LENGTH
_PIECE = 1 << 20


class ForeignBytesError(Exception):
    """The pipe holds what no worker wrote there."""


def send(descriptor: int, token: bytes, answer: Any) -> None:
    """Write an answer."""
    data = pickle.dumps(answer)
    message = memoryview(token + len(data).to_bytes(_LENGTH, "little") + data)
    while message:
        message = message[os.write(descriptor, message) :]


class Answers:
    """The other end: what has come so far."""

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._came = bytearray()

    def take(self) -> tuple[bool, Any] | None:
        """The answer, once it has come whole.

        Raises:
            ForeignBytesError: it is none, or something follows it that nobody asked for.
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
            understood, answer = pickle.loads(data)
        except Exception:  # of whatever kind: pickles raise as they like
            raise ForeignBytesError from None
        return understood, answer

    def read_from(self, descriptor: int) -> None:
        """Read what is there. Raises EOFError at the end."""
        piece = os.read(descriptor, _PIECE)
        if not piece:
            raise EOFError
        self._came += piece
