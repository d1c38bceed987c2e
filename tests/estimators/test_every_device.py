"""Every estimator runs on a device, with every option, as on the CPU; and the host waits for the device but seldom."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from pretended_device import PRETENDED, MixedDevicesError, host_synchronisations, own, to_pretended
from sizes import figure
from test_options import BASES, CASES, Everything
from test_options import coarse as at_tolerances
from torch import Tensor, nn

from flowlik_estimators import examine, get, with_error
from flowlik_estimators.base import Estimator, _options
from flowlik_estimators.counting import METHODS
from flowlik_models.adapters import wrap
from flowlik_models.adapters.paths import NAMED

A_CALL = 3
"""Waits of a call, beside one a solver step: the points are finite, the times (or counts of rows) are copied, some
answer is valid."""


class Counting(Everything):
    """`Everything`, with the number of times that it was asked for images."""

    asked = 0

    def generate(self, z: Tensor, *, cond: Tensor | None = None) -> Tensor:
        self.asked += 1
        return super().generate(z, cond=cond)


class Layer(nn.Module):
    """A field of one layer, ``B tanh(A x + a t) - x/2``, whose divergence is a closed form."""

    def __init__(self) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.inwards = nn.Parameter(torch.randn(4, 4, generator=drawn) / 2)
        self.outwards = nn.Parameter(torch.randn(4, 4, generator=drawn) / 2)
        self.clock = nn.Parameter(torch.randn(4, generator=drawn))

    def _hidden(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ self.inwards + t[:, None] * self.clock)

    def velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """dx/dt, (batch, 4)."""
        return self._hidden(x, t) @ self.outwards - 0.5 * x

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """Its trace, (batch,)."""
        return (1 - self._hidden(x, t).square()) @ (self.inwards * self.outwards.T).sum(0) - 2.0

    def log_prob(self, x: Tensor) -> Tensor:
        """A number of x, (batch,), for what asks a scalar network."""
        return torch.tanh(x @ self.inwards).sum(1)


class Everywhere(nn.Module):
    """`Everything`, of one layer, as a module, which moves to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.everything = Counting()
        self.inner = self.everything.inner = Layer()
        self.event_shape, self.moments = self.everything.event_shape, self.everything.moments

    def __getattr__(self, name: str) -> Any:
        if name in (*METHODS, "fake", "teacher"):
            return getattr(self.everything, name)
        return super().__getattr__(name)


@cache
def model(device: str) -> Everywhere:
    return to_pretended(Everywhere()) if device == PRETENDED else Everywhere()


