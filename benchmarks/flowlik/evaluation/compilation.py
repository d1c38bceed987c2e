"""What makes a network faster without changing its answer: its memory format, and compilation where it is asked for."""

from __future__ import annotations

from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import nn

from flowlik_estimators.counting import inner_networks
from flowlik_models.interfaces import CAPABILITIES, Ability, can, trial_call

COMPILED: tuple[Ability, ...] = ("velocity", "flow map", "joint flow map", "generator")
"""Abilities whose methods are replaced by compiled ones; closed forms of a divergence stay as they are."""


def laid_out(model: Any, device: str) -> Any:
    """Convolutional networks in channels-last order on a CPU, anything else as it is.

    Measured on the digits U-Net at 16, 64 and 256 images, one thread: forwards take 0.88 to 0.92 of the time, forwards
    with one product 0.87 to 0.89. The choice is fixed and not timed at load, so that the same seed gives the same
    bits; on a GPU nothing has been measured and nothing is changed.
    """
    if device != "cpu" or not isinstance(model, nn.Module):
        return model
    if not any(isinstance(part, nn.Conv2d) for part in model.modules()):
        return model
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def compiled(model: Any, device: str, dtype: torch.dtype, *, backend: str = "inductor") -> str | None:
    """Replace the network's methods by compiled ones; None, or in one line why that is not possible here.

    One evaluation with two vector-Jacobian products is tried, as estimators take them. Compiled methods have no
    forward-mode and no second derivatives, and their parameters no gradients from then on: a compiled backward pass
    would take them with every product. Evaluations are counted outside of them, so counts do not change.
    """
    abilities = {CAPABILITIES[each].attributes[0]: each for each in COMPILED if can(model, each)}
    names = list(abilities)
    if inner_networks(model):
        return "a model of several networks is counted network by network, and is not compiled"
    if not names:
        return "the model has no network to compile"
    own = {name: model.__dict__[name] for name in names if name in getattr(model, "__dict__", {})}
    trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, nn.Module) else []
    x = torch.zeros(2, *model.event_shape, device=device, dtype=dtype)
    # buffers that the backward pass may overwrite would allow one product a forward only
    functorch_config.donated_buffer = False  # type: ignore[attr-defined]
    _require_grad(trained, False)
    try:
        for name, ability in abilities.items():
            setattr(model, name, torch.compile(getattr(model, name), backend=backend))
            _try(model, x, ability)
    except Exception as error:
        for name in names:
            model.__dict__.pop(name, None)
        model.__dict__.update(own)
        _require_grad(trained, True)
        first = (str(error).strip().splitlines() or [""])[0]
        return f"torch.compile failed: {type(error).__name__}: {first}"[:300]
    return None


def _require_grad(parameters: list[nn.Parameter], require: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(require)


def _try(model: Any, x: torch.Tensor, ability: Ability) -> None:
    point = x.clone().requires_grad_()
    with torch.enable_grad():
        value = trial_call(model, point, ability)()
        value = value[0] if isinstance(value, tuple) else value
        for keep in (True, False):
            torch.autograd.grad(value, point, torch.ones_like(value), retain_graph=keep)
