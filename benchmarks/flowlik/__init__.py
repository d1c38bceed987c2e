"""flowlik: how fast and how wrong are the likelihood estimators of flow-based generative models.

The harness: tasks, suites, runner, measures, records, references, gates and the command line.
Estimators live in `flowlik_estimators`, models and data in `flowlik_models`; importing this package loads none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowlik.records.reading import read_records
    from flowlik.tasks.arrays import ArrayTask

__version__ = "0.1.0"
__all__ = ["ArrayTask", "__version__", "read_records"]


def __getattr__(name: str) -> Any:
    """Load what is public when it is first asked for (it brings pandas, or torch)."""
    if name == "ArrayTask":
        from flowlik.tasks.arrays import ArrayTask

        return ArrayTask
    if name == "read_records":
        from flowlik.records.reading import read_records

        return read_records
    raise AttributeError(f"module 'flowlik' has no attribute {name!r}")
