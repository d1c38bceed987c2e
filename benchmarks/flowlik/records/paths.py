"""Where things lie: the source tree, the stored results, the shipped checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

_HERE = Path(__file__).resolve().parents[1]


@cache
def source_root() -> Path | None:
    """The source tree this package runs from, or None where it is installed as a wheel."""
    root = _HERE.parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "benchmarks").is_dir() else None


def results_dir() -> Path:
    """The folder of `references/` and `baselines/`: `results/` of the source tree, else the wheel's copy of it."""
    root = source_root()
    return _HERE / "_results" if root is None else root / "results"


def need_source_root(what: str) -> Path:
    """The source tree, for what writes into it.

    Raises:
        ValueError: this is an installed package, which is never written into.
    """
    root = source_root()
    if root is None:
        raise ValueError(f"{what} needs a source tree; this is an installed package (leave --ship out)")
    return root
