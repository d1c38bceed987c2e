"""Where a worker finds modules: where this process does, but not in the working directory first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[3]


def module_path() -> str:
    """`sys.path` as PYTHONPATH of a worker.

    Any file in the working directory may bear the name of a module that is installed. `python -m flowlik` puts that
    folder first: it is left out. Where something else put it there (a program that lies in it, PYTHONPATH, the file of
    a task) it comes last.
    """
    entries = [entry for entry in sys.path if entry]
    if entries and _is_here(entries[0]) and _is_by_name() and not _is_here(str(_ROOT)):
        del entries[0]
    entries.sort(key=_is_here)
    return os.pathsep.join(dict.fromkeys(entries))


def _is_here(entry: str) -> bool:
    return os.path.realpath(entry) == os.path.realpath(Path.cwd())


def _is_by_name() -> bool:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec is not None and spec.name == "flowlik.__main__"
