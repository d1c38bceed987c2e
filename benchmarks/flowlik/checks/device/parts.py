"""The parts of `flowlik device` by name, in the order they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

from flowlik.checks.device.estimators import agreement, synchronisations, timings
from flowlik.checks.device.memory import memory
from flowlik.checks.device.precision import precision
from flowlik.checks.device.setting import Setting
from flowlik.checks.device.training import cifar10, objectives
from flowlik.records.environment import describe
from flowlik_models.training.throughput import peak

Part = Callable[[Setting], Iterator[dict[str, Any]]]


def environment(setting: Setting) -> Iterator[dict[str, Any]]:
    """What ran: versions, hardware, commit, and the bfloat16 peak that utilisations are shares of."""
    known = {name: value for name, value in describe().items() if name != "argv"}
    yield {**known, "peak_flops_bfloat16": peak(setting.device)}


PARTS: Final[dict[str, Part]] = {
    "environment": environment,
    "agreement": agreement,
    "synchronisations": synchronisations,
    "timings": timings,
    "precision": precision,
    "memory": memory,
    "objectives": objectives,
    "cifar10": cifar10,
}
