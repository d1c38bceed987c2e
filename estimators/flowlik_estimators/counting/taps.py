"""Identities that note what passes through them, in rows: batch rows times the sizes of the enclosing vmaps.

A `torch.autograd.Function` at the inputs of a network sees

- every call forwards,
- every reverse product, because all cotangents leave the network through it,
- every forward-mode product, because all tangents enter the network through it,

whether the derivatives are taken by a loop of `torch.autograd.grad`, by `is_grads_batched`, or by
`torch.func`.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from flowlik_estimators.counting.cost import Counts


class Tally:
    """Rows of one evaluation: held back until it is known whether it counts (`settle`), and then added as they come."""

    def __init__(self, counts: Counts, *, kept: bool | None = None) -> None:
        self._counts, self._kept = counts, kept
        self._held: Counter[str] = Counter()

    def add(self, kind: str, rows: int) -> None:
        """Note rows of one kind: forwards, vjps or jvps."""
        if self._kept is None:
            self._held[kind] += rows
        elif self._kept:
            setattr(self._counts, kind, getattr(self._counts, kind) + rows)

    def settle(self, kept: bool) -> None:
        """Count what was held back and what is still to come, or neither."""
        self._kept = kept
        for kind, rows in self._held.items():
            self.add(kind, rows)
        self._held.clear()


def is_floating(value: object) -> bool:
    """Whether it is a tensor of real numbers with rows: x, t or s, not labels."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def tap(tally: Tally, rows: int, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, behind an identity only where a derivative may pass (it costs tens of microseconds)."""
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return list(_apply(_Tap, tally, rows, *tensors))
    tally.add("forwards", rows * max(_legacy_vmap_size(t) for t in tensors))
    if not torch.is_grad_enabled():
        return tensors
    where = [i for i, t in enumerate(tensors) if t.requires_grad]
    if where:
        for i, tensor in zip(
            where, _apply(_ReverseTap, tally, rows, *(tensors[i] for i in where)), strict=True
        ):
            tensors[i] = tensor
    return tensors


def _apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = function.apply(*args)  # type: ignore[no-untyped-call]
    return outputs


class _ReverseTap(torch.autograd.Function):
    """Identity that adds rows to vjps on the way back: the quick way for plain autograd."""

    @staticmethod
    def forward(ctx: Any, tally: Tally, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.tally, ctx.rows = tally, rows
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_noted(ctx.tally, "vjps", ctx.rows, grads)


class _Tap(torch.autograd.Function):
    """Identity that adds rows to forwards, on the way back to vjps, in forward mode to jvps, also under vmap."""

    @staticmethod
    def forward(tally: Tally, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        tally.add("forwards", rows * max(_legacy_vmap_size(t) for t in tensors))
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.tally, ctx.rows = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_noted(ctx.tally, "vjps", ctx.rows, grads)

    @staticmethod
    def jvp(ctx: Any, _tally: None, _rows: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _apply(_Note, ctx.tally, "jvps", ctx.rows, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], tally: Tally, rows: int, *tensors: Tensor) -> Any:
        return _apply(_Tap, tally, rows * info.batch_size, *tensors), in_dims[2:]


class _Note(torch.autograd.Function):
    """Identity on (co)tangents that adds rows to one count, times the size of every vmap around it."""

    @staticmethod
    def forward(tally: Tally, kind: str, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        size = max(_legacy_vmap_size(t) for t in tensors)
        tally.add(kind, rows * size)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _tally: None, _kind: None, _rows: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], tally: Tally, kind: str, rows: int, *tensors: Tensor
    ) -> Any:
        return _apply(_Note, tally, kind, rows * info.batch_size, *tensors), in_dims[3:]


def _noted(tally: Tally, kind: str, rows: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if any(_is_batched(t) for t in tensors):
        return _apply(_Note, tally, kind, rows, *tensors)
    tally.add(kind, rows)
    return tensors


# `torch.autograd.grad(is_grads_batched=True)` and `torch.autograd.functional` run on torch's older vmap,
# which does not know autograd.Function.vmap; the size of its hidden dimension is read from the tensor
# itself.
_LEGACY_LEVELS = (1, 2, 3)


def _is_batched(tensor: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(tensor) or _is_legacy_batched(tensor)


def _is_legacy_batched(tensor: Tensor) -> bool:
    keys = torch._C._dispatch_keys(tensor)
    return _names_batched(keys.raw_repr(), keys)


_BATCHED: dict[int, bool] = {}
"""Of sets of dispatch keys, whether ``Batched`` is one: what a set holds only its printed form says."""


def _names_batched(number: int, keys: Any) -> bool:
    if number not in _BATCHED:
        _BATCHED[number] = ", Batched" in repr(keys)
    return _BATCHED[number]


def _legacy_vmap_size(tensor: Tensor) -> int:
    if not _is_legacy_batched(tensor):
        return 1
    size = 1
    for level in _LEGACY_LEVELS:
        size *= torch._remove_batch_dim(tensor, level, 1, 0).shape[0]
    return size
