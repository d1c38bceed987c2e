"""Random draws keyed by item: what an item gets depends on (key, stream, item, position) and on nothing else.

A batch may be chunked, reordered or halved and every item keeps its draws bit for bit. The bits come from numpy's
Philox, a counter-based generator (Salmon et al. 2011), so a block of consecutive items is one vectorised call.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from torch import Tensor

_WORDS_PER_BLOCK = 4  # Philox4x64 yields four 64-bit words a counter step


_SPAN_SLACK = 4  # scattered items are gathered from one span up to this many times their number


def draw_key(generator: torch.Generator | None) -> int:
    """A 63-bit key drawn from ``generator`` on its own device; ``None`` stands for a CPU generator seeded with 0."""
    if generator is None:
        return _key_of_none()
    if not isinstance(generator, torch.Generator):
        raise ValueError(
            f"generator must be a torch.Generator, got {type(generator).__name__}: "
            "torch.Generator().manual_seed(seed)"
        )
    return _drawn(generator)


@cache
def _key_of_none() -> int:
    return _drawn(torch.Generator().manual_seed(0))


def _drawn(generator: torch.Generator) -> int:
    return int(
        torch.randint(2**62, (), generator=generator, device=generator.device, dtype=torch.int64).item()
    )


def _span_words(key: int, stream: int, first: int, count: int, blocks: int) -> np.ndarray:
    bits = np.random.Philox(key=[key, stream], counter=[first * blocks, 0, 0, 0])
    return bits.random_raw(count * blocks * _WORDS_PER_BLOCK).reshape(count, -1)


def _words(key: int, items: Tensor, stream: int, words: int) -> np.ndarray:
    """(batch, words) unsigned 64-bit words for the given item ids."""
    ids = items.detach().cpu().numpy().astype(np.int64)
    if ids.ndim != 1:
        raise ValueError(f"items must be one id a sample, shape (batch,); got {tuple(ids.shape)}")
    if ids.size == 0:
        return np.zeros((0, words), dtype=np.uint64)
    if ids.min() < 0:
        raise ValueError("item ids must not be negative")
    blocks = -(-words // _WORDS_PER_BLOCK)
    first, span = int(ids.min()), int(ids.max() - ids.min()) + 1
    if span <= _SPAN_SLACK * ids.size:
        return _span_words(key, stream, first, span, blocks)[ids - first, :words]
    return np.concatenate([_span_words(key, stream, int(i), 1, blocks)[:, :words] for i in ids])


def _unit(key: int, items: Tensor, shape: tuple[int, ...], stream: int) -> np.ndarray:
    size = math.prod(shape)
    words = _words(key, items, stream, size)
    # 53 random bits, centred in their cell: never 0 and never 1
    return ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _to_torch(
    values: np.ndarray, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    return _moved(torch.from_numpy(values.reshape(-1, *shape)), dtype, device)


def _moved(values: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The draws where they are wanted; the host copies them aside at once, so that it need not wait for the device."""
    return values.to(dtype=dtype, device=device, non_blocking=True)


def uniform(
    key: int,
    items: Tensor,
    shape: tuple[int, ...],
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform draws on [0, 1), (batch, *shape); rounding to float32 never reaches 1."""
    values = _unit(key, items, shape, stream)
    if dtype != torch.float64:
        values = np.minimum(values, 1.0 - 2.0**-24)
    return _to_torch(values, shape, dtype, device)


def gaussian(
    key: int,
    items: Tensor,
    shape: tuple[int, ...],
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal draws by inversion, (batch, *shape).

    >>> all_at_once, one = gaussian(7, torch.arange(3), (2,)), gaussian(7, torch.tensor([1]), (2,))
    >>> torch.equal(all_at_once[1:2], one)
    True
    """
    unit = torch.from_numpy(_unit(key, items, shape, stream).reshape(-1, *shape))
    draws: Tensor = torch.special.ndtri(unit)
    return _moved(draws, dtype, device)


def rademacher(
    key: int,
    items: Tensor,
    shape: tuple[int, ...],
    *,
    stream: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Independent signs, -1 or 1, (batch, *shape); one bit a sign."""
    size = math.prod(shape)
    words = _words(key, items, stream, -(-size // 64))
    bits = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, count=size, bitorder="little")
    return _to_torch(bits.astype(np.float32) * 2.0 - 1.0, shape, dtype, device)
