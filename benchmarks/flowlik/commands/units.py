"""Seeds, durations and sizes as they are spelled on the command line."""

from __future__ import annotations

import re

LEAST_MEMORY = 10**9
MOST_MEMORY = 10**18
LONGEST = 87_600 * 3600  # ten years, in seconds
MOST_SEEDS = 100_000
LARGEST_SEED = 2**63 - 1
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


def parse_memory(text: str) -> int:
    """`500M`, `8G` or `1.5G` in bytes.

    Raises:
        ValueError: anything else, less than the libraries alone take, or more than any machine has.

    >>> parse_memory("1.5G")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([MGT])B?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not LEAST_MEMORY <= size <= MOST_MEMORY:
        raise ValueError(
            f"--memory {_short(text)}: expected a size such as 8G, at least 1G (the libraries alone take that) and at "
            f"most {MOST_MEMORY // 10**12}T"
        )
    return int(size)


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-4` or `0,3,7` or both mixed, as seeds.

    Raises:
        ValueError: anything else, or more than `MOST_SEEDS`.

    >>> parse_seeds("0-2,7")
    (0, 1, 2, 7)
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,19})(?:-(\d{1,19}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last <= LARGEST_SEED:
            raise ValueError(
                f"--seeds {_short(text)}: expected seeds such as 0-4 or 0,3,7, at most {LARGEST_SEED}"
            )
        seeds |= dict.fromkeys(range(first, min(last, first + MOST_SEEDS) + 1))
        if len(seeds) > MOST_SEEDS:
            raise ValueError(f"--seeds {_short(text)}: expected at most {MOST_SEEDS:,} seeds")
    return tuple(seeds)


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def parse_duration(text: str, option: str = "--timeout") -> float:
    """`90`, `90s`, `30m` or `2h` in seconds.

    Raises:
        ValueError: anything else, or more than ten years.

    >>> parse_duration("30m")
    1800.0
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds <= LONGEST:
        raise ValueError(
            f"{option} {_short(text)}: expected a duration such as 90s, 30m or 2h, at most {LONGEST // 3600}h"
        )
    return seconds
