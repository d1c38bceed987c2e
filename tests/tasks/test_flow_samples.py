"""Samples of a shipped exact flow as a task: the flow's own log p is their truth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowlik.cells import Options
from flowlik.planning import suites
from flowlik.points import whole
from flowlik.running.run import run_cell
from flowlik.tasks.registry import get_task
from flowlik_estimators import get
from flowlik_models import flow_samples
from flowlik_models.checkpoints import CheckpointError
from flowlik_models.objectives.batch import Batch
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training.image_batches import ImageSource
from flowlik_models.zoo import CHECKPOINTS_VARIABLE, load_model

TASK = get_task("digits-flow")
DIM = 64


def truth(x: torch.Tensor) -> np.ndarray:
    values = TASK.log_density(x, 1.0)
    assert values is not None
    return values


def test_the_truth_is_the_flows_own_likelihood_in_either_precision() -> None:
    items, flow = TASK.items("test", 100), load_model("digits", "exact-flow")
    x, exact = whole(items.x), torch.from_numpy(TASK.reference("test", items, 1.0).log_prob[0])
    near = get("exact-flow").log_prob(flow, x.float()).log_prob  # of rounded samples, in float32
    assert float((near - exact).abs().max()) / DIM < 1e-4
    torch.testing.assert_close(get("exact-flow").log_prob(flow.double(), x).log_prob, exact)


def test_samples_are_the_flow_of_keyed_noise_however_many_are_drawn() -> None:
    many = whole(TASK.items("test", 300).x)
    flow_samples._block.cache_clear()
    for n in (0, 1, 128, 129):
        assert torch.equal(whole(TASK.items("test", n).x), many[:n])
    z = flow_samples.known_flow("digits-flow").inverse(many)[0].flatten()  # noise comes back
    ordered, n = torch.special.ndtr(z.sort()[0]), len(z)
    distance = (ordered - (torch.arange(n) + 0.5) / n).abs().max()  # Kolmogorov and Smirnov's
    assert float(distance) * math.sqrt(n) < 1.95  # one in a thousand


def test_fresh_samples_are_not_those_that_are_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_samples, "TRAINING_SAMPLES", 200)
    images = flow_samples.sampled_images.__wrapped__("digits-flow")
    test, train = (whole(TASK.items(split, 200).x).float().flatten(1) for split in TASK.splits)
    assert torch.equal(images.levels.flatten(1), train)
    assert float(torch.cdist(test, train).min()) > 0.5
    assert TASK.data_hash("test") != TASK.data_hash("train")

    source = ImageSource(images)
    recipe = RECIPES["digits-flow"]["teacher"].with_options(batch=64)
    drawn = source.data(64, recipe, torch.Generator().manual_seed(0)).flatten(1)
    known = {tuple(row) for row in train.tolist()}
    assert {tuple(row) for row in drawn.tolist()} <= known  # as they are: no noise, no shift
    assert isinstance(source.batch(recipe, torch.Generator().manual_seed(0)), Batch)


def test_the_truth_stays_the_shipped_flow_beside_checkpoints_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = TASK.data_hash("test"), flow_samples.flow_hash("digits-flow")
    file = tmp_path / "digits" / "exact-flow.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"nothing")
    monkeypatch.setenv(CHECKPOINTS_VARIABLE, str(tmp_path))
    with pytest.raises(CheckpointError):
        load_model("digits", "exact-flow")
    assert (TASK.data_hash("test"), flow_samples.flow_hash("digits-flow")) == before
    flow_samples.known_flow.cache_clear()
    assert len(whole(TASK.items("test", 2).x)) == 2


@pytest.mark.parametrize(
    ("model", "label", "most"),
    [
        ("closed-form", "exact-flow", 1e-5),
        ("teacher", "whitened-ode[solver=rk4,steps=2,clock=stretched,trace=hutchinson]", 0.6),
    ],
)
def test_shipped_models_are_judged_by_the_flow(model: str, label: str, most: float) -> None:
    (cell,) = suites.expand([TASK.id], [model], [label], Options(n_items=24, rounds=0))
    row, arrays = run_cell(cell)
    assert row["status"] == "ok", row["reason"]
    assert (row["ref_id"], row["bpd_ref"]) == ("closed-form", pytest.approx(2.0, abs=0.3))
    assert row["bpd_mae"] < most
    expected = truth(whole(TASK.items("test", 24).x).float())
    assert arrays["ref"] == pytest.approx(expected, abs=1e-9)


def test_before_the_end_of_the_path_nothing_is_known() -> None:
    label = "whitened-ode[solver=euler,steps=1,clock=stretched,trace=hutchinson,eps=0.01]"
    (cell,) = suites.expand([TASK.id], ["teacher"], [label], Options(n_items=2, rounds=0))
    row, _ = run_cell(cell)
    assert (row["status"], row["ref_id"], row["bpd_mae"]) == ("ok", None, None)
    with pytest.raises(ValueError, match="valid: test, train"):
        TASK.items("images", 2)


def test_the_example_splits_the_error_between_the_teacher_and_its_map() -> None:
    file = Path(__file__).resolve().parents[2] / "docs" / "examples" / "known_truth.py"
    scope: dict[str, Any] = {"__name__": "known_truth"}
    exec(compile(file.read_text(), str(file), "exec"), scope)
    scope["CONVERGED"] = get("whitened-ode", clock="stretched", solver="euler", steps=1, trace="hutchinson")
    scope["STEPS"] = (1, 2)
    first, _, *rows = scope["report"](25)
    assert first.startswith("25 samples, ")
    bias = [float(row.split()[-1]) for row in rows]
    teacher, *others = bias
    assert len(others) == (4 if TASK.has_model("direct-f2d2") else 0)
    for total, own in zip(others[::2], others[1::2], strict=True):
        assert total == pytest.approx(teacher + own, abs=2e-4)  # the two parts are all of it
