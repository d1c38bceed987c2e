"""What surrounds every call of an estimator: the points are checked, and the parameters frozen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from flowlik_estimators.counting import inner_networks
from flowlik_models.frozen_parameters import frozen as frozen_parameters

DTYPES = (torch.float32, torch.float64)


def check_points(x: Tensor, event_shape: Sequence[object] | None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        raise ValueError(
            f"x must be a float32 or float64 tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.ndim == 0 or (event_shape is not None and tuple(x.shape[1:]) != tuple(event_shape)):
        event_shape = event_shape or ("...",)
        expected = ", ".join(["batch", *map(str, event_shape)])
        raise ValueError(f"x must have shape ({expected}), got {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError("x is an empty batch")
    if not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten()
        raise ValueError(
            f"x holds NaN or infinity in {len(bad)} of {len(x)} rows, first in row {int(bad[0])}"
        )


@contextmanager
def mode(differentiable: bool) -> Iterator[None]:
    """Gradients on or off whatever the caller's mode; inference tensors could not take part in a trace."""
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        yield


def ordinary(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x.detach()


def frozen(model: object, freeze: bool) -> AbstractContextManager[None]:
    """Switch off the gradients of the parameters, so that a trace builds no graph towards them."""
    return frozen_parameters(_parameters(model)) if freeze else nullcontext()


def _parameters(model: object) -> Iterator[nn.Parameter]:
    if isinstance(model, nn.Module):
        yield from model.parameters()
    else:
        for name in inner_networks(model):
            yield from _parameters(getattr(model, name))


@contextmanager
def one_dtype(model: object, x: Tensor) -> Iterator[None]:
    """Say what to do where the model stumbled over points of another type than its parameters."""
    try:
        yield
    except RuntimeError as failure:
        known = {p.dtype for p in _parameters(model)}
        if len(known) != 1 or x.dtype in known:
            raise
        parameters = str(known.pop()).removeprefix("torch.")
        raise ValueError(
            f"x is {str(x.dtype).removeprefix('torch.')} and the model's parameters are {parameters}: give both "
            f"one type, x.to(torch.{parameters}) or model.to(x.dtype)"
        ) from failure


def device_of(model: object) -> torch.device:
    if isinstance(model, nn.Module):
        for tensor in (*model.parameters(), *model.buffers()):
            return tensor.device
    for name in inner_networks(model):
        return device_of(getattr(model, name))
    return torch.device("cpu")
