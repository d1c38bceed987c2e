"""How fast training goes: images and floating-point operations a second, and the share of a GPU's peak."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

PEAK_BF16 = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 peaks in FLOP/s as their maker states them (without sparsity; H100: the SXM form)."""


def peak(device: str, count: int = 1) -> float | None:
    """The dense bf16 peak of ``count`` GPUs of the table; None of any other device."""
    if torch.device(device).type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((count * value for key, value in PEAK_BF16.items() if key in name), None)


def operations(loss: Callable[[], Tensor]) -> int:
    """Floating-point operations of the matrix products and convolutions of a loss and its gradient, counted.

    Elementwise work is left out, as is usual for the utilisation of a model. Gradients are left on the parameters.
    """
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(loss())
    return int(counter.get_total_flops())
