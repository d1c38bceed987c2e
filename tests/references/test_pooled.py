"""Pooled probes: the value of the rule with the exact trace, within the error they state, whatever the batches are."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sizes import FULL, figure
from torch import Tensor
from toy_flows import Linear
from typer.testing import CliRunner

from flowlik.cli import app
from flowlik.evaluation.models import load
from flowlik.measures.arrays import Array
from flowlik.references import make, pooled_probes
from flowlik.references import pooled as pooled_references
from flowlik.references.fixed_rk4 import converged_log_prob, times_of, weights_of
from flowlik.references.pooled_probes import Plan, pilot, pooled_log_prob
from flowlik.tasks import stored_references
from flowlik.tasks import task as tasks
from flowlik.tasks.points import whole
from flowlik.tasks.registry import get_task, registry
from flowlik.tasks.task import Items, Reference, Task
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.images.errors import DataError
from flowlik_models.numerics.cosine_transform import cosines

NATS = 64 * math.log(2.0)  # of one bit/dim of the digits


def test_the_weights_integrate_what_the_spline_resolves() -> None:
    for end in (1.0, 0.999):
        weights, t = weights_of(64, end), times_of(64, end)[1]
        assert weights.sum() == pytest.approx(end, abs=1e-5)
        assert weights @ np.cos(3 * t) == pytest.approx(math.sin(3 * end) / 3, abs=1e-5)


def test_signs_are_exact_where_the_jacobian_is_diagonal() -> None:
    model = Linear(torch.diag(torch.linspace(-1.0, 0.5, 6)))
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    plan = Plan(bases=("pixel",) * 17, controls=(0.0,) * 17, probes=(2,) * 17)
    out = pooled_log_prob(model, x, torch.arange(5), plan, steps=16, end=1.0, target_stderr=1e-3, key=1)
    assert out.log_prob == pytest.approx(converged_log_prob(model, x, 16), abs=1e-5)
    assert (out.stderr < 1e-6).all()
    assert out.probes.tolist() == [34.0] * 5  # one round


def test_a_plan_of_another_rule_is_refused() -> None:
    plan = Plan(bases=("pixel",), controls=(0.0,), probes=(2,))
    with pytest.raises(ValueError, match="a plan of 1 nodes does not fit a rule of 4 steps"):
        pooled_log_prob(
            Linear(torch.eye(2)),
            torch.zeros(1, 2),
            torch.arange(1),
            plan,
            steps=4,
            end=1.0,
            target_stderr=1,
            key=0,
        )


# --- a trained network whose exact answer is known -------------------------------------------------------------


def test_the_stated_error_covers_the_distance_to_the_exact_trace() -> None:
    model, _ = load("digits", "teacher", "cpu", "float32")
    x = whole(get_task("digits").items("test", 10).x)
    plan = Plan(bases=("pixel",) * 65, controls=(0.0,) * 65, probes=(2,) * 65)
    out = pooled_log_prob(
        model, x, torch.arange(10), plan, steps=64, end=1.0, target_stderr=0.03 * NATS, key=7
    )
    z = (out.log_prob - stored_references.stored("digits").arrays["test_log_prob"][:10]) / out.stderr
    assert (out.stderr <= 0.03 * NATS).all()
    assert (out.stderr > 0.005 * NATS).all()  # a bar that is far too long would cover anything
    assert np.abs(z).max() < 4
    assert 0.5 < np.sqrt(np.square(z).mean()) < 1.6


@pytest.mark.skipif(not FULL, reason="minutes: FLOWLIK_FULL=1")
@pytest.mark.parametrize(
    ("task", "model", "steps"), [("digits", "teacher", 64), ("fashion-mnist-gmm", "closed-form", 96)]
)
def test_five_thousandths_of_a_bit_are_reached_and_covered(task: str, model: str, steps: int) -> None:
    """On images that no choice was made by: those after the first 100; the pilot sees other ones."""
    try:
        held = get_task(task)
        items = held.items("test" if task == "digits" else "images", 196)
    except DataError as missing:
        pytest.skip(str(missing))
    flow, _ = load(task, model, "cpu", "float32")
    x, nats = whole(items.x), math.prod(items.x.shape[1:]) * math.log(2.0)
    plan = pilot(flow, x[:8], steps, 1.0 - held.eps, 0.005 * nats)
    out = pooled_log_prob(
        flow,
        x[100:],
        torch.arange(100, 196),
        plan,
        steps=steps,
        end=1.0 - held.eps,
        target_stderr=0.005 * nats,
        key=11,
    )
    exact = (
        stored_references.stored(task).arrays["test_log_prob"][100:196]
        if task == "digits"
        else truth_of(held, x[100:])
    )
    error, z = (out.log_prob - exact) / nats, (out.log_prob - exact) / out.stderr
    covered = float((np.abs(z) < 1.96).mean())
    figure(
        f"pooled reference of {task}, largest standard error",
        f"{out.stderr.max() / nats:.4f} bits/dim",
        "0.005",
    )
    figure(
        f"pooled reference of {task}, rms and mean error", f"{rms(error):.4f} and {error.mean():.4f} bits/dim"
    )
    figure(f"pooled reference of {task}, within 1.96 standard errors", f"{covered:.2f} of 96 images", "0.95")
    figure(f"pooled reference of {task}, probes an image", f"{out.probes.mean():.0f}")
    assert out.stderr.max() <= 0.005 * nats
    assert 0.8 < rms(z) < 1.25
    assert covered > 0.87  # 0.95 less 3.5 standard deviations of 96 images


def rms(values: Array) -> float:
    return float(np.sqrt(np.square(values).mean()))


def truth_of(task: Task, x: Tensor) -> Array:
    known = task.log_density(x, 1.0 - task.eps)
    assert known is not None
    return np.asarray(known, dtype=np.float64)


@pytest.mark.parametrize("basis", ["pixel", "dct"])
def test_the_pilot_takes_the_basis_in_which_the_jacobian_is_diagonal(basis: str) -> None:
    rates = torch.linspace(-1.0, 0.5, 16).double()
    axes = torch.kron(cosines(4), cosines(4)) if basis == "dct" else torch.eye(16).double()
    model = Linear((axes.T @ torch.diag(rates) @ axes).float(), (1, 4, 4))
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    plan = pilot(model, x, 8, 1.0, 0.01)
    assert plan.bases == (basis,) * 9
    assert plan.probes == (2,) * 9  # no noise, so no more than it takes to see that
    assert plan.words() == f"bases by pilot: {basis} at 9 of 9 nodes; 18 probes a round"


def test_the_answer_does_not_depend_on_the_batch() -> None:
    model, task = closed_form("gmm-64d"), get_task("gmm-64d")
    x = whole(task.items("test", 8).x)
    rule: dict[str, Any] = {"steps": 12, "end": 1.0, "target_stderr": 0.03 * NATS}
    plan = pilot(model, x[:4], *rule.values())
    every, part = (
        pooled_log_prob(model, x[k], torch.arange(8)[k], plan, key=7, **rule)
        for k in (slice(None), slice(3, 6))
    )
    assert part.log_prob == pytest.approx(every.log_prob[3:6], abs=1e-6)
    assert part.stderr == pytest.approx(every.stderr[3:6], rel=1e-6)
    assert len(set(every.probes)) > 1  # items took as many rounds as they needed


# --- the command -----------------------------------------------------------------------------------------------


class _OnlyAField(torch.nn.Module):
    """The velocity of another model and nothing else."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.event_shape = model, model.event_shape

    def velocity(self, x: torch.Tensor, t: torch.Tensor, *, cond: Any = None) -> torch.Tensor:
        found: torch.Tensor = self.model.velocity(x, t)
        return found


