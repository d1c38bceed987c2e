"""Objects of other libraries are recognised: by fakes that have their names, and the real ones where installed."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import flowlik
from flowlik_estimators import get
from flowlik_models.synthetic import closed_form

EXACT = closed_form("gmm-2d")
X = EXACT.sample(50, generator=torch.Generator().manual_seed(0))
T = torch.linspace(0.1, 0.9, 50)


def of(module: str, kind: type) -> type:
    """The class as if that module had defined it."""
    kind.__module__ = module
    return kind


class ModelWrapper(nn.Module):
    def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
        return EXACT.velocity(x, t)


class Inside(nn.Module):
    def forward(self, xt: Tensor) -> Tensor:
        return EXACT.velocity(xt[:, :-1], xt[:, -1])


class torch_wrapper(nn.Module):  # noqa: N801
    def __init__(self) -> None:
        super().__init__()
        self.model = Inside()


class CNF(nn.Module):
    def __init__(self, times: tuple[float, float]) -> None:
        super().__init__()
        self.times, self.transform = torch.tensor(times), self

    def base(self) -> torch.distributions.Distribution:
        return torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)

    def f(self, u: Tensor, x: Tensor, c: Tensor | None) -> Tensor:
        first, last = self.times.tolist()
        return -EXACT.velocity(x, (last - u) / (last - first)) / (last - first)


class Posterior:
    def __init__(self, mean: Tensor) -> None:
        self.mean = mean


class Denoiser(nn.Module):
    @staticmethod
    def schedule(u: Tensor) -> tuple[Tensor, Tensor]:
        return torch.exp(-4 * u**2), (1 - torch.exp(-8 * u**2) + 1e-6).sqrt()

    def forward(self, x_t: Tensor, t: Tensor) -> Posterior:
        a, s = self.schedule(t)
        y, time = x_t / (a + s)[:, None], a / (a + s)
        return Posterior(y + (1 - time)[:, None] * EXACT.velocity(y, time))


ALL = {
    "flow_matching": (of("flow_matching.utils.model_wrapper", ModelWrapper)(), (2,)),
    "torchcfm": (of("torchcfm.utils", torch_wrapper)(), (2,)),
    "zuko": (of("zuko.flows.continuous", CNF)((0.0, 1.0)), None),
    "zuko, other times": (CNF((0.5, 2.5)), None),
    "azula": (of("azula.denoise", Denoiser)(), (2,)),
}


def test_a_velocity_whose_clock_stands_still_or_rushes_at_an_end_is_finite() -> None:
    """z = u^2 x + (1 - u^2) n and z = u x + sqrt(1 - u^2) n, as flow_matching's schedulers have them."""

    def exact(alpha: Any, sigma: Any) -> Any:
        def net(z: Tensor, u: Tensor) -> Tensor:
            a, s = alpha(u), sigma(u)
            time = (a / (a + s)).clamp(1e-12, 1 - 1e-12)
            y, rates = z / (a + s)[:, None], []
            for scale in (alpha, sigma):
                ahead, behind = scale((u + 1e-6).clamp(max=1)), scale((u - 1e-6).clamp(min=0))
                rates.append(
                    ((ahead - behind) / ((u + 1e-6).clamp(max=1) - (u - 1e-6).clamp(min=0)))[:, None]
                )
            velocity = EXACT.velocity(y, time)
            data = y + (1 - time)[:, None] * velocity
            return rates[0] * data + rates[1] * (data - velocity)

        return net

    for alpha, sigma in (
        (lambda u: u**2, lambda u: 1 - u**2),
        (lambda u: u, lambda u: (1 - u**2).clamp(min=0).sqrt()),
    ):
        model = flowlik.wrap(exact(alpha, sigma), (2,), predicts="velocity", path=(alpha, sigma, (0.0, 1.0)))
        out = get("ode", solver="rk4", steps=32, grid="logsnr").log_prob(model, X.double())
        assert float((out.log_prob - EXACT.log_prob(X.double())).abs().mean()) < 1e-3


