"""The list of the figures that were drawn into a folder, with which only those are ever removed.

`figures/.drawn.json` maps the name of a file to the SHA-256 of what was written. A file is removed only where its name
and its content are those of the list: pictures of the user's own, and figures of versions without a list, stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from flowlik_models.files import write_atomically

LIST: Final = ".drawn.json"
UNFINISHED: Final = ""
"""Stands in the list, where no file's name does, until all figures are in place."""


def put_into(folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Move drawn figures into `folder`, remove what an earlier call drew and this one did not; where they are now.

    The list is written first and says that figures are missing until all are in place.
    """
    drawn = {path.name: _digest(path) for path in paths}
    before = _noted(folder)
    if not drawn and not before:
        return []
    _write(folder, before | drawn | {UNFINISHED: True})
    placed = [path.replace(folder / path.name) for path in paths]
    for name, digest in before.items():
        path = folder / name
        if name not in drawn and Path(name).name == name and path.is_file() and _digest(path) == digest:
            path.unlink()
    _write(folder, drawn)
    return placed


def are_there(folder: Path) -> bool:
    """Whether a folder holds figures, and not only some of a drawing that was interrupted."""
    return any(folder.glob("*.png")) and UNFINISHED not in _content(folder)


def _write(folder: Path, noted: Mapping[str, Any]) -> None:
    text = json.dumps(noted, indent=2, sort_keys=True)
    write_atomically(folder / LIST, text.encode() + b"\n")


def _noted(folder: Path) -> dict[str, str]:
    """Name and digest of every file that was drawn; none where there is no list, or a damaged one."""
    return {name: digest for name, digest in _content(folder).items() if isinstance(digest, str)}


def _content(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError, RecursionError):
        noted = json.loads((folder / LIST).read_text(encoding="utf-8"))
        if isinstance(noted, dict):
            return noted
    return {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