@dataclass(frozen=True, kw_only=True)
class _MadeUp(Task):
    """A task whose teacher is the mixture fitted to the digits, as a field that must be integrated."""

    @property
    def known(self) -> Any:
        return get_task("digits-gmm")

    def items(self, split: str, n: int, draws: int = 1) -> Items:
        if split == "teacher-samples":
            x = torch.from_numpy(stored_references.stored(self.id).arrays["teacher_samples"])[:n]
            return Items(x=x, ids=torch.arange(len(x)), n=len(x))
        x = whole(self.known.items(split, n).x).float()
        return Items(x=x, ids=torch.arange(n), n=n)

    def load_model(self, model: str, device: str) -> tuple[Any, str]:
        return _OnlyAField(self.known.load_model("closed-form", device)[0]), "made-up"

    def reference(self, split: str, items: Items, t: float) -> Reference:
        return stored_references.stored_log_prob(self, split, items, t)

    def data_hash(self, split: str) -> str:
        return "made-up"

    def moments(self) -> tuple[Array, Array]:
        found: tuple[Array, Array] = self.known.moments()
        return found


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> _MadeUp:
    task = _MadeUp(
        id="made-up",
        event_shape=(1, 8, 8),
        description="-",
        levels=17,
        splits=("test", "teacher-samples"),
        reference_model="teacher",
    )
    monkeypatch.setitem(registry(), task.id, task)
    for module in (stored_references, tasks):
        monkeypatch.setattr(module, "model_hash", lambda task, model: "made-up")
    monkeypatch.setattr(pooled_references, "CHUNK", 4)
    monkeypatch.setattr(pooled_references, "STEPS", 48)
    monkeypatch.setattr(pooled_references, "HALVED", 96)
    monkeypatch.setattr(pooled_references, "JUDGED_ITEMS", 4)
    return task