@pytest.mark.parametrize("library", list(ALL))
def test_an_object_of_a_library_is_recognised_by_its_class(library: str) -> None:
    net, shape = ALL[library]
    model = flowlik.wrap(net, shape)
    torch.testing.assert_close(model.velocity(X, T), EXACT.velocity(X, T), rtol=1e-3, atol=1e-3)
    assert get("ode", solver="euler", steps=2).log_prob(model, X).cost.forwards == 2.0


class UNet2DModel(nn.Module):
    def __init__(self, out: int = 1) -> None:
        super().__init__()
        self.config = type("Config", (), {"sample_size": 4, "in_channels": 3})()
        self.out = out

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Any:
        return type("Output", (), {"sample": torch.cat([sample] * self.out, 1)})()


def test_a_diffusers_network_brings_its_shape_and_its_variances_are_left_away() -> None:
    of("diffusers.models.unets.unet_2d", UNet2DModel)
    for out in (1, 2):
        model = flowlik.wrap(UNet2DModel(out), predicts="noise")
        assert model.event_shape == (3, 4, 4)
        assert model.velocity(torch.zeros(2, 3, 4, 4), torch.full((2,), 0.5)).shape == (2, 3, 4, 4)


class DiagNormal:
    event_shape = (2,)

    def __init__(self, mean: float = 0.0, stddev: float = 1.0) -> None:
        self.mean, self.stddev = torch.full((2,), mean), torch.full((2,), stddev)


class Rescaled(nn.Module):
    """A flow as zuko's are, y = scale * exp(x): called with a condition it gives a distribution with a transform."""

    def __init__(self, base: Any = None) -> None:
        super().__init__()
        self.scale, self.passes = nn.Parameter(torch.tensor([2.0, 0.5])), 2
        self.base = lambda cond=None: base or of("zuko.distributions", DiagNormal)()

    def forward(self, cond: Any = None) -> Any:
        return self

    transform = property(lambda self: self)

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.scale * x, self.scale.log().sum().expand(len(x))

    def inv(self, z: Tensor) -> Tensor:
        return z / self.scale


def exact_flow(base: Any = None) -> Any:
    return of("zuko.lazy", type("Flow", (Rescaled,), {}))(base)


