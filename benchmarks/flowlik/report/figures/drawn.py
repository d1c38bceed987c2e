"""The list of the figures that were drawn into a folder, with which only those are ever removed.

`figures/.drawn.json` maps the name of a file to the SHA-256 of what was written. A file is removed only where its name
and its content are those of the list: pictures of the user's own, and figures of versions without a list, stay.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from flowlik_models.files import write_atomically

LIST: Final = ".drawn.json"


def keep_only(folder: Path, paths: Iterable[Path]) -> None:
    """Remove from `folder` what an earlier call drew and this one did not, and note `paths` as drawn."""
    drawn = {path.name: _digest(path) for path in paths}
    before = _noted(folder)
    for name, digest in before.items():
        path = folder / name
        if name not in drawn and Path(name).name == name and path.is_file() and _digest(path) == digest:
            path.unlink()
    if drawn != before:
        text = json.dumps(drawn, indent=2, sort_keys=True)
        write_atomically(folder / LIST, text.encode() + b"\n")


def _noted(folder: Path) -> dict[str, str]:
    """Name and digest of every file that was drawn; none where there is no list, or a damaged one."""
    with suppress(OSError, ValueError):
        noted = json.loads((folder / LIST).read_text(encoding="utf-8"))
        if isinstance(noted, dict):
            return {name: digest for name, digest in noted.items() if isinstance(digest, str)}
    return {}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
