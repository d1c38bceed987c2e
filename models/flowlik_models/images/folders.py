"""Where image files lie, and where what is computed from them is kept."""

from __future__ import annotations

import os
from pathlib import Path

DATA_VARIABLE = "FLOWLIK_DATA"
CACHE_VARIABLE = "FLOWLIK_CACHE"


def data_root() -> Path | None:
    """The folder that ``$FLOWLIK_DATA`` names, or None. The command line's ``--data-dir`` sets the variable."""
    named = os.environ.get(DATA_VARIABLE)
    return Path(named).expanduser() if named else None


def cache_dir() -> Path:
    """The folder for fits and unpacked files: ``$FLOWLIK_CACHE``, else ``flowlik`` in the user's cache folder; where
    there is no home folder, one in which nothing can be kept."""
    if named := os.environ.get(CACHE_VARIABLE):
        return Path(named).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "flowlik"
    except RuntimeError:
        return Path(os.devnull) / "flowlik"
