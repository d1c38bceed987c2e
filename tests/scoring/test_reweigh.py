"""A model's own samples, weighed towards a law whose constant is not known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

import flowlik
from flowlik_models.synthetic import closed_form

GAUSSIAN = closed_form("gaussian-2d")


class Wide:
    """An exact flow onto N(0, 1.5^2 I), whose samples are weighed towards N(0, I)."""

    event_shape = (2,)

    def inverse(self, x: Tensor, *, cond: Any = None) -> tuple[Tensor, Tensor]:
        return x / 1.5, x.new_full((len(x),), -2 * math.log(1.5))

    def from_noise(self, z: Tensor, *, cond: Any = None) -> Tensor:
        return 1.5 * z


def energy(x: Tensor) -> Tensor:
    return 0.5 * x.square().sum(1)


@pytest.fixture(scope="module")
def found() -> Any:
    return flowlik.reweigh(Wide(), energy, 4000, estimator="exact-flow")


def test_the_constant_the_share_and_means_are_the_exact_ones(found: Any) -> None:
    # E w^2/(E w)^2 of two coordinates, each s^2/sqrt(2 s^2 - 1)
    share = math.sqrt(2 * 1.5**2 - 1) ** 2 / 1.5**4
    assert found.share.mean == pytest.approx(share, abs=0.02)
    assert abs(found.log_z.mean - math.log(2 * math.pi)) < 4 * found.log_z.se < 0.05
    second = found.expectation(lambda x: x[:, 0].square())
    assert abs(second.mean - 1.0) < 4 * second.se < 0.2
    inside, beyond = norm.cdf(1.0), norm.sf(1.0)
    gap = found.free_energy(lambda x: x[:, 0] < 1.0, lambda x: x[:, 0] > 1.0)
    assert abs(gap.mean - math.log(beyond / inside)) < 4 * gap.se < 0.3
    assert found.nfe == 2.0  # there, and back for the density
    assert found.heaviest < 0.01
    assert str(found).startswith("effective share 0.69")


def test_sets_are_independent_and_the_same_for_a_seed(found: Any) -> None:
    again = flowlik.reweigh(Wide(), energy, 4000, estimator="exact-flow", sets=2, seed=1)
    assert torch.equal(again.x[0], found.x[1])
    assert not torch.equal(found.x[0], found.x[1])


def test_of_an_exact_density_all_weights_are_alike() -> None:
    same = flowlik.reweigh(
        GAUSSIAN, lambda x: 2.0 - GAUSSIAN.log_prob(x), 50, estimator="f2d2[steps=2]", sets=2
    )
    assert same.share.mean == pytest.approx(1.0, abs=1e-6)
    assert same.log_z.mean == pytest.approx(-2.0, abs=1e-4)


def test_one_heavy_sample_is_told() -> None:
    heavy = flowlik.reweigh(Wide(), lambda x: -20.0 * (x[:, 0] > 3.5), 200, estimator="exact-flow", sets=2)
    assert heavy.heaviest > 0.1
    assert "one sample has" in str(heavy)
    assert math.isinf(heavy.free_energy(lambda x: x[:, 0] > 99.0, lambda x: x[:, 0] < 99.0).mean)


def test_samples_outside_the_energys_domain_have_no_weight(found: Any) -> None:
    half = flowlik.reweigh(
        Wide(), lambda x: torch.where(x[:, 0] > 0, energy(x), math.nan), 4000, estimator="exact-flow"
    )
    assert abs(half.log_z.mean - math.log(math.pi)) < 4 * half.log_z.se < 0.1
    root = half.expectation(lambda x: x[:, 0].sqrt())  # no number where there is no weight
    assert abs(root.mean - 0.8222) < 4 * root.se < 0.05  # 2^(1/4) Gamma(3/4)/sqrt(pi)
    assert half.share.mean == pytest.approx(found.share.mean / 2, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 1}, "n=1, sets=5: expected two or more"),
        ({"sets": 1}, "sets=1: expected two or more"),
        ({"estimator": "f2d2[steps=1]"}, "needs a joint flow map"),
        ({"estimator": "f2d2[steps=1|2]"}, "names 2, expected one"),
        ({"energy": lambda x: x}, r"energy must be a tensor \(10,\), got \(10, 2\)"),
        ({"energy": lambda x: 1.0}, r"energy must be a tensor \(10,\), got float"),
        ({"energy": lambda x: torch.full((len(x),), math.nan)}, "no sample of a set has a finite weight"),
    ],
)
def test_what_cannot_be_weighed_is_one_line(options: dict[str, Any], message: str) -> None:
    given = {"n": 10, "energy": energy, "estimator": "exact-flow"} | options
    with pytest.raises(ValueError, match=message) as error:
        flowlik.reweigh(Wide(), given.pop("energy"), given.pop("n"), **given)
    assert "\n" not in str(error.value)


def test_a_value_of_another_shape_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match=r"the value of each sample must be a tensor \(20000,\)"):
        found.expectation(lambda x: x)
    assert np.isfinite(found.log_weights).all()


# --- the example of four particles ---


@pytest.fixture(scope="module")
def wells() -> dict[str, Any]:
    file = Path(__file__).resolve().parents[2] / "docs" / "examples" / "double_wells.py"
    scope: dict[str, Any] = {"__name__": "double_wells"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    return scope


def test_the_energy_is_the_sum_over_pairs_and_knows_no_place_angle_or_order(wells: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = 2.0 * torch.randn(7, 6, dtype=torch.float64)
    place = wells["BASIS"].double() @ x.view(7, 3, 2)
    assert place.mean(1).abs().max() < 1e-6  # no common translation
    torch.testing.assert_close(place.square().sum((1, 2)), x.square().sum(1), rtol=1e-6, atol=0)
    for row, found in zip(place.tolist(), wells["energy"](x).tolist(), strict=True):
        away = [math.dist(row[i], row[j]) - 4.0 for i in range(4) for j in range(i)]
        assert found == pytest.approx(sum(-4.0 * d**2 + 0.9 * d**4 for d in away), rel=1e-6)
    turned = wells["energy"](wells["turned"](x.float()))  # a sum of float32 fourth powers that cancel
    torch.testing.assert_close(turned, wells["energy"](x.float()), rtol=1e-4, atol=1e-3)


def test_chains_that_have_not_mixed_are_told(wells: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(50, 200, generator=generator)
    assert wells["split_chains"](mixed) == pytest.approx(1.0, abs=0.01)
    assert wells["split_chains"](mixed + torch.arange(50)[:, None]) > 5.0


def test_the_example_says_share_constant_and_free_energy_of_each(wells: dict[str, Any]) -> None:
    chains, *lines = wells["report"](0.0, 20)
    assert chains.startswith("chains: R-hat ")
    names = ["field, ODE", "map, 8 steps", "map, 4 steps", "map, 2 steps", "map, 1 step"]
    assert [line.partition(":")[0] for line in lines] == names
    assert all("effective share" in line and "log Z" in line for line in lines)
    assert "8 evaluations a sample" in lines[1]
