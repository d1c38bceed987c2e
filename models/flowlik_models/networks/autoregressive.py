"""Autoregressive flows: data to noise in one pass, with the exact log-determinant (docs/math.md section 15).

A point is whitened by moments of its data and cut into tokens: patches of an image, runs of coordinates of a vector. A
block reads them in order and scales and shifts each by what a causal transformer says of those before it,

    z_i = (y_i - shift_i(y_<i)) exp(-scale_i(y_<i)),    log |det dz/dy| = -sum_i scale_i(y_<i),

so one pass gives all tokens at once; the next block reads them backwards and, of vectors, in turned coordinates. The
other way round takes a pass a token, through that token alone. Scales and shifts start at zero: an untrained network
is the Gaussian of the moments. Source of the architecture: TarFlow (Zhai et al. 2024, arXiv 2412.06329); written anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowlik_models.networks.attention import Past, SelfAttention

_LARGEST = 3.0  # |scale|, softly: no token is blown up by more than e^3 in a block


class AutoregressiveFlow(nn.Module):
    """An exact flow of vectors (d,) or images (channels, height, width): log p of a point in one pass.

    Args:
        event_shape: of a point.
        mean: of the data, (d,) flattened.
        axes: (d, d), columns the directions in which ``scales`` are taken; None: the coordinates themselves.
        scales: standard deviations along them, (d,).
        patch: side of an image's patches, or coordinates a token of a vector.
        blocks: how often the tokens are read, forwards and backwards in turn.
        layers, width, heads: of the transformer of a block.

    Raises:
        ValueError: patches do not divide the event, or ``heads`` not the ``width``.
    """

    mean: Tensor
    scales: Tensor
    axes: Tensor
    turns: Tensor

    def __init__(
        self,
        event_shape: Sequence[int],
        mean: Tensor,
        scales: Tensor,
        axes: Tensor | None = None,
        *,
        patch: int = 2,
        blocks: int = 4,
        layers: int = 2,
        width: int = 96,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.event_shape: tuple[int, ...] = tuple(event_shape)
        self.patch, d = patch, math.prod(self.event_shape)
        sides = self.event_shape[1:] if len(self.event_shape) == 3 else self.event_shape
        if len(self.event_shape) not in (1, 3) or any(side % patch for side in sides):
            raise ValueError(f"patches of {patch} do not divide events of shape {self.event_shape}")
        self.tokens = math.prod(side // patch for side in sides)
        self.register_buffer("mean", mean.float())
        self.register_buffer("scales", scales.float())
        self.register_buffer("axes", torch.empty(0) if axes is None else axes.float())
        turned = blocks if len(self.event_shape) == 1 else 0
        self.register_buffer("turns", torch.stack([_turn(d) for _ in range(turned)] or [torch.empty(0)]))
        self.register_load_state_dict_post_hook(_turn_rightly)  # type: ignore[no-untyped-call]
        sizes = (self.tokens, d // self.tokens, width, layers, heads)
        self.blocks = nn.ModuleList(_Block(*sizes) for _ in range(blocks))

    @property
    def passes_to_sample(self) -> int:
        """Passes through the network that `from_noise` takes."""
        return self.tokens

    def inverse(self, x: Tensor, *, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The noise z (batch, *event) of points x, and log |det dz/dx|, (batch,): one pass."""
        whitened = x.flatten(1) - self.mean
        whitened = (whitened @ self.axes if self.axes.numel() else whitened) / self.scales
        tokens = self._cut(whitened)
        log_det = -self.scales.log().sum().expand(len(x))
        for number, block in enumerate(self.blocks):
            tokens = self._reordered(tokens, number)
            shift, scale = block(tokens)
            tokens = (tokens - shift) * torch.exp(-scale)
            log_det = log_det - scale.flatten(1).sum(1)
        return self._joined(tokens).view_as(x), log_det

    @torch.no_grad()
    def from_noise(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        """The points x (batch, *event) of noise z: `passes_to_sample` passes."""
        tokens = self._cut(z.flatten(1))
        for number, block in reversed(list(enumerate(self.blocks))):
            assert isinstance(block, _Block)
            made = tokens[:, :0]
            pasts: list[Past] = [[] for _ in block.layers]
            for place in range(self.tokens):
                shift, scale = block.following(made, pasts)
                made = torch.cat((made, tokens[:, place : place + 1] * torch.exp(scale) + shift), 1)
            tokens = self._reordered(made, number, back=True)
        x = self._joined(tokens) * self.scales
        return ((x @ self.axes.T if self.axes.numel() else x) + self.mean).view_as(z)

    def _cut(self, rows: Tensor) -> Tensor:
        """Rows (batch, d) as tokens (batch, tokens, size)."""
        if len(self.event_shape) == 1:
            return rows.view(-1, self.tokens, self.patch)
        return F.unfold(rows.view(-1, *self.event_shape), self.patch, stride=self.patch).transpose(1, 2)

    def _joined(self, tokens: Tensor) -> Tensor:
        """Tokens as rows."""
        if len(self.event_shape) == 1:
            return tokens.flatten(1)
        size = self.event_shape[1:]
        return F.fold(tokens.transpose(1, 2), size, self.patch, stride=self.patch).flatten(1)

    def _reordered(self, tokens: Tensor, number: int, *, back: bool = False) -> Tensor:
        """Tokens as block ``number`` reads them, or from there ``back``: every other block from behind."""
        turn = self.turns[number] if self.turns.numel() else None
        if back and number % 2:
            tokens = tokens.flip(1)
        if turn is not None:
            tokens = (tokens.flatten(1) @ (turn.T if back else turn)).view_as(tokens)
        return tokens.flip(1) if number % 2 and not back else tokens


class _Block(nn.Module):
    """Shift and scale of every token from the tokens before it."""

    def __init__(self, tokens: int, size: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.enter = nn.Linear(size, width)
        self.places = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(_Layer(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 2 * size)
        self.first = nn.Parameter(torch.zeros(1, 2 * size))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Two (batch, tokens, size)."""
        told = self._told(self.enter(tokens) + self.places, [None] * len(self.layers))
        # what a token says is for the next
        return _shift_and_scale(torch.cat((self.first.expand(len(tokens), 1, -1), told[:, :-1]), 1))

    def following(self, tokens: Tensor, pasts: list[Past]) -> tuple[Tensor, Tensor]:
        """The same of the token after these (batch, n, size), two (batch, 1, size). ``pasts``, one a layer, hold what
        the calls for n - 1, n - 2, ... tokens left."""
        n = tokens.shape[1]
        if n == 0:
            return _shift_and_scale(self.first.expand(len(tokens), 1, -1))
        return _shift_and_scale(self._told(self.enter(tokens[:, -1:]) + self.places[n - 1], pasts))

    def _told(self, h: Tensor, pasts: Sequence[Past | None]) -> Tensor:
        for layer, past in zip(self.layers, pasts, strict=True):
            h = layer(h, past)
        told: Tensor = self.leave(self.norm(h))
        return told


class _Layer(nn.Module):
    """A causal transformer layer, (batch, tokens, width) to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=True)
        self.mixed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, h: Tensor, past: Past | None = None) -> Tensor:
        h = h + self.attention(self.before(h), past)
        mixed: Tensor = h + self.mixed(self.between(h))
        return mixed


def _shift_and_scale(told: Tensor) -> tuple[Tensor, Tensor]:
    shift, scale = told.chunk(2, 2)
    return shift, _LARGEST * torch.tanh(scale / _LARGEST)


def _turn(d: int) -> Tensor:
    """A random rotation (or reflection), (d, d)."""
    turn: Tensor = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64))[0]
    return turn.float()


def _turn_rightly(module: nn.Module, _keys: Any) -> None:
    """Rotations that a checkpoint holds in half precision turn without stretching again: the nearest that do."""
    assert isinstance(module, AutoregressiveFlow)
    for name in ("axes", "turns"):
        rounded: Tensor = getattr(module, name)
        if rounded.numel():
            left, _, right = torch.linalg.svd(rounded.double())
            setattr(module, name, (left @ right).to(rounded))
