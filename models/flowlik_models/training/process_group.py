"""Sharing a training step: parts of a batch taken one after the other, or by several processes.

A batch is always drawn whole, the same everywhere, and cut into parts of every n-th row. Gradients are summed over the
parts, so the trajectory is that of one process that takes the batch at once, up to rounding. What is drawn after the
cut (dropout, and what an objective draws for itself) has a generator of its own for every part.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_SEED_STRIDE = 7_368_787  # between the generators of parts
_PATIENCE = timedelta(hours=6)  # the others wait while one solves trajectories or judges the result


@dataclass(frozen=True)
class Part:
    """Rows ``index``, ``index + count``, ``index + 2 count``, ... of a batch."""

    index: int = 0
    count: int = 1

    def rows(self, total: int, start: int = 0, device: torch.device | str = "cpu") -> Tensor:
        """Which of ``total`` rows, that follow ``start`` earlier ones, belong to the part."""
        return torch.arange((self.index - start) % self.count, total, self.count, device=device)

    def seed(self, seed: int) -> int:
        """The seed of what this part draws for itself; the given one where the batch is not cut."""
        return seed + self.index * _SEED_STRIDE

    def generator(self, whole: torch.Generator) -> torch.Generator:
        """The generator of what this part draws for itself; the given one where the batch is not cut."""
        if self.count == 1:
            return whole
        return torch.Generator(whole.device).manual_seed(self.seed(whole.initial_seed()))


WHOLE = Part()


@dataclass(frozen=True)
class Group:
    """The processes that train one model together: one, or those of torchrun."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """The process that saves, judges and reports."""
        return self.rank == 0

    def parts(self, accumulate: int) -> list[Part]:
        """The parts of this process where each takes ``accumulate`` of them."""
        first, count = self.rank * accumulate, self.size * accumulate
        return [Part(index, count) for index in range(first, first + accumulate)]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors of one type over all processes, in place, in one message."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        start = 0
        for tensor in tensors:
            tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
            start += tensor.numel()

    def wait(self) -> None:
        """Until all have come here."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """The end of working together."""
        if self.size > 1:
            dist.destroy_process_group()


ALONE = Group()


def under_torchrun() -> bool:
    """Whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def join(device: str) -> tuple[Group, str]:
    """The group of this process and its device: under torchrun each has a GPU of its own, or the CPU with gloo."""
    if not under_torchrun():
        return ALONE, device
    if torch.device(device).type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=_PATIENCE)
    return Group(dist.get_rank(), dist.get_world_size()), device