def points(device: str) -> Tensor:
    x = torch.randn(4, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    return to_pretended(x) if device == PRETENDED else x


def answers(estimator: Estimator, device: str) -> dict[str, Any]:
    """The numbers of an estimate and of samples, on the CPU."""
    out = estimator.log_prob(model(device), points(device))
    drawn = estimator.sample(model(device), 4)
    tensors = {"log_prob": out.log_prob, "stderr": out.stderr, "valid": out.valid, "x": drawn.x, **out.extra}
    tensors |= {"log_prob of samples": drawn.log_prob}
    elsewhere = [
        name for name, tensor in tensors.items() if tensor is not None and tensor.device.type not in device
    ]
    assert not elsewhere
    found = {name: None if tensor is None else tensor.cpu() for name, tensor in tensors.items()}
    return {**found, "status": (out.status, out.reason, drawn.status, drawn.reason), "nfe": out.cost.nfe}


def ready(name: str, options: dict[str, Any]) -> Estimator:
    estimator = get(name, **options)
    if (why := estimator.supports(model("cpu"))) is not None:
        pytest.skip(why)
    return estimator


coarse = partial(at_tolerances, tolerances={"rtol": 0.3, "atol": 0.3, "tol": 10.0})
FEW: dict[str, Any] = {"solver": "euler", "steps": 2}


def named_values(name: str, option: str) -> tuple[Any, ...]:
    """What an option may be that is one of several names, or true or false; numbers say how often a line runs."""
    hint = _options(type(get(name)))[option]
    found = [
        value for kind in (hint, *get_args(hint)) if get_origin(kind) is Literal for value in get_args(kind)
    ]
    return (True, False) if hint is bool else tuple(found)


def made(name: str, *spellings: dict[str, Any]) -> Estimator | None:
    """The first of these that is an estimator."""
    for options in spellings:
        try:
            return get(name, **coarse(name, options))
        except ValueError:
            continue
    return None


def covering(name: str, base: dict[str, Any]) -> list[Estimator]:
    """The base, and the base with every named value of an option, in few steps; none that an earlier base led to.

    Solvers and grids, which whitened-ode hands on to the solve that it shares with ode, are those of ode alone.
    """
    before: set[Estimator] = set()
    seen: set[tuple[str, Any]] = set()
    for each in BASES[name]:
        first = get(name, **coarse(name, each))
        found = [first]
        for option, default in first.params().items():
            for value in named_values(name, option):
                shared = name == "whitened-ode" and option in ("solver", "grid")
                if value == default or (option, value) in seen or shared:
                    continue
                few = {**each, **({"steps": 2} if option == "solver" else FEW), option: value}
                if (estimator := made(name, few, {**each, option: value})) is not None:
                    found.append(estimator)
                    seen.add((option, value))
        fresh = [estimator for estimator in dict.fromkeys(found) if estimator not in before]
        if each is base:
            return fresh
        before |= set(fresh)
    raise AssertionError


@pytest.mark.parametrize(("name", "base"), CASES)
def test_an_estimator_gives_on_a_device_what_it_gives_on_the_cpu(name: str, base: dict[str, Any]) -> None:
    ready(name, base)
    for estimator in covering(name, base):
        there, here = answers(estimator, PRETENDED), answers(estimator, "cpu")
        assert there.keys() == here.keys()
        for part, value in here.items():
            if isinstance(value, Tensor):
                close = torch.allclose(
                    there[part].double(), value.double(), rtol=1e-5, atol=1e-6, equal_nan=True
                )
                assert close, (estimator.label, part, there[part], value)
            else:
                assert there[part] == value, estimator.label


@pytest.mark.parametrize(("name", "base"), CASES)
def test_a_likelihood_on_a_device_can_be_a_loss(name: str, base: dict[str, Any]) -> None:
    estimator = ready(name, coarse(name, base))
    if name.startswith("peer-") or base.get("route") == "own-samples":
        pytest.skip("its answer cannot be differentiated")
    x = points(PRETENDED).requires_grad_()
    loss = estimator.log_prob(model(PRETENDED), x, differentiable=True).log_prob.sum()
    (slope,) = torch.autograd.grad(loss, x)
    assert slope.device.type == "pretended"
    assert bool(torch.isfinite(slope.cpu()).all())


@pytest.mark.parametrize(("name", "base"), CASES)
def test_the_host_waits_three_times_a_call_and_once_a_step(name: str, base: dict[str, Any]) -> None:
    estimator = ready(name, coarse(name, base))
    if name.startswith("peer-"):
        pytest.skip("the libraries' own code")
    x = points(PRETENDED)
    estimator.log_prob(model(PRETENDED), x)  # what is copied once: moments, weights of the rules
    asked = model(PRETENDED).everything.asked
    with host_synchronisations() as seen:
        out = estimator.log_prob(model(PRETENDED), x)
    steps = out.cost.accepted_steps + out.cost.rejected_steps
    if "starts" in out.extra:
        # a round of Newton's steps asks for images twice, with a Jacobian and without; a doubling, who goes on
        doublings = math.log2(float(out.extra["starts"].cpu().max()) / estimator.params()["starts"])
        steps = (model(PRETENDED).everything.asked - asked) / 2 + 1 + doublings
    waits = own(seen)
    figure(
        f"waits of the host, {estimator.label}", f"{waits.total()} in {steps:g} steps", f"{A_CALL + steps:g}"
    )
    assert waits.total() <= A_CALL + steps, waits


@pytest.mark.parametrize("options", [FEW, {**FEW, "trace": "hutchinson", "probes": 2}])
def test_the_whole_error_on_a_device_is_that_of_the_cpu(options: dict[str, Any]) -> None:
    estimator = get("ode", **options)
    there, here = (
        with_error(estimator, model(device), points(device)).error for device in (PRETENDED, "cpu")
    )
    assert there is not None
    assert here is not None
    torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-5)


