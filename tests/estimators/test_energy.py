"""A scalar network says its log-density in one forward, and is asked for no other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field, points, spd

from flowlik.cells import Cell, Options
from flowlik.running.run import run_cell
from flowlik_estimators import get
from flowlik_models.closed_forms.gaussian import Gaussian


class Density(nn.Module):
    """A Gaussian's log-density as a network, above by ``offset`` or misshapen."""

    def __init__(
        self, d: int = 3, offset: float = 0.0, shape: tuple[int, ...] = (), **attributes: Any
    ) -> None:
        super().__init__()
        self.exact, self.shape = Gaussian(points(d, seed=3), spd(d)), shape
        self.event_shape = (d,)
        self.offset = nn.Parameter(torch.tensor(offset, dtype=torch.float64))
        self.__dict__.update(attributes)

    def log_density(self, x: Tensor, *, cond: Tensor | None = None) -> Tensor:
        value = self.exact.log_prob(x) + self.offset + (0.0 if cond is None else cond)
        return value.reshape(-1, *self.shape)


def test_it_is_the_networks_answer_for_one_forward() -> None:
    model, x = Density(offset=0.5), points(7, 3)
    out = get("energy").log_prob(model, x)
    assert torch.equal(out.log_prob, model.exact.log_prob(x) + 0.5)
    assert (out.cost.forwards, out.cost.vjps, out.stderr) == (1, 0, None)
    labels = points(7)
    given = get("energy").log_prob(model, x, cond=labels)
    assert torch.equal(given.log_prob, out.log_prob + labels)


def test_it_can_be_a_loss() -> None:
    model, x = Density(), points(7, 3)
    get("energy").log_prob(model, x, differentiable=True).log_prob.sum().backward()
    assert model.offset.grad is not None
    assert float(model.offset.grad) == 7.0


def test_values_that_are_not_finite_are_not_valid() -> None:
    out = get("energy").log_prob(Density(offset=math.nan), points(3, 3))
    assert (out.status, out.valid.any()) == ("diverged", False)


def test_a_model_without_density_is_refused_and_a_misshapen_answer_an_error() -> None:
    refused = get("energy").log_prob(Field(lambda x, t: -x, d=3), points(2, 3))
    assert (refused.status, refused.reason) == (
        "refused",
        "needs a scalar network of the log-density (a `log_density` method)",
    )
    with pytest.raises(ValueError, match=r"log-density has shape \(2, 1\), expected \(2,\)"):
        get("energy").log_prob(Density(shape=(1,)), points(2, 3))


def test_it_knows_the_density_of_its_own_data_end_alone() -> None:
    x = points(2, 3)
    assert get("energy", eps=0.01).log_prob(Density(eps=0.01), x).status == "ok"
    refused = get("energy", eps=0.02).log_prob(Density(eps=0.01), x)
    assert refused.reason == "eps=0.02: the model's density is that at eps=0.01 alone; leave eps out"
    assert get("energy").data_end(Density(eps=0.01)) == 0.99


def test_its_cells_are_timed_beside_a_forward_of_the_network() -> None:
    cell = Cell(task="gmm-2d", model="energy", estimator=get("energy"), options=Options(n_items=64, rounds=1))
    row, _ = run_cell(cell)
    assert row["wall_s_median"] > 0
    assert row["forward_equivalents"] > 0