def test_the_command_makes_a_reference_in_parts_that_a_run_can_use(
    made_up: _MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "reference",
        "made-up",
        "--out",
        str(tmp_path / "references"),
        "--limit",
        "10",
        "--stderr",
        "0.02",
    ]
    pieces = 0
    real = pooled_probes.pooled_log_prob

    def counted(*known: Any, **named: Any) -> pooled_probes.Pooled:
        nonlocal pieces
        pieces += 1
        if pieces == 3:
            raise ValueError("interrupted")
        return real(*known, **named)

    monkeypatch.setattr(pooled_references, "pooled_log_prob", counted)
    stopped = CliRunner().invoke(app, command)
    assert (stopped.exit_code, stopped.output.splitlines()[-1]) == (1, "flowlik: interrupted")
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    assert pieces == 7  # 3 a split; the two that were finished are not made again
    assert not list((tmp_path / "references").glob("*-parts"))

    card = json.loads((tmp_path / "references" / "made-up.json").read_text())
    assert all(check["passed"] for check in card["checks"])
    assert card["model_hash"] == "made-up"
    told = card["splits"]["test"]
    assert told["stderr_bpd_max"] <= 0.02
    assert told["error_bpd"] >= told["stderr_bpd_mean"]
    assert told["rule_error_bpd"] < 1e-3

    monkeypatch.setattr(stored_references, "results_dir", lambda: tmp_path)
    stored_references.read_stored.cache_clear()
    try:
        arrays = stored_references.stored("made-up").arrays
        assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
        for split in made_up.splits:
            items = made_up.items(split, 10)
            found = made_up.reference(split, items, 1.0)
            truth = made_up.known.log_density(items.x, 1.0)
            z = (found.log_prob[0] - truth) / arrays[f"{split}_stderr"]
            assert np.abs(z).max() < 4.5
            assert found.error == card["splits"][split]["error_bpd"]
    finally:
        stored_references.read_stored.cache_clear()


def test_an_error_that_has_no_effect_or_no_meaning_is_bad_input(made_up: _MadeUp, tmp_path: Path) -> None:
    call = CliRunner().invoke
    closed = call(app, ["reference", "gmm-2d", "--stderr", "0.01", "--out", str(tmp_path)])
    assert (closed.exit_code, "known in closed form: --stderr has no effect" in closed.output) == (1, True)
    nought = call(app, ["reference", "made-up", "--stderr", "0", "--out", str(tmp_path)])
    assert (nought.exit_code, "expected bits/dim above 0" in nought.output) == (1, True)


def test_a_reference_that_is_not_as_sure_as_wanted_fails_its_check(
    made_up: _MadeUp, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        pooled_references,
        "pooled_log_prob",
        lambda model, x, *_, **__: pooled_probes.Pooled(
            log_prob=np.zeros(len(x)), stderr=np.ones(len(x)), probes=np.ones(len(x))
        ),
    )
    monkeypatch.setattr(
        pooled_references,
        "_with_one_set_of_probes",
        lambda teacher, x, cond: (np.zeros((2, 4)),) * 2 + (np.zeros(2),),
    )
    with pytest.raises(ValueError, match="failed its checks: test: largest standard error of an item"):
        make.make_reference("made-up", tmp_path, limit=2, stderr=0.01)
    assert (tmp_path / "made-up.json").exists()