def test_an_exact_flow_of_zuko_is_taken_as_it_is_and_counted_by_its_passes() -> None:
    model, family = flowlik.wrap(exact_flow()), get("exact-flow")
    found = family.log_prob(model, X)
    normal = torch.distributions.Normal(0.0, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(found.log_prob, normal.log_prob(X).sum(1).double())
    assert found.cost.forwards == 1.0
    drawn = family.sample(model, 5, generator=torch.Generator().manual_seed(0), log_prob=False)
    assert drawn.cost.forwards == 2.0
    torch.testing.assert_close(model.from_noise(model.inverse(X)[0]), X)


@pytest.mark.parametrize(
    ("base", "options", "message"),
    [
        (None, {"predicts": "velocity"}, "Flow is an exact flow, of which predicts has no meaning"),
        (None, {"event_shape": (3,)}, r"the flow is one of \(2,\), not of \(3,\)"),
        (of("zuko.distributions", DiagNormal)(stddev=2.0), {}, r"expected N\(0, I\)"),
        (of("zuko.distributions", DiagNormal)(mean=1.0), {}, r"expected N\(0, I\)"),
        (of("zuko.distributions", type("BoxUniform", (), {}))(), {}, r"BoxUniform.*, expected N\(0, I\)"),
    ],
)
def test_what_an_exact_flow_cannot_be_is_refused(base: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flowlik.wrap(exact_flow(base), **options)


# --- the real libraries ---


def test_a_real_cnf_of_zuko_agrees_with_its_own_log_prob() -> None:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = zuko.flows.CNF(2, hidden_features=(16, 16), exact=True, atol=1e-7, rtol=1e-7).double().eval()
    x = X.double()
    ours = get("ode", rtol=1e-8, atol=1e-8).log_prob(flowlik.wrap(flow), x).log_prob
    gap = (ours - flow().log_prob(x)).abs()
    assert float(gap.mean()) < 3e-4


@pytest.mark.parametrize("kind", ["MAF", "NSF", "RealNVP", "GF", "UNAF"])
def test_a_real_exact_flow_of_zuko_agrees_with_its_own_log_prob(kind: str) -> None:
    zuko = pytest.importorskip("zuko")
    torch.manual_seed(0)
    flow = getattr(zuko.flows, kind)(2, 1, hidden_features=(16,)).eval()
    cond = X[:, :1]
    found = get("exact-flow").log_prob(flowlik.wrap(flow), X, cond=cond)
    assert float((found.log_prob - flow(cond).log_prob(X)).abs().max()) < 1e-5
    assert found.cost.forwards == 1.0


LOG_2PI = math.log(2 * math.pi)


def likelihood_by_flow_matching(net: Any, x: Tensor) -> Tensor:
    """log p(x) by the library's own solver, with the exact divergence."""
    solver = pytest.importorskip("flow_matching.solver")
    _, log_prob = solver.ODESolver(net).compute_likelihood(
        x_1=x,
        log_p0=lambda z: -0.5 * z.square().sum(1) - LOG_2PI,
        step_size=None,
        method="dopri5",
        atol=1e-6,
        rtol=1e-6,
        exact_divergence=True,
    )
    return torch.as_tensor(log_prob)


def test_a_real_flow_matching_wrapper_agrees_with_its_own_likelihood() -> None:
    utils = pytest.importorskip("flow_matching.utils")

    class Mixture(utils.ModelWrapper):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return EXACT.velocity(x, t.expand(len(x)))

    net = Mixture(nn.Identity())
    ours = get("ode", rtol=1e-7, atol=1e-7).log_prob(flowlik.wrap(net, (2,)), X).log_prob
    assert float((ours - likelihood_by_flow_matching(net, X)).abs().mean()) < 3e-4


SCHEDULERS = (
    "CondOTScheduler",
    "PolynomialConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "VPScheduler",
)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_real_scheduler_of_flow_matching_agrees_with_its_own_likelihood(name: str) -> None:
    utils = pytest.importorskip("flow_matching.utils")
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 2)).double()

    class Network(utils.ModelWrapper):  # type: ignore[name-defined, misc]
        def forward(self, x: Tensor, t: Tensor, **extras: Any) -> Tensor:
            return self.model(torch.cat([x, t.expand(len(x))[:, None]], 1))  # type: ignore[no-any-return]

    net, x = Network(layers), X.double()
    scheduler = getattr(schedulers, name)(*((2,) if name.startswith("Poly") else ()))
    ours = get("ode", rtol=1e-6, atol=1e-6).log_prob(flowlik.wrap(net, (2,), path=scheduler), x).log_prob
    assert float((ours - likelihood_by_flow_matching(net, x)).abs().mean()) < 3e-4


def test_a_real_wrapper_of_torchcfm_agrees_with_torchdiffeq_by_hand() -> None:
    wrapper = pytest.importorskip("torchcfm.utils").torch_wrapper
    mlp = pytest.importorskip("torchcfm.models.models").MLP
    torch.manual_seed(0)
    net = wrapper(mlp(dim=2, time_varying=True, w=32).double())

    def augmented(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x = state[0].detach().requires_grad_()
        v = net(t, x)
        rows = [torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2)]
        return v.detach(), sum(rows, torch.zeros_like(rows[0]))

    start, times = (X.double(), torch.zeros(50, dtype=torch.float64)), torch.tensor([1.0, 0.0])
    with torch.enable_grad():
        z, divergence = torchdiffeq.odeint(augmented, start, times.double(), rtol=1e-6, atol=1e-6)
    theirs = -0.5 * z[-1].square().sum(1) - LOG_2PI + divergence[-1]
    ours = get("ode", rtol=1e-6, atol=1e-6).log_prob(flowlik.wrap(net, (2,)), X.double()).log_prob
    assert float((ours - theirs).abs().mean()) < 3e-4


