"""What surrounds every call of an estimator: the points are checked, and errors of type are named with a cure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from flowlik_estimators.model_checks.stand_in import StandIn
from flowlik_models.numerics.finite import all_finite

DTYPES = (torch.float32, torch.float64)


HALF = (torch.bfloat16, torch.float16)


def check_points(x: Tensor, event_shape: Sequence[object] | None) -> None:
    """Raise ValueError, in one line with the cure, where x is no batch of finite points of this shape."""
    if not isinstance(x, Tensor):
        raise ValueError(
            f"x must be a float32 or float64 tensor, got a {type(x).__name__}: torch.as_tensor(x)"
        )
    if x.dtype not in DTYPES:
        cure = ", and model.float() where its parameters are of half precision" if x.dtype in HALF else ""
        raise ValueError(f"x must be a float32 or float64 tensor, got {x.dtype}: use x.float(){cure}")
    if x.is_meta or x.layout != torch.strided:
        raise ValueError(
            f"x must be dense numbers, got {x.layout} on {x.device}: x.to_dense(), or x from its data"
        )
    if x.ndim == 0 or (event_shape is not None and tuple(x.shape[1:]) != tuple(event_shape)):
        event_shape = event_shape or ("...",)
        expected = ", ".join(["batch", *map(str, event_shape)])
        raise ValueError(f"x must have shape ({expected}), got {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError("x is an empty batch")
    if not all_finite(x):
        bad = (~torch.isfinite(x)).flatten(1).any(1).nonzero().flatten()
        raise ValueError(
            f"x holds NaN or infinity in {len(bad)} of {len(x)} rows, first in row {int(bad[0])}"
        )


def mode(differentiable: bool) -> AbstractContextManager[None]:
    """Gradients on or off whatever the caller's mode; inference tensors could not take part in a trace."""
    if torch.is_inference_mode_enabled():
        return _outside_inference(differentiable)
    set_from_now_on: AbstractContextManager[None] = torch.set_grad_enabled(differentiable)
    return set_from_now_on


@contextmanager
def _outside_inference(differentiable: bool) -> Iterator[None]:
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):
        yield


def own_copy(x: Tensor, *, differentiable: bool = False) -> Tensor:
    """A copy, so that nothing is written into the caller's memory; with the caller's graph only where it is wanted."""
    as_it_is = differentiable or x.is_inference() or not torch.is_grad_enabled()
    return x.clone() if as_it_is else x.detach().clone()


class one_dtype:  # noqa: N801 - a context, of a class since every call passes it
    """Say what to do where the model stumbled over points of another type than its parameters, or has no weights."""

    def __init__(self, parameters: Sequence[Tensor], x: Tensor) -> None:
        if True in [parameter.is_meta for parameter in parameters]:
            raise ValueError(
                "the model's weights are on the meta device, without values: load them on another device"
            )
        self.parameters, self.x = parameters, x

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, failure: BaseException | None, trace: object) -> None:
        if not isinstance(failure, RuntimeError):
            return
        known = {p.dtype for p in self.parameters if p.is_floating_point()}
        if not known or known == {self.x.dtype} or "type" not in str(failure):
            return
        given, names = _name(self.x.dtype), " and ".join(sorted(_name(dtype) for dtype in known))
        if known & set(HALF):
            cure = (
                "estimates need float32 or more: give it float32 parameters by model.float(), and x.float()"
            )
        elif len(known) == 1:
            cure = f"give both one type, x.to(torch.{names}) or model.to(x.dtype)"
        else:
            cure = "give all one type, model.to(x.dtype)"
        raise ValueError(f"x is {given} and the model's parameters are {names}: {cure}") from failure


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(found: StandIn) -> torch.device:
    """The device of the model's first tensor; the CPU's where it has none."""
    return next((tensor.device for tensor in found.tensors), torch.device("cpu"))
