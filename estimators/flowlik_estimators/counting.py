"""Counting network evaluations from outside: no estimator counts for itself.

`counted` wraps a model in a proxy whose evaluating methods (`METHODS`) pass their tensors through an identity
`torch.autograd.Function`. That identity sees, in rows (batch rows times the sizes of the enclosing vmaps),

- every call forwards,
- every vector-Jacobian product, because it sits at the inputs and all cotangents leave the network through it,
- every Jacobian-vector product, because all tangents enter the network through it,

whether the derivatives are taken by a loop of `torch.autograd.grad`, by `is_grads_batched`, or by
`torch.func`. A cost per sample is rows over batch. Methods of the wrapped model that call each other count
once.

What `policy` returns is network-free and counted apart: its evaluations are `policy_calls`.

A model made of several networks (guidance, say) names the attributes that hold them in ``networks: tuple[str,
...]``; then each call of those is counted instead of the model's own methods. The model is shallow-copied for
that and never changed. Such a model reaches its networks as ``self.<name>``, by one of `METHODS` or by
calling them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.interfaces import CAPABILITIES, EVALUATING_METHODS

METHODS = EVALUATING_METHODS
POLICY_METHODS = (*CAPABILITIES["velocity"].attributes, *CAPABILITIES["divergence"].attributes)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one estimate cost per sample: network forwards, derivative products, solver steps.

    >>> cost = Cost(forwards=8, vjps=16)
    >>> cost.nfe, cost.work
    (8, 24.0)
    """

    forwards: float | Tensor = 0.0
    vjps: float | Tensor = 0.0
    jvps: float | Tensor = 0.0
    policy_calls: float | Tensor = 0.0
    accepted_steps: float | Tensor = 0.0
    rejected_steps: float | Tensor = 0.0

    @property
    def nfe(self) -> float | Tensor:
        """Network evaluations: forwards only, as published figures count."""
        return self.forwards

    @property
    def work(self) -> float | Tensor:
        """Forwards plus derivative products: exact, the same on every machine, fit for gates."""
        return self.forwards + self.vjps + self.jvps


@dataclass
class Counts:
    """Running totals of one call, in rows; solver steps are whole-batch steps and counted once a row too."""

    forwards: int = 0
    vjps: int = 0
    jvps: int = 0
    policy_calls: int = 0
    accepted_steps: int = 0
    rejected_steps: int = 0

    @contextmanager
    def kept(self) -> Iterator[None]:
        """What is evaluated in the block is not counted."""
        before = {f.name: getattr(self, f.name) for f in fields(self)}
        try:
            yield
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def per_sample(self, batch: int) -> Cost:
        """The totals over the batch."""
        return Cost(**{f.name: getattr(self, f.name) / batch for f in fields(self)})


def counted(model: Any, counts: Counts) -> Any:
    """A stand-in for ``model`` that adds its evaluations to ``counts`` and forwards every other attribute.

    >>> from flowlik_models.synthetic import closed_form
    >>> counts = Counts()
    >>> model = counted(closed_form("gmm-2d"), counts)
    >>> model.velocity(torch.zeros(5, 2), torch.full((5,), 0.5)).shape
    torch.Size([5, 2])
    >>> counts.forwards
    5
    """
    inner = inner_networks(model)
    return _with_counted_networks(model, inner, counts) if inner else _Counted(model, counts)


def inner_networks(model: object) -> tuple[str, ...]:
    """The attributes that a model of several networks lists in ``networks``; empty for a single network."""
    names = getattr(model, "networks", ())
    return names if isinstance(names, tuple) and all(isinstance(name, str) for name in names) else ()