@pytest.mark.parametrize("name", ["VPSchedule", "VESchedule", "CosineSchedule", "RectifiedSchedule"])
def test_a_real_analytical_denoiser_of_azula_gives_its_gaussian(name: str) -> None:
    denoise = pytest.importorskip("azula.denoise")
    covariance = pytest.importorskip("azula.linalg.covariance")
    mean, variance = torch.tensor([0.5, -1.0]).double(), torch.tensor([0.4, 0.3]).double()
    law = torch.distributions.Independent(torch.distributions.Normal(mean, variance.sqrt()), 1)
    schedule = getattr(pytest.importorskip("azula.noise"), name)()
    net = denoise.GaussianDenoiser(mean, covariance.DiagonalCovariance(variance), schedule)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x, moments = law.sample((50,)), law.sample((100_000,))
    model = flowlik.wrap(net, (2,), moments=moments)
    out = get("ode", solver="rk4", steps=32, grid="logsnr").log_prob(model, x).log_prob
    assert float((out - law.log_prob(x)).abs().mean()) < 3e-4
    both = model.velocity(
        x[:2], torch.tensor([0.3, 0.7]).double()
    )  # as many rows as dimensions, and two times
    alone = [model.velocity(x[k : k + 1], torch.tensor([0.3 + 0.4 * k]).double()) for k in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))


def test_a_real_denoiser_of_azula_gives_its_gaussian() -> None:
    denoise = pytest.importorskip("azula.denoise")
    noise = pytest.importorskip("azula.noise")

    class Exact(denoise.Denoiser):  # type: ignore[name-defined, misc]
        schedule = noise.VPSchedule()

        def forward(self, x_t: Tensor, t: Tensor) -> Any:
            a, s = self.schedule(t)
            return denoise.DiracPosterior((a * 0.25 / (a**2 * 0.25 + s**2))[:, None] * x_t)

    x = 0.5 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = flowlik.wrap(Exact(), (2,), moments=0.5 * torch.randn(100_000, 2))
    out = get("ode", rtol=1e-7, atol=1e-7).log_prob(model, x).log_prob
    truth = torch.distributions.Normal(0.0, 0.5).log_prob(x).sum(1)
    assert float((out - truth).abs().mean()) < 1e-3


def test_a_real_unet_of_torchcfm_is_a_field() -> None:
    unet = pytest.importorskip("torchcfm.models.unet.unet")
    net = unet.UNetModelWrapper(dim=(1, 8, 8), num_channels=32, num_res_blocks=1, channel_mult=(1, 2)).eval()
    x, t = torch.randn(2, 1, 8, 8), torch.full((2,), 0.3)
    torch.testing.assert_close(flowlik.wrap(net, (1, 8, 8)).velocity(x, t), net(t, x))


def test_a_real_unet_of_diffusers_is_a_field() -> None:
    diffusers = pytest.importorskip("diffusers")
    net = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    model = flowlik.wrap(net, path=diffusers.DDPMScheduler())
    out = get("ode", solver="euler", steps=2, trace="hutchinson").log_prob(model, torch.randn(2, 1, 8, 8))
    assert (out.status, out.cost.forwards) == ("ok", 2.0)


def test_the_example_of_galaxies_reads_the_users_own_installation() -> None:
    if find_spec("galaxygrad") is None:
        pytest.skip("pip install --no-deps galaxygrad==0.1.9")
    file = Path(__file__).resolve().parents[3] / "docs" / "examples" / "galaxies.py"
    scope: dict[str, Any] = {"__name__": "galaxies"}
    exec(compile(file.read_text().partition("\nx = samples()")[0], str(file), "exec"), scope)
    model = scope["model"]()
    z = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    score = model.network(z, torch.full((4,), 8.0))
    assert float((score + z).detach().abs().mean()) < 0.05  # that of N(0, I), which the noisy end is
    out = get("ode", solver="euler", steps=2, trace="hutchinson").log_prob(model, 0.5 * z)
    assert (out.status, out.cost.forwards) == ("ok", 2.0)
