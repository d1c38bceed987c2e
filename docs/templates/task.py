"""A task: a distribution with its test points, its truth and its models; data sets derive from `flowlik.tasks.Task`."""

from dataclasses import dataclass
from functools import cached_property

import torch

from flowlik.tasks import ClosedFormTask, digest
from flowlik_models.gaussian import Gaussian

from .model import AxisMap


@dataclass(frozen=True, kw_only=True)
class Cigar(ClosedFormTask):
    """N(0, diag(1, 0.01)); a closed form brings points, reference and the model `closed-form` with it."""

    id: str = "cigar-2d"
    event_shape: tuple[int, ...] = (2,)
    description: str = "a Gaussian ten times as long as it is wide"

    @cached_property
    def truth(self) -> Gaussian:
        """What points are drawn from and what knows their exact density."""
        return Gaussian(torch.zeros(2), torch.diag(torch.tensor([1.0, 0.01])))

    def data_hash(self, split: str) -> str:
        """Twelve digits of everything the points depend on; raise `version` where one of the constants changes."""
        return digest(self.id, self.version, split)

    @property
    def models(self) -> tuple[str, ...]:
        """The closed form and one more; a task with no model of its own leaves out this and `load_model`."""
        return (*super().models, "axis-map")

    def load_model(self, model: str, device: str) -> tuple[torch.nn.Module, str]:
        """The model, and twelve digits that name its weights."""
        if model != "axis-map":
            return super().load_model(model, device)
        return AxisMap((1.0, 0.11)).to(device).eval(), digest(model, 1.0, 0.11)  # 0.1 would be right
