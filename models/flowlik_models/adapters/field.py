"""A foreign network as a velocity field on the suite's clock (docs/math.md section 10)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowlik_models.adapters.paths import Clock, Path
from flowlik_models.adapters.predictions import coefficients, limits
from flowlik_models.interfaces import Source

Call = Callable[[Any, Tensor, Tensor, Any], Any]
"""``(net, z, u, cond)`` -> the network's output: z (batch, *event), u (batch,), cond None where there is none."""


class WrappedField(nn.Module):
    """The velocity of a network that predicts ``predicts`` on ``path``; `flowlik.wrap` makes it.

    ``noisy_end`` and ``clean_end`` are the times between which the network knows the field, beyond them it is asked at
    the end; ``source`` is the law at the noisy end. ``guidance`` w is the field ``(1 + w) v(x, t, cond) - w v(x, t,
    null)``: two evaluations, both counted; its density is that of its own ODE, not ``p(x | cond)^(1 + w)``.
    """

    networks = ("network",)

    def __init__(
        self,
        network: _Network,
        event_shape: tuple[int, ...],
        *,
        predicts: str,
        path: Path,
        guidance: float | None = None,
        null: Any = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.event_shape = event_shape
        self.predicts, self.path, self.guidance, self.null = predicts, path, guidance, null
        self.clock = Clock(path, *limits(predicts, path))
        self.noisy_end, self.clean_end = self.clock.noisy_end, self.clock.clean_end
        self.source: Source
        self.source_gap: float | None = None

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """v(x, t) of x (batch, *event) at t (batch,), of x's shape and dtype.

        Raises:
            ValueError: guidance without a condition, or an output that is not of the network's input's shape.
        """
        u = self.clock.at(t)
        a, s = self.path.scales(u)
        z = x * _column(a + s, x)
        c, k = coefficients(self.predicts, self.path, u, a, s)
        asked = (u if self.path.label is None else self.path.label(u)).to(x.dtype)
        return _column(c, x) * z + _column(k, x) * self._predicted(z, asked, cond).to(x.dtype)

    def guided(self, guidance: float) -> WrappedField:
        """The same field at another guidance scale, with the same weights."""
        twin = copy.copy(self)
        twin.guidance = guidance
        return twin

    def _predicted(self, z: Tensor, u: Tensor, cond: Tensor | None) -> Tensor:
        """The network's output, guided where a scale is given."""
        if self.guidance is None:
            plain: Tensor = self.network(z, u, cond=cond)
            return plain
        if cond is None:
            raise ValueError(f"guidance={self.guidance:g} needs cond, the condition that it guides to")
        output: Tensor = self.network(z, u, cond=cond)
        null = None if self.null is None else _null(self.null, cond)
        free: Tensor = self.network(z, u, cond=null)
        return (1.0 + self.guidance) * output - self.guidance * free

    def extra_repr(self) -> str:
        """What the printed module says."""
        return f"predicts={self.predicts}, t from {self.noisy_end:.4g} to {self.clean_end:.4g}"


class _Network(nn.Module):
    """A network behind one signature: every call of it is one evaluation, whatever ``call`` does inside."""

    def __init__(self, net: Any, call: Call | None) -> None:
        super().__init__()
        self.net = net
        self._call = call

    def forward(self, z: Tensor, u: Tensor, *, cond: Any = None) -> Tensor:
        """The output tensor, of z's shape."""
        if self._call is not None:
            output = self._call(self.net, z, u, cond)
        else:
            output = self.net(z, u) if cond is None else self.net(z, u, cond)
        return _checked(_tensor(output), z)


def _null(null: Any, cond: Any) -> Any:
    """The condition of the second evaluation, of cond's shape and type; ValueError where it fits no such condition."""
    said = " ".join(repr(null).split())[:60]
    if isinstance(cond, Mapping):
        if not isinstance(null, Mapping) or set(null) != set(cond):
            raise ValueError(f"null={said}: cond is a dict, expected one of {', '.join(map(str, cond))}, too")
        return {name: _null(null[name], value) for name, value in cond.items()}
    try:
        value = torch.as_tensor(null, device=cond.device)
        fits = value.expand_as(cond)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"null={said}: expected a number, or a tensor that fits one row of cond {tuple(cond.shape)}"
        ) from None
    if not cond.is_floating_point() and value.is_floating_point() and bool((value != value.trunc()).any()):
        raise ValueError(f"null={said}: cond holds whole numbers, expected one, too")
    return fits.to(cond.dtype).contiguous()


def _tensor(output: Any) -> Tensor:
    """The tensor in an output: itself, the first of a tuple, ``.sample``, ``["sample"]`` or ``.mean``."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and isinstance(output.get("sample"), Tensor):
        found: Tensor = output["sample"]
        return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    for name in ("sample", "mean"):
        if isinstance(value := getattr(output, name, None), Tensor):
            return value
    raise ValueError(
        f"the network's output is a {type(output).__name__}, expected a tensor, a tuple or an object with .sample; "
        "say with call=lambda net, z, u, cond: ... what to take of it"
    )


def _checked(output: Tensor, z: Tensor) -> Tensor:
    if output.shape == z.shape and output.is_floating_point():
        return output
    if not output.is_floating_point():
        kind = str(output.dtype).removeprefix("torch.")
        raise ValueError(f"the network's output is of {kind}, expected real floating-point numbers")
    cure = "say with call=lambda net, z, u, cond: ... what to take of it"
    if z.ndim > 1 and output.ndim == z.ndim and output.shape[1] == 2 * z.shape[1]:
        cure = f"if the rest are variances, call=lambda net, z, u, cond: net(z, u)[:, :{z.shape[1]}]"
    raise ValueError(
        f"the network's output has shape {tuple(output.shape)}, expected {tuple(z.shape)}; {cure}"
    )


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