def test_a_model_is_examined_on_a_device_as_on_the_cpu() -> None:
    x = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(3))
    there, here = examine(model(PRETENDED), to_pretended(x)), examine(model("cpu"), x)
    assert [finding.name for finding in there] == [finding.name for finding in here]
    assert "error" not in [finding.name for finding in there]


PREDICTED = {"straight": "velocity", "reversed": "velocity", "edm": "data", "ve": "score", "vp": "noise"}


@pytest.mark.parametrize("path", list(NAMED))
def test_a_wrapped_network_runs_on_a_device_and_waits_for_nothing_of_its_own(path: str) -> None:
    moments = torch.randn(50, 4, generator=torch.Generator().manual_seed(5))
    predicts = PREDICTED.get(path, "noise")
    here, there = (
        wrap(
            nn.Linear(4, 4),
            (4,),
            predicts=predicts,
            path=path,
            moments=moments,
            call=lambda net, z, u, cond: net(z),
        )
        for _ in range(2)
    )
    there.load_state_dict(here.state_dict())
    to_pretended(there)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(3))
    estimator = get("ode", **FEW)
    expected, drawn = estimator.log_prob(here, x), estimator.sample(here, 3)
    estimator.log_prob(there, to_pretended(x))
    with host_synchronisations() as seen:
        found = estimator.log_prob(there, to_pretended(x))
    torch.testing.assert_close(found.log_prob.cpu(), expected.log_prob, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(estimator.sample(there, 3).x.cpu(), drawn.x, rtol=1e-4, atol=1e-4)
    assert own(seen).total() <= A_CALL + FEW["steps"], own(seen)


def test_the_pretended_device_refuses_what_cuda_refuses() -> None:
    here, there = torch.ones(2), to_pretended(torch.ones(2))
    for mixing in (
        lambda: here + there,
        lambda: there @ here,
        lambda: here[to_pretended(torch.tensor([0]))],
        lambda: torch.stack([there[0], here[0]]),
        lambda: torch.func.vmap(lambda row: row + here[0].expand(1))(there[:, None]),
        lambda: torch.func.jvp(lambda x: x * here, (there,), (there,)),
        lambda: torch.func.vjp(lambda x: x * here, there),
        lambda: torch.randn(2, generator=torch.Generator(), device=PRETENDED),
    ):
        with pytest.raises(MixedDevicesError):
            mixing()
    with pytest.raises(TypeError, match="to numpy"):
        there.numpy()
    torch.testing.assert_close((there * torch.tensor(2.0))[torch.tensor([1])].cpu(), torch.tensor([2.0]))


def test_the_pretended_device_counts_what_makes_the_host_wait() -> None:
    x = to_pretended(torch.tensor([1.0, -1.0]))
    for waiting in (
        lambda: x.sum().item(),
        lambda: x.tolist(),
        lambda: float(x[0]),
        lambda: bool((x > 0).any()),
        lambda: x.cpu(),
        lambda: (x > 0).nonzero(),
        lambda: x[x > 0],
        lambda: torch.tensor([1.0], device=PRETENDED),
        lambda: torch.linalg.inv(x[:1, None]),
    ):
        with host_synchronisations() as seen:
            waiting()
        assert seen.total() == 1
        ((line, _),) = seen.items()
        assert line.startswith(__file__)
    with host_synchronisations() as seen:
        x = torch.where(x > 0, x, torch.full((2,), 3.0, device=PRETENDED)) + torch.arange(2, device=PRETENDED)
        x[x > 0] = 1.0
        torch.linalg.slogdet(x.view(2, 1, 1))
    assert not seen
