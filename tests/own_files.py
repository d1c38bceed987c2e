"""Files with tasks of one's own, as a user writes them."""

from __future__ import annotations

import textwrap
from pathlib import Path

FIELD = '''
import torch

class Field(torch.nn.Module):
    """The exact field of N(mean, scale^2 I); with labels, the mean of every row is its label's."""

    def __init__(self, dim=2, scale=2.0, mean=1.0):
        super().__init__()
        self.event_shape = (dim,)
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.mean = mean

    def velocity(self, x, t, *, cond=None):
        t = t[:, None]
        mean = self.mean if cond is None else 3.0 * cond[:, None].to(x)
        variance = t**2 * self.scale**2 + (1 - t) ** 2
        return mean + (t * self.scale**2 - (1 - t)) / variance * (x - t * mean)
'''

TASK = """
import torch, flowlik
from field import Field

x = 2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + 1
TASK = flowlik.ArrayTask(id="ID", train=x[:300], test=x[300:], models={"net": Field})
"""

KINDS = """
import math, torch, flowlik
from field import Field

class Flow:
    event_shape = (2,)

    def inverse(self, x, *, cond=None):
        return (x - 1) / 2, x.new_full((len(x),), -2 * math.log(2.0))

class Energy:
    event_shape = (2,)

    def log_density(self, x, *, cond=None):
        return -x.square().sum(1)

x = 2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0)) + 1
TASK = flowlik.ArrayTask(
    id="ID", train=x[:300], test=x[300:], models={"net": Field, "flow": Flow, "energy": Energy}
)
"""
"""Three kinds of models."""

LABELLED = """
import torch, flowlik
from field import Field

labels = torch.arange(60) % 3
x = 2 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 3 * labels[:, None]
TASK = flowlik.ArrayTask(
    id="ID", train=x, test=x[:40], labels={"train": labels, "test": labels[:40]}, models={"net": Field}
)
"""


def write_task(folder: Path, task: str, text: str = TASK, name: str = "mine.py") -> Path:
    """A task's file in a folder, beside the module of its field."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "field.py").write_text(FIELD)
    file = folder / name
    file.write_text(textwrap.dedent(text).replace("ID", task))
    return file


GUIDED = """
import torch, flowlik
from field import Field

class Network(Field):
    def forward(self, z, u, label):
        return self.velocity(z, u, cond=torch.arange(CLASSES)[label])

labels = torch.arange(60) % 3
x = 2 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0)) + 3 * labels[:, None]
TASK = flowlik.ArrayTask(
    id="ID", train=x, test=x, labels={"train": labels, "test": labels},
    models={"net": lambda: flowlik.wrap(Network(), (2,), null=3)},
)
"""
"""Class 3 stands for none: guided by w, the mean of class c is 3 ((1 + w) c - 3 w)."""
