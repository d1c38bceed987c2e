"""Where a part runs, and how large everything is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

HUNDREDTH: Final = 100


@dataclass(frozen=True)
class Setting:
    """Where a part runs: in full on a GPU, at a hundredth of the size elsewhere; how long, and where it keeps files."""

    device: str
    seconds: float
    folder: str

    @property
    def full(self) -> bool:
        """Whether everything has its full size."""
        return self.device.partition(":")[0] == "cuda"

    def task(self, name: str) -> str:
        """A task as this device takes it: networks in the plane stand in for those of digits off a GPU."""
        return name if self.full or name != "digits" else "gmm-2d"

    def of(self, count: int) -> int:
        """A number of items, steps or rounds as this device takes them.

        >>> Setting("cpu", 60.0, "runs/device").of(4096)
        40
        """
        return count if self.full else max(1, count // HUNDREDTH)


def in_a_line(error: Exception) -> str:
    """Kind and message of an error.

    >>> in_a_line(ValueError("no\\nkernel"))
    'ValueError: no kernel'
    """
    return " ".join(f"{type(error).__name__}: {error}".split())
