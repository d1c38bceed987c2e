"""Files against their published checksums."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from flowlik_models.images.errors import DataError

_PIECE = 2**20


def verify(path: Path, expected: str) -> None:
    """Raise DataError unless the file has the digest ``expected``, ``md5:...`` or ``sha256:...``."""
    found = digest_of(path, expected.partition(":")[0])
    if found != expected:
        raise DataError(
            f"{path}: expected {_words(expected)}, found {_words(found)} ({path.stat().st_size} bytes): "
            "the file is truncated, altered or of another release"
        )


def digest_of(path: Path, kind: str) -> str:
    """``kind:hexadecimal`` of a file's bytes; the answer is kept as long as size and time of change are the same.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        stat = path.stat()
        return _digest(path, kind, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@lru_cache(maxsize=64)
def _digest(path: Path, kind: str, size: int, changed: int) -> str:
    state = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            state.update(piece)
    return f"{kind}:{state.hexdigest()}"


def _words(digest: str) -> str:
    kind, _, hexadecimal = digest.partition(":")
    return f"{kind.upper()} {hexadecimal}"