class _Counted:
    """The proxy of one network."""

    def __init__(self, model: Any, counts: Counts) -> None:
        self._model = model
        self._counts = counts
        for name in METHODS:
            if hasattr(model, name):
                setattr(self, name, _tapped(getattr(model, name), counts))

    def __getattr__(self, name: str) -> Any:
        if name == "_model":  # not yet there while unpickling or copying
            raise AttributeError(name)
        return getattr(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _tapped(self._model, self._counts)(*args, **kwargs)


def _with_counted_networks(model: Any, names: tuple[str, ...], counts: Counts) -> Any:
    twin = copy.copy(model)
    proxies = {name: counted(getattr(model, name), counts) for name in names}
    if isinstance(twin, nn.Module):
        twin.__dict__["_modules"] = {**twin._modules, **proxies}
    else:
        for name, proxy in proxies.items():
            object.__setattr__(twin, name, proxy)
    return twin


def _tapped(method: Callable[..., Any], counts: Counts) -> Callable[..., Any]:
    """``method`` with its floating tensors (x, t, s; not ``cond``) passed through one counting identity."""

    def call(*args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        names = [None] * len(args) + list(kwargs)
        where = [i for i, value in enumerate(values) if names[i] != "cond" and _is_floating(value)]
        if not where:
            raise TypeError("a counted network is called with tensors x (and t, s)")
        for i, tensor in zip(where, _tap(counts, [values[i] for i in where]), strict=True):
            values[i] = tensor
        answer = method(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))
        return _CountedPolicy(answer, counts) if getattr(method, "__name__", "") == "policy" else answer

    return call


class _CountedPolicy:
    """A policy whose evaluations are counted in rows."""

    def __init__(self, policy: Any, counts: Counts) -> None:
        self._policy = policy
        self._counts = counts

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._policy, name)
        return self._counting(value) if name in POLICY_METHODS else value

    def _counting(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(x: Tensor, t: Tensor) -> Any:
            self._counts.policy_calls += x.shape[0]
            return method(x, t)

        return call


def _is_floating(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 0


def _tap(counts: Counts, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, behind an identity only where a derivative may pass (it costs tens of microseconds)."""
    rows = tensors[0].shape[0]
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return list(_apply(_Tap, counts, rows, *tensors))
    counts.forwards += rows * max(_legacy_vmap_size(t) for t in tensors)
    if not torch.is_grad_enabled():
        return tensors
    where = [i for i, t in enumerate(tensors) if t.requires_grad]
    if where:
        for i, tensor in zip(
            where, _apply(_ReverseTap, counts, rows, *(tensors[i] for i in where)), strict=True
        ):
            tensors[i] = tensor
    return tensors


def _apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = function.apply(*args)  # type: ignore[no-untyped-call]
    return outputs


class _ReverseTap(torch.autograd.Function):
    """Identity that adds rows to vjps on the way back: the quick way for plain autograd."""

    @staticmethod
    def forward(ctx: Any, counts: Counts, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.counts, ctx.rows = counts, rows
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_tally(ctx.counts, "vjps", ctx.rows, grads)


class _Tap(torch.autograd.Function):
    """Identity that adds rows to forwards, on the way back to vjps, in forward mode to jvps, also under vmap."""

    @staticmethod
    def forward(counts: Counts, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        counts.forwards += rows * max(_legacy_vmap_size(t) for t in tensors)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.counts, ctx.rows = inputs[:2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *_tally(ctx.counts, "vjps", ctx.rows, grads)

    @staticmethod
    def jvp(ctx: Any, _counts: None, _rows: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return _apply(_Tally, ctx.counts, "jvps", ctx.rows, *tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], counts: Counts, rows: int, *tensors: Tensor) -> Any:
        return _apply(_Tap, counts, rows * info.batch_size, *tensors), in_dims[2:]


class _Tally(torch.autograd.Function):
    """Identity on (co)tangents that adds rows to one count, times the size of every vmap around it."""

    @staticmethod
    def forward(counts: Counts, kind: str, rows: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        size = max(_legacy_vmap_size(t) for t in tensors)
        setattr(counts, kind, getattr(counts, kind) + rows * size)
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, None, *grads

    @staticmethod
    def jvp(ctx: Any, _counts: None, _kind: None, _rows: None, *tangents: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in tangents)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], counts: Counts, kind: str, rows: int, *tensors: Tensor
    ) -> Any:
        return _apply(_Tally, counts, kind, rows * info.batch_size, *tensors), in_dims[3:]


def _tally(counts: Counts, kind: str, rows: int, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if any(_is_batched(t) for t in tensors):
        return _apply(_Tally, counts, kind, rows, *tensors)
    setattr(counts, kind, getattr(counts, kind) + rows)
    return tensors


# `torch.autograd.grad(is_grads_batched=True)` and `torch.autograd.functional` run on torch's older vmap,
# which does not know autograd.Function.vmap; the size of its hidden dimension is read from the tensor
# itself.
_LEGACY_LEVELS = (1, 2, 3)


def _is_batched(tensor: Tensor) -> bool:
    return torch._C._functorch.is_batchedtensor(tensor) or _is_legacy_batched(tensor)


def _is_legacy_batched(tensor: Tensor) -> bool:
    return ", Batched" in repr(torch._C._dispatch_keys(tensor))


def _legacy_vmap_size(tensor: Tensor) -> int:
    if not _is_legacy_batched(tensor):
        return 1
    size = 1
    for level in _LEGACY_LEVELS:
        size *= torch._remove_batch_dim(tensor, level, 1, 0).shape[0]
    return size
