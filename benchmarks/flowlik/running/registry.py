"""The table of executors."""

from __future__ import annotations

import os
from collections.abc import Callable

from flowlik.running.executor import Executor, Setup
from flowlik_models.names import unknown


# --- by name ------------------------------------------------------------------------------------------------
def make_executor(name: str, setup: Setup, address: str | None = None) -> Executor:
    """The executor of a name; under torchrun, `serial` is one cell at a time over all its processes.

    Raises:
        ValueError: an unknown name, or something asked for that it does not have.
    """
    if name not in EXECUTORS:
        raise ValueError(unknown("executor", name, tuple(EXECUTORS)))
    if address is not None and name != "ray":
        raise ValueError("--address is that of a Ray cluster: add --executor ray")
    return EXECUTORS[name](setup, address)


def is_follower() -> bool:
    """True in every process of torchrun but the first."""
    return int(os.environ.get("RANK", "0")) > 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _serial(setup: Setup, address: str | None) -> Executor:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from flowlik.running.torchrun import Sharded

        return Sharded(setup)
    from flowlik.running.serial import Serial

    return Serial(setup)


def _ray(setup: Setup, address: str | None) -> Executor:
    from flowlik.running.ray_cluster import RayExecutor

    return RayExecutor(setup, address=address)


EXECUTORS: dict[str, Callable[[Setup, str | None], Executor]] = {"serial": _serial, "ray": _ray}
