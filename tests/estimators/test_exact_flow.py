"""An exact flow's likelihood is the change of variables by its own inverse, in one forward."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from toy_flows import Field, points

from flowlik.tasks.registry import get_task
from flowlik.training.card import accuracy
from flowlik_estimators import get
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.networks.attention import Past, fuse_attention
from flowlik_models.networks.autoregressive import AutoregressiveFlow
from flowlik_models.objectives.energy import exact_targets
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training.batches import ClosedFormSource
from flowlik_models.training.losses import loss_of
from flowlik_models.zoo import build, load_model

EVENTS = [((2,), 1), ((6,), 2), ((12,), 3), ((1, 4, 4), 2), ((3, 4, 6), 2)]


def stirred(shape: tuple[int, ...], patch: int, **options: Any) -> AutoregressiveFlow:
    """A flow whose weights are no longer zero, float64."""
    generator, d = torch.Generator().manual_seed(1), math.prod(shape)
    axes = torch.linalg.qr(torch.randn(d, d, generator=generator))[0] if len(shape) == 1 else None
    scales = torch.rand(d, generator=generator) + 0.5
    mean = torch.randn(d, generator=generator)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)  # of the turns and the first weights
        flow = AutoregressiveFlow(
            shape, mean, scales, axes, patch=patch, blocks=3, layers=1, width=16
        ).double()
    flow.axes, flow.turns = orthogonal(flow.axes), orthogonal(flow.turns)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return flow


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(matrices)[0] if matrices.ndim > 1 and matrices.numel() else matrices


@pytest.mark.parametrize(("shape", "patch"), EVENTS)
def test_it_is_the_change_of_variables_by_the_whole_jacobian(shape: tuple[int, ...], patch: int) -> None:
    flow, x = stirred(shape, patch), points(3, math.prod(shape)).view(3, *shape)
    out = get("exact-flow").log_prob(flow, x)
    for row, value in zip(x, out.log_prob, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda y: flow.inverse(y.view(1, *shape))[0].flatten(), row.flatten()
        )
        z = flow.inverse(row[None])[0]
        normal = -0.5 * (z.square().sum() + z.numel() * math.log(2 * math.pi))
        torch.testing.assert_close(value, normal + torch.linalg.slogdet(jacobian)[1])
    assert (out.cost.forwards, out.cost.vjps, out.stderr) == (1, 0, None)


@pytest.mark.parametrize(("shape", "patch"), EVENTS)
def test_noise_comes_back_from_the_data_it_makes(shape: tuple[int, ...], patch: int) -> None:
    flow = stirred(shape, patch)
    drawn = get("exact-flow").sample(flow, 5, dtype=torch.float64)
    again = get("exact-flow").sample(flow, 5, dtype=torch.float64, log_prob=False)
    assert drawn.status == again.status == "ok"
    assert torch.equal(drawn.x, again.x)
    assert again.cost.forwards == flow.passes_to_sample == flow.tokens  # a pass a token
    assert drawn.cost.forwards == flow.tokens + 1
    z, log_det = flow.inverse(drawn.x)
    torch.testing.assert_close(flow.from_noise(z), drawn.x)
    assert drawn.log_prob is not None
    expected = -0.5 * z.flatten(1).square().sum(1) - 0.5 * z[0].numel() * math.log(2 * math.pi) + log_det
    torch.testing.assert_close(drawn.log_prob, expected)


def test_the_mass_of_any_network_is_one() -> None:
    flow = stirred((2,), 1)
    axis = torch.linspace(-30, 30, 241, dtype=torch.float64)  # scales up to e^3 have long tails
    grid = torch.cartesian_prod(axis, axis)
    mass = get("exact-flow").log_prob(flow, grid).log_prob.exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(float(mass) - 1) < 1e-3


def test_an_untrained_flow_is_the_gaussian_of_its_moments() -> None:
    flow = build("gmm-64d", RECIPES["gmm-64d"]["exact-flow"])
    truth = closed_form("gmm-64d")
    x = truth.sample(20, generator=torch.Generator().manual_seed(0))
    mean, covariance = truth.mean_and_covariance()
    normal = torch.distributions.MultivariateNormal(mean.double(), covariance.double())
    found = get("exact-flow").log_prob(flow, x).log_prob
    torch.testing.assert_close(found, normal.log_prob(x.double()), rtol=0, atol=2e-3)


def test_fused_attention_sees_no_later_token_either() -> None:
    flow = stirred((12,), 3)
    x = points(4, 12)
    plain = flow.inverse(x)
    fuse_attention(flow, True)
    for ours, expected in zip(flow.inverse(x), plain, strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_likelihood_of_the_data_is_what_it_is_trained_by() -> None:
    recipe = RECIPES["gmm-2d"]["exact-flow"].with_options(
        batch=128, network={"patch": 1, "width": 16, "blocks": 2, "layers": 1}
    )
    torch.manual_seed(0)
    flow, source = build("gmm-2d", recipe), ClosedFormSource(closed_form("gmm-2d"))
    adam = torch.optim.Adam(flow.parameters(), lr=1e-2)

    def loss(seed: int) -> torch.Tensor:
        return loss_of(recipe, flow, flow, source, torch.Generator().manual_seed(seed), "cpu", 0)

    before = loss(1_000).detach()
    data = source.data(128, recipe, torch.Generator().manual_seed(1_000))
    direct = -get("exact-flow").log_prob(flow, data).log_prob.mean() / 2
    assert float(before) == pytest.approx(float(direct), rel=1e-5)
    for step in range(40):
        adam.zero_grad()
        loss(step).backward()
        adam.step()
    entropy = -exact_targets(source.truth, data, 1.0)[0].mean() / 2
    assert float(entropy) < float(loss(1_000).detach()) < float(before) - 0.05


def test_what_has_no_inverse_is_refused_and_a_misshapen_answer_an_error() -> None:
    refused = get("exact-flow").log_prob(Field(lambda x, t: -x, d=3), points(2, 3))
    assert refused.reason == "needs an exact inverse with its log-determinant (an `inverse` method)"
    flow = stirred((2,), 1)
    eps = get("exact-flow", eps=0.1).log_prob(flow, points(2, 2))
    assert eps.reason == "eps=0.1: the model's density is that at eps=0 alone; leave eps out"

    class Half:
        event_shape = (2,)

        def inverse(self, x: torch.Tensor, *, cond: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x  # a determinant a coordinate

    with pytest.raises(ValueError, match=r"log-determinant has shape \(3, 2\), expected \(3,\)"):
        get("exact-flow").log_prob(Half(), points(3, 2))
    without = get("exact-flow").sample(Half(), 3)
    assert without.reason == "needs a way from noise to data (a `from_noise` method)"
    with pytest.raises(ValueError, match=r"patches of 3 do not divide events of shape \(1, 4, 4\)"):
        AutoregressiveFlow((1, 4, 4), torch.zeros(16), torch.ones(16), patch=3)


def test_the_card_holds_it_against_the_data_and_never_against_a_teacher() -> None:
    flows = {task: build(task, RECIPES[task]["exact-flow"]) for task in ("gmm-2d", "digits")}
    cards = {
        task: accuracy(get_task(task), flow, "cpu")["test"]["exact-flow"] for task, flow in flows.items()
    }
    assert cards["gmm-2d"]["bpd_mae"] > 0
    assert math.isfinite(cards["digits"]["bpd"])
    assert not {"bpd_mae", "bpd_error"} & set(cards["digits"])


def test_the_shipped_flows_come_back_from_the_noise_and_hold_mass_one() -> None:
    flow = load_model("gmm-2d", "exact-flow")
    axis = torch.linspace(-5, 5, 201)
    density = get("exact-flow").log_prob(flow, torch.cartesian_prod(axis, axis)).log_prob.exp()
    assert abs(float(density.sum() * (axis[1] - axis[0]) ** 2) - 1) < 1e-3
    for task in ("gmm-2d", "digits"):
        flow: Any = load_model(task, "exact-flow")
        z = torch.randn(50, *flow.event_shape, generator=torch.Generator().manual_seed(0))
        x = flow.from_noise(z)
        torch.testing.assert_close(flow.inverse(x)[0], z, rtol=0, atol=1e-3)
        near, flow = get("exact-flow").log_prob(flow, x).log_prob, flow.double()
        exact = get("exact-flow").log_prob(flow, x.double()).log_prob
        assert float((near - exact).abs().max()) / z[0].numel() < 1e-4
        jacobian = torch.autograd.functional.jacobian(
            lambda y, flow=flow: flow.inverse(y)[0].flatten(), x[:1].double()
        ).view(z[0].numel(), -1)
        said = float(flow.inverse(x[:1].double())[1].detach())
        assert said == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-5)


@pytest.mark.parametrize(("shape", "patch"), EVENTS)
def test_a_sample_is_what_whole_passes_would_make(shape: tuple[int, ...], patch: int) -> None:
    flow = stirred(shape, patch)
    for fused in (False, True):
        fuse_attention(flow, fused)
        for block in flow.blocks:
            tokens = points(3, math.prod(shape)).view(3, flow.tokens, -1)
            pasts: list[Past] = [[] for _ in block.layers]
            said = [block.following(tokens[:, :n], pasts) for n in range(flow.tokens)]
            for parts, whole in zip(zip(*said, strict=True), block(tokens), strict=True):
                torch.testing.assert_close(torch.cat(parts, 1), whole)
