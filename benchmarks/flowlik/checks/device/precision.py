"""TF32 on and off against float64: what a network's answer and a likelihood lose by it.

Estimators take float32 in full whatever torch's settings are (`flowlik_models.numerics.float32`), so the likelihood
here is that of the fixed-step rule behind the references, which leaves the settings alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from flowlik.checks.device.cases import Case
from flowlik.checks.device.setting import Setting
from flowlik.references.fixed_rk4 import converged_log_prob
from flowlik_estimators import get
from flowlik_models.numerics.float32 import full_float32

ITEMS: Final = 400
STEPS: Final = 16
MODELS: Final = (("digits", "teacher"), ("gmm-2d", "meanflow"))


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Products and convolutions of float32 with the short mantissa of TF32 where the device has it, or in full."""
    with full_float32():
        if on:
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.allow_tf32 = True
        yield


def precision(setting: Setting) -> Iterator[dict[str, Any]]:
    """Largest gaps to float64 of the velocity, relative to its size, and of log p in nats and bits/dim."""
    n = setting.of(ITEMS)
    for task, model in MODELS if setting.full else MODELS[-1:]:
        case = Case(task, model, get("ode"))
        exact = _answers(case, setting, n, "float64")
        for on in (False, True):
            with tf32(on):
                velocity, log_prob = _answers(case, setting, n, "float32")
            gap = float(abs(log_prob - exact[1]).max())
            yield {
                "task": task,
                "model": model,
                "tf32": on,
                "items": n,
                "velocity_gap": float((velocity - exact[0]).abs().max() / exact[0].abs().max()),
                "gap_nats": gap,
                "gap_bits_per_dim": gap / (math.log(2.0) * velocity[0].numel()),
            }


def _answers(case: Case, setting: Setting, n: int, dtype: str) -> tuple[torch.Tensor, Any]:
    """The velocity halfway and log p by the fixed rule, float64 on the CPU."""
    model = case.load(setting.device, dtype)
    x, _ = case.points(n, setting.device, dtype)
    with torch.no_grad():
        velocity = model.velocity(x, x.new_full((n,), 0.5))
    end = 1.0 - 1e-3
    return velocity.double().cpu(), converged_log_prob(model, x, STEPS if setting.full else 2, end)
