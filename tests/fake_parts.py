"""Parts of `flowlik device` for tests of what runs them: one that works, and some that go wrong."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from flowlik.checks.device.setting import Setting


def fine(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"items": setting.of(400), "device": setting.device}


def raises(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"items": 1}
    raise RuntimeError("no kernel\nfor this")


def dies(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"items": 2}
    os._exit(9)


def hangs(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"items": 3}
    time.sleep(60)


def goes_on(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"unfinished": True}


def half(setting: Setting) -> Iterator[dict[str, Any]]:
    yield {"estimator": "ode"}
    yield {"estimator": "elbo", "failed": "ValueError: no"}


PARTS = {"raises": raises, "dies": dies, "hangs": hangs, "goes-on": goes_on, "half": half, "fine": fine}
