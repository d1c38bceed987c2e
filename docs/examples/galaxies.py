"""A network that nobody here trained: the score network of 32 x 32 galaxies inside the wheel of galaxygrad 0.1.9.

It is read with numpy from your own installation, `pip install --no-deps galaxygrad==0.1.9`, whose licence is not
stated: nothing of it is here. Its data are not public, so it is judged on its own samples.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flowlik
from flowlik_estimators import get

SAMPLES = Path("runs/galaxies.npy")


def arrays(name: str = "eqx_hsc_ScoreNet32.eqx", count: int = 54) -> list[Tensor]:
    """The network's arrays in the order of the file; nothing is unpickled."""
    spec = find_spec("galaxygrad")
    if spec is None or spec.submodule_search_locations is None:
        raise ValueError("galaxygrad is not installed: pip install --no-deps galaxygrad==0.1.9")
    with (Path(spec.submodule_search_locations[0]) / name).open("rb") as file:
        return [torch.from_numpy(np.lib.format.read_array(file, allow_pickle=False)) for _ in range(count)]


class Mixer(nn.Module):
    """Four mixer blocks over 8 x 8 patches of 4 x 4 pixels; the time is a second channel."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.w = nn.ParameterList(weights)

    def _norm(self, h: Tensor, k: int) -> Tensor:
        return F.layer_norm(h, h.shape[1:], self.w[k], self.w[k + 1])

    def _two_layers(self, h: Tensor, k: int) -> Tensor:
        return F.linear(F.relu(F.linear(h, self.w[k], self.w[k + 1])), self.w[k + 2], self.w[k + 3])

    def forward(self, z: Tensor, u: Tensor) -> Tensor:
        """The score of p_u at z (batch, 1, 32, 32)."""
        time = (u / 10).view(-1, 1, 1, 1).expand_as(z)
        h = F.conv2d(torch.cat([z, time], 1), self.w[0], self.w[1].flatten(), stride=4)
        size, h = h.shape, h.flatten(2)
        for k in range(4, 52, 12):
            h = h + self._two_layers(self._norm(h, k + 8), k)
            h = (h.mT + self._two_layers(self._norm(h.mT, k + 10), k + 4)).mT
        h = self._norm(h, 52).view(size)
        return F.conv_transpose2d(h, self.w[2].transpose(0, 1).flip(2, 3), self.w[3].flatten(), stride=4)


def model() -> nn.Module:
    """Its field: variance-preserving with beta = 1, from u = 8 to u = 0.01, the smallest it is used at."""
    path = (lambda u: torch.exp(-u / 2), lambda u: (-torch.expm1(-u)).sqrt(), (8.0, 0.01))
    return flowlik.wrap(Mixer(arrays()).eval(), (1, 32, 32), predicts="score", path=path)


def samples(n: int = 128) -> np.ndarray:
    """Its own samples, drawn once."""
    if not SAMPLES.is_file():
        SAMPLES.parent.mkdir(parents=True, exist_ok=True)
        drawn = get("ode", solver="rk4", steps=24, grid="logsnr").sample(model(), n, log_prob=False)
        np.save(SAMPLES, drawn.x.numpy())
    return np.load(SAMPLES)


x = samples()
TASK = flowlik.ArrayTask(id="galaxies", train=x[:64], test=x[64:], models={"score-network": model})
