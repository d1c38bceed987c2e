"""The examination finds each slip of a wrapper on three kinds of network, and nothing on what is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field

from flowlik.evaluation.models import load
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik.tasks.task import UnavailableError
from flowlik_estimators import Finding, examine
from flowlik_models.checkpoints import CheckpointError
from flowlik_models.closed_forms.gaussian import Gaussian

TASKS = ("gaussian-2d", "gmm-2d", "gmm-64d", "checkerboard-2d", "thin-2d", "digits", "digits-gmm")
NETWORKS = [
    ("gmm-2d", "closed-form"),
    ("gmm-2d", "teacher"),
    ("gmm-64d", "direct-f2d2"),
    ("digits", "teacher"),
]
three_networks = pytest.mark.parametrize(("task", "model"), NETWORKS, ids=lambda name: name)
Velocity = Callable[..., Tensor]


class Wrapped:
    """A field whose velocity is another's, changed."""

    def __init__(self, inner: Any, change: Callable[[Velocity, Tensor, Tensor], Tensor]) -> None:
        self.inner, self.change = inner, change
        self.event_shape, self.eps = inner.event_shape, getattr(inner, "eps", 0.0)
        self.calls = self.rows = 0

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        self.calls, self.rows = self.calls + 1, max(self.rows, len(x))
        return self.change(self.inner.velocity, x, t)


@lru_cache
def points(task: str) -> Tensor:
    return whole(get_task(task).items("test", 64, 1).x)[:64].float()


def found(task: str, model: str, change: Callable[[Velocity, Tensor, Tensor], Tensor]) -> list[Finding]:
    wrapped = Wrapped(load(task, model, "cpu", "float32")[0], change)
    findings = examine(wrapped, points(task))
    assert wrapped.calls <= 20
    assert wrapped.rows <= 64
    return findings


