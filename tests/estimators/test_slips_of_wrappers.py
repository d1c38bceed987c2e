"""Slips that the field alone does not show: steps, sources, scales of data, conditions; and twenty right wrappers."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_flows import Field

import flowlik
from flowlik.evaluation.models import load
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task
from flowlik_estimators import Finding, examine
from flowlik_models.adapters import Path, cosine, ddpm, edm, reverse, straight, ve, vp

NETWORKS = [("gmm-2d", "closed-form"), ("gmm-2d", "teacher"), ("digits", "teacher")]
three_networks = pytest.mark.parametrize(("task", "model"), NETWORKS, ids=lambda name: name)
PATHS: dict[str, Path] = {
    "straight": straight(),
    "reversed": reverse(),
    "vp": vp(),
    "cosine": cosine(),
    "ddpm": ddpm(),
    "edm": edm(),
    "ve": ve(0.002, 80.0),
}
PREDICTIONS = ("velocity", "noise", "data", "v", "score")
RIGHT = [(p, kind) for p in PATHS for kind in PREDICTIONS if (p, kind) != ("ddpm", "velocity")]


@lru_cache
def points(task: str, split: str = "test", n: int = 64) -> Tensor:
    return whole(get_task(task).items(split, n, 1).x)[:n].float()


def column(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x).view(-1, *[1] * (x.ndim - 1))


def on_path(inner: Any, path: Path, predicts: str) -> Callable[..., Tensor]:
    """A network on a path of its own that knows what a field knows."""

    def net(z: Tensor, u: Tensor, cond: Any = None) -> Tensor:
        u = u.double()
        a, s = path.scales(u)
        t, y = (a / (a + s)).to(z), z / column(a + s, z)
        v = inner.velocity(y, t)
        noise, data = y - column(t, y) * v, y + column(1 - t, y) * v
        if predicts == "velocity":
            rates = [
                torch.autograd.functional.jvp(f, u, torch.ones_like(u))[1] for f in (path.alpha, path.sigma)
            ]
            return column(rates[0], z) * data + column(rates[1], z) * noise
        made = {
            "noise": noise,
            "data": data,
            "score": -noise / column(s, z),
            "v": column(a, z) * noise - column(s, z) * data,
        }
        return made[predicts]

    return net


def wrapped(net: Any, task: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return flowlik.wrap(net, get_task(task).event_shape, **options)


def names(findings: list[Finding]) -> list[str]:
    for finding in findings:
        assert any(character.isdigit() for character in finding.text), finding
        assert finding.likely
    return [finding.name for finding in findings]


@pytest.mark.parametrize(("path", "predicts"), RIGHT)
def test_nothing_is_found_behind_a_right_wrapper(path: str, predicts: str) -> None:
    inner = load("gmm-2d", "closed-form", "cpu", "float32")[0]
    net = on_path(inner, PATHS[path], predicts)
    train = points("gmm-2d", "train", 2000)
    model = wrapped(net, "gmm-2d", predicts=predicts, path=PATHS[path], moments=train)
    assert examine(model, points("gmm-2d")) == []


@pytest.mark.parametrize("path", ["straight", "vp", "ddpm", "edm"])
def test_nothing_is_found_behind_a_right_wrapper_of_a_unet(path: str) -> None:
    inner = load("digits", "teacher", "cpu", "float32")[0]
    kind = {"straight": "velocity", "edm": "data"}.get(path, "noise")
    options = {"predicts": kind, "path": PATHS[path], "moments": points("digits", "train", 500)}
    model = wrapped(on_path(inner, PATHS[path], kind), "digits", **options)
    assert examine(model, points("digits"), levels=17) == []


@three_networks
@pytest.mark.parametrize("steps", [1000, 200, 100])
def test_times_rounded_inside_are_found(task: str, model: str, steps: int) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    rounded = lambda x, t: inner.velocity(x, torch.round(steps * t) / steps)  # noqa: E731
    assert names(examine(Field(rounded, event_shape=inner.event_shape), points(task))) == ["discrete steps"]


@three_networks
def test_steps_of_ddpm_rounded_inside_are_found(task: str, model: str) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    net = on_path(inner, ddpm(), "noise")
    found = examine(
        wrapped(lambda z, u: net(z, u.round()), task, predicts="noise", path="ddpm"), points(task)
    )
    assert names(found) == ["discrete steps"]


@three_networks
def test_a_source_that_nobody_gave_is_found(task: str, model: str) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    path = ve(0.002, 2.0)
    options = {"predicts": "data", "path": path}
    shifted = points(task)
    net = on_path(inner, path, "data")
    bare = wrapped(net, task, **options)
    given = wrapped(net, task, **options, moments=points(task, "train", 500))
    assert "source" in names(examine(bare, shifted))
    assert examine(given, shifted) == []


@three_networks
def test_ends_that_are_not_said_or_said_in_part_are_found(task: str, model: str) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    given = wrapped(on_path(inner, ve(0.002, 2.0), "data"), task, predicts="data", path=ve(0.002, 2.0))
    silent = Field(given.velocity, event_shape=inner.event_shape)
    assert names(examine(silent, points(task))) != []
    part = Field(inner.velocity, event_shape=inner.event_shape, noisy_end=0.01, clean_end=0.98)
    assert names(examine(part, points(task))) == ["source"]


def in_unit(inner: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The field of the same data scaled to (x + 1)/2."""

    def velocity(y: Tensor, t: Tensor) -> Tensor:
        time = column(t, y)
        scale = 2 - time
        z, at = (2 * y - time) / scale, t / scale.flatten()
        v = inner.velocity(z, at)
        noise, data = z - column(at, y) * v, z + column(1 - at, y) * v
        return (data + 1) / 2 - noise

    return velocity


