"""Seeds, durations and sizes as they are spelled on the command line."""

from __future__ import annotations

import re

LEAST_MEMORY = 10**9
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


def parse_memory(text: str) -> int:
    """`500M`, `8G` or `1.5G` in bytes.

    Raises:
        ValueError: anything else, or less than the libraries alone take.

    >>> parse_memory("1.5G")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])B?", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < LEAST_MEMORY:
        raise ValueError(
            f"--memory {text!r}: expected a size such as 8G, at least 1G (the libraries alone take that)"
        )
    return size


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,3,7` or both mixed, as seeds.

    Raises:
        ValueError: anything else.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ValueError(f"--seeds {text!r}: expected seeds such as 0-4 or 0,3,7")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(seeds))


def parse_duration(text: str) -> float:
    """`90`, `90s`, `30m` or `2h` in seconds.

    Raises:
        ValueError: anything else.

    >>> parse_duration("30m")
    1800.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--timeout {text!r}: expected a duration such as 90s, 30m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]