def columns(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


def half_cut(v: Tensor) -> Tensor:
    flat = v.flatten(1)
    cut = flat.shape[1] // 2
    return torch.cat((flat[:, :cut], flat[:, cut:].detach()), 1).view_as(v)


def without_graph(v: Velocity, x: Tensor, t: Tensor) -> Tensor:
    with torch.no_grad():
        return v(x, t)


SLIPS: dict[str, tuple[str, Callable[[Velocity, Tensor, Tensor], Tensor]]] = {
    "noise minus data": ("path", lambda v, x, t: -v(x, t)),
    "time turned round": ("path", lambda v, x, t: v(x, 1 - t)),
    "time and sign turned round": ("path", lambda v, x, t: -v(x, 1 - t)),
    "twice the velocity": ("path", lambda v, x, t: 2 * v(x, t)),
    "half the velocity": ("path", lambda v, x, t: 0.5 * v(x, t)),
    "the noise as the velocity": ("path", lambda v, x, t: x - columns(t, x) * v(x, t)),
    "the data point as the velocity": ("path", lambda v, x, t: x + (1 - columns(t, x)) * v(x, t)),
    "time in thousands": ("path", lambda v, x, t: v(x, 1e-3 * t)),
    "points in grey levels": ("path", lambda v, x, t: v(127.5 * x + 127.5, t)),
    "no graph": ("derivative", without_graph),
    "detached": ("derivative", lambda v, x, t: v(x, t).detach()),
    "half of it detached": ("derivative", lambda v, x, t: half_cut(v(x, t))),
    "rounded": ("derivative", lambda v, x, t: v(x + (torch.round(4 * x) / 4 - x).detach(), t).detach()),
    "noise inside": ("repeatability", lambda v, x, t: v(x, t) + 0.01 * torch.randn_like(x)),
    "statistics over the batch": ("rows", lambda v, x, t: v(x, t) / x.std()),
    "the mean over rows taken off": ("rows", lambda v, x, t: v(x, t) - 0.1 * v(x, t).mean(0)),
    "rows turned": ("rows", lambda v, x, t: v(x.roll(1, 0), t)),
    "the first time for all": ("times", lambda v, x, t: v(x, t[:1].expand(len(x)))),
    "the last time for all": ("times", lambda v, x, t: v(x, t[-1:].expand(len(x)))),
    "the mean time for all": ("times", lambda v, x, t: v(x, t.mean().expand(len(x)))),
    "the largest time for all": ("times", lambda v, x, t: v(x, t.max().expand(len(x)))),
    "NaN": ("not finite", lambda v, x, t: v(x, t) * math.nan),
    "NaN at one end": ("not finite", lambda v, x, t: v(x, t) / columns(t.clamp_min(0.1) - 0.1, x)),
    "infinite in some rows": (
        "not finite",
        lambda v, x, t: torch.where(columns(torch.arange(len(x)) == 3, x), math.inf, v(x, t)),
    ),
}


@three_networks
@pytest.mark.parametrize("slip", list(SLIPS))
def test_each_slip_is_found_on_each_network(task: str, model: str, slip: str) -> None:
    name, change = SLIPS[slip]
    findings = found(task, model, change)
    assert name in [finding.name for finding in findings]
    finding = next(each for each in findings if each.name == name)
    assert any(character.isdigit() for character in finding.text)
    assert finding.likely
    assert "\n" not in str(finding)


@three_networks
def test_nothing_is_found_behind_a_wrapper_that_is_right(task: str, model: str) -> None:
    assert found(task, model, lambda v, x, t: v(x, t)) == []


@pytest.mark.parametrize("task", TASKS)
def test_nothing_is_found_on_any_shipped_model(task: str) -> None:
    examined = 0
    for model in get_task(task).models:
        for dtype in ("float32", "float64"):
            try:
                loaded = load(task, model, "cpu", dtype)[0]
            except (UnavailableError, CheckpointError):
                continue
            examined += 1
            assert examine(loaded, points(task).to(getattr(torch, dtype))) == [], (model, dtype)
    assert examined >= 2


@pytest.mark.parametrize("scale", [0.3, 0.4, 0.5, 0.7, 0.9, 1.0, 1.1, 1.5, 2.0, 4.0])
@pytest.mark.parametrize("d", [2, 16])
def test_optimal_transport_of_a_gaussian_is_no_finding(scale: float, d: int) -> None:
    grow = scale * torch.linspace(0.6, 1.4, d) - 1

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return grow * x / (1 + t[:, None] * grow)

    x = (1 + grow) * torch.randn(64, d, generator=torch.Generator().manual_seed(0))
    assert examine(Field(velocity, d), x) == []


def test_optimal_transport_of_a_mixture_is_no_finding() -> None:
    from scipy.optimize import linear_sum_assignment

    model = load("gmm-2d", "closed-form", "cpu", "float64")[0]
    generator = torch.Generator().manual_seed(1)
    data = model.sample(1500, generator=generator, dtype=torch.float64)
    noise = torch.randn(1500, 2, dtype=torch.float64, generator=generator)
    rows, to = linear_sum_assignment(torch.cdist(noise, data).square().numpy())
    noise, data = noise[rows], data[to]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        at = (1 - t[:, None, None]) * noise + t[:, None, None] * data
        weights = (-(x[:, None] - at).square().sum(2) / (2 * 0.1**2)).softmax(1)
        return weights @ (data - noise)

    x = model.sample(64, generator=generator, dtype=torch.float64)
    assert examine(Field(velocity, 2), x) == []


def test_data_outside_the_plausible_are_found() -> None:
    model = load("digits", "teacher", "cpu", "float32")[0]
    x = points("digits")
    for changed in (127.5 * (x + 1), 0.1 * x, x + 10):
        assert "range" in [finding.name for finding in examine(model, changed)]
    plain = Field(lambda x, t: -x, 2)
    assert "range" in [finding.name for finding in examine(plain, 255 * torch.rand(64, 2))]


class Moody(nn.Module):
    """A network that answers otherwise in training mode."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.event_shape = (2,)
        self.layer = layer
        self.inner = load("gmm-2d", "closed-form", "cpu", "float32")[0]

    def velocity(self, x: Tensor, t: Tensor, *, cond: Any = None) -> Tensor:
        answer: Tensor = self.inner.velocity(x, t) + 0.05 * self.layer(x)
        return answer


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(2)], ids=["dropout", "batch norm"])
def test_a_mode_that_matters_is_found_and_left_as_it_was(layer: nn.Module) -> None:
    model = Moody(layer)
    if isinstance(layer, nn.BatchNorm1d):
        layer.running_mean = torch.ones(2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.train()
    model.inner.eval()
    assert [finding.name for finding in examine(model, points("gmm-2d"))] == ["training mode"]
    assert model.layer.training
    assert not model.inner.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    model.eval()
    assert examine(model, points("gmm-2d")) == []


def test_a_model_that_raises_and_one_of_another_kind_are_findings_or_none() -> None:
    def broken(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("no such time")

    (finding,) = examine(Field(broken), points("gmm-2d"))
    assert (finding.name, "KeyError" in finding.text) == ("error", True)
    (finding,) = examine(Field(lambda x, t: x[:, :1]), points("gmm-2d"))
    assert "(64, 1)" in finding.text
    with pytest.raises(ValueError, match="a Linear has no velocity"):
        examine(nn.Linear(2, 2), points("gmm-2d"))
    with pytest.raises(ValueError, match="empty batch"):
        examine(Field(lambda x, t: -x), points("gmm-2d")[:0])


def test_a_model_with_ends_of_its_own_is_asked_between_them() -> None:
    inner = load("gmm-2d", "closed-form", "cpu", "float32")[0]
    asked: list[float] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        asked.extend(t.tolist())
        answer: Tensor = inner.velocity(x, t)
        return answer

    ends = {"noisy_end": 0.01, "clean_end": 0.98, "source": object()}
    assert examine(Field(velocity, **ends), points("gmm-2d")) == []
    assert math.isclose(min(asked), 0.01, abs_tol=1e-6)
    assert max(asked) <= 0.98
    assert [f.name for f in examine(Field(lambda x, t: -velocity(x, t), **ends), points("gmm-2d"))] == [
        "path"
    ]


def test_a_map_that_is_none_between_equal_times_is_no_finding() -> None:
    class Map:
        event_shape = (2,)

        def average_velocity(self, x: Tensor, t: Tensor, s: Tensor, *, cond: Any = None) -> Tensor:
            moved = x * torch.exp(0.3 * (s - t))[:, None]
            return (moved - x) / (s - t)[:, None]

    assert examine(Map(), points("gmm-2d")) == []


def test_conditions_are_handed_on() -> None:
    inner = load("gmm-2d", "closed-form", "cpu", "float32")[0]

    def velocity(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        shift = cond["shift"] if isinstance(cond, dict) else cond
        assert len(shift) == len(x)
        value: Tensor = inner.velocity(x, t) * shift[:, None]
        return value

    x = points("gmm-2d")
    assert examine(Field(velocity), x, cond=torch.ones(64)) == []
    assert examine(Field(velocity), x, cond={"shift": torch.ones(64)}) == []
    assert [finding.name for finding in examine(Field(velocity), x, cond=-torch.ones(64))] == ["path"]


def test_conditions_of_any_mapping_are_sliced() -> None:
    class Labelled(torch.nn.Module):
        event_shape = (2,)

        def velocity(self, x: Tensor, t: Tensor, *, cond: dict[str, Tensor]) -> Tensor:
            return cond["mean"] - x

    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    named = MappingProxyType({"mean": torch.zeros(100, 1)})
    assert [f.name for f in examine(Labelled(), x, named)] == [
        f.name for f in examine(Labelled(), x, dict(named))
    ]


def test_of_several_tables_the_first_is_named() -> None:
    class Tables(torch.nn.Module):
        event_shape = (2,)

        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.tables = torch.nn.ModuleList(torch.nn.Embedding(size, 2) for size in sizes)

        def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
            return -x

    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    for sizes in ((3, 7, 11), (11, 7, 3)) * 5:
        (found,) = (each for each in examine(Tables(*sizes), x) if each.name == "condition")
        assert f"a table of {sizes[0]} classes" in found.text


def test_a_field_that_vanishes_at_a_time_that_is_asked_is_right() -> None:
    for scale in (1.0, 2.0):  # nought at t = 0.5, and at t = 0.2
        exact = Gaussian(torch.zeros(2), scale**2 * torch.eye(2))
        assert examine(exact, exact.sample(64, generator=torch.Generator().manual_seed(0))) == []


@pytest.mark.parametrize("rows", [1, 2, 8])
def test_few_rows_are_no_finding_of_a_right_model(rows: int) -> None:
    model = Gaussian(torch.zeros(2), torch.eye(2))
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(1))
    assert examine(model, x) == []


def test_what_is_no_model_or_no_data_is_an_error_and_not_nothing_found() -> None:
    with pytest.raises(ValueError, match="wrap it"):
        examine(lambda x, t: x, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="empty batch"):
        examine(Gaussian(torch.zeros(2), torch.eye(2)), torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"x\.float"):
        examine(Gaussian(torch.zeros(2), torch.eye(2)), torch.zeros(2, 2).half())