@three_networks
def test_data_of_another_scale_than_the_networks_are_found(task: str, model: str) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    x = points(task)
    unit = Field(in_unit(inner), event_shape=inner.event_shape)
    assert examine(unit, (x + 1) / 2 + 1e-3 * torch.randn_like(x)) == [] or task == "digits"
    assert names(examine(unit, x)) != []
    assert names(examine(Field(inner.velocity, event_shape=inner.event_shape), (x + 1) / 2)) != []


@three_networks
def test_data_outside_the_range_of_levels_are_found(task: str, model: str) -> None:
    inner = load(task, model, "cpu", "float32")[0]
    unit = torch.rand(64, *inner.event_shape, generator=torch.Generator().manual_seed(0))
    (first, *_) = examine(inner, unit, levels=256)
    assert first.name == "range"
    assert "off by 1 exactly" in first.text
    assert "range" in names(examine(inner, 255 * unit, levels=256))
    assert "range" not in names(examine(inner, 2 * unit - 1, levels=256))
    lattice = torch.randint(0, 4, unit.shape, generator=torch.Generator().manual_seed(0)) / 3
    assert "range" in names(examine(inner, lattice))


class Labelled(nn.Module):
    """A network with a table of classes, which a call without a label leaves out or cannot do without."""

    def __init__(self, inner: Any, strict: bool) -> None:
        super().__init__()
        self.event_shape, self.strict = inner.event_shape, strict
        self.table = nn.Embedding(10, 1)
        nn.init.zeros_(self.table.weight)
        self.__dict__["inner"] = inner

    def velocity(self, x: Tensor, t: Tensor, *, cond: Tensor | None = None) -> Tensor:
        value: Tensor = self.inner.velocity(x, t)
        if cond is None and not self.strict:
            return value
        return value + self.table(cond).view(-1, *[1] * (x.ndim - 1))


@three_networks
@pytest.mark.parametrize("strict", [True, False])
def test_a_call_without_a_condition_is_found(task: str, model: str, strict: bool) -> None:
    labelled = Labelled(load(task, model, "cpu", "float32")[0], strict)
    assert names(examine(labelled, points(task))) == ["condition"]
    assert examine(labelled, points(task), cond=torch.arange(64) % 10) == []


def test_a_reflow_and_an_optimal_transport_are_right() -> None:
    grow = 2.0 * torch.linspace(0.6, 1.4, 4) - 1
    reflow = Field(
        lambda x, t: grow * x / (1 + t[:, None] * grow), 4
    )  # straight lines: the reflow of a Gaussian
    x = (1 + grow) * torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert examine(reflow, x) == []


@three_networks
def test_an_examination_takes_twenty_forwards_of_64(task: str, model: str) -> None:
    inner, calls = load(task, model, "cpu", "float32")[0], []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        calls.append(len(x))
        value: Tensor = inner.velocity(x, t)
        return value

    assert examine(Field(velocity, event_shape=inner.event_shape), points(task)) == []
    assert len(calls) <= 20
    assert max(calls) <= 64
