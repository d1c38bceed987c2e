"""Training resumes to the same result; checkpoints that do not fit are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from interruption import train_interrupted
from torch import Tensor

from flowlik_models import checkpoints, zoo
from flowlik_models.checkpoints import (
    SHIPPED,
    CheckpointError,
    fill,
    read_checkpoint,
    read_tensors,
    save_checkpoint,
    save_tensors,
)
from flowlik_models.closed_forms.catalogue import closed_form
from flowlik_models.closed_forms.gaussian import Gaussian
from flowlik_models.features.classifier import load_extractor
from flowlik_models.networks.vector import VectorFlowMap
from flowlik_models.objectives import adaptive, total_derivative
from flowlik_models.objectives.batch import Batch
from flowlik_models.recipes.table import RECIPES
from flowlik_models.training import trainer
from flowlik_models.training.trainer import train
from flowlik_models.zoo import build, load_model, recipe_for


def tensors_of(path: Path) -> dict[str, Tensor]:
    return read_checkpoint(path)[0]


def test_interrupted_training_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("gmm-2d", "meanflow", out=tmp_path / "whole", steps=12)
    cut = tmp_path / "cut"
    resumed = train_interrupted("gmm-2d", "meanflow", cut, steps=12, after=7, monkeypatch=monkeypatch)
    expected, found = tensors_of(whole), tensors_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not list((tmp_path / "cut").rglob("*.state.safetensors"))


def test_a_state_that_another_training_replaces_meanwhile_is_read_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, newer, opened = (
        tmp_path / "state.safetensors",
        tmp_path / "newer.safetensors",
        checkpoints.safe_open,
    )
    for file, step in ((state, 1), (newer, 2)):
        save_tensors(file, {"weights": torch.full((3,), float(step))}, {"step": str(step)})

    def replaced(*arguments: Any, **options: Any) -> Any:
        file = opened(*arguments, **options)
        if newer.exists():
            newer.replace(state)
        return file

    monkeypatch.setattr(checkpoints, "safe_open", replaced)
    for step in (1, 2):
        tensors, told = read_tensors(state)
        assert told == {"step": str(step)}
        assert tensors["weights"].tolist() == [step] * 3


def test_judging_that_was_stopped_costs_no_step_again(tmp_path: Path) -> None:
    def stopped(network: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("gmm-2d", "meanflow", out=tmp_path, steps=3, validate=stopped)
    taken: list[int] = []
    made = train(
        "gmm-2d",
        "meanflow",
        out=tmp_path,
        steps=3,
        validate=lambda network: {"test": {}},
        progress=lambda progress: taken.append(progress.step),
    )
    assert taken == []
    assert read_checkpoint(made)[1]["accuracy"] == {"test": {}}
    whole = train("gmm-2d", "meanflow", out=tmp_path / "whole", steps=3)
    expected, found = tensors_of(whole), tensors_of(made)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("model", ["shortcut", "shortcut-distill", "lsd", "esd", "meanflow"])
def test_every_objective_trains_a_map_and_its_divergence(model: str, tmp_path: Path) -> None:
    train("gmm-2d", model, out=tmp_path, steps=2)
    made = train("gmm-2d", f"{model}-f2d2", out=tmp_path, steps=2)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(made).values())


def test_weights_of_another_task_are_refused_as_a_start(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "thin-2d").mkdir()
    for file in (checkpoint, checkpoint.with_suffix(".json")):
        file.rename(tmp_path / "thin-2d" / file.name)
    with pytest.raises(CheckpointError, match="expected meanflow on thin-2d, found meanflow on gmm-2d"):
        train("thin-2d", "meanflow-f2d2", out=tmp_path, steps=2)


def test_mixed_precision_trains_and_keeps_the_closed_form_exact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_for("gmm-2d", "direct-f2d2").with_options(precision="bfloat16", pool=64, batch=64)
    monkeypatch.setitem(RECIPES["gmm-2d"], "direct-f2d2", recipe)
    made = train("gmm-2d", "direct-f2d2", out=tmp_path, steps=3)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(made).values())
    untrained = build("gmm-2d", recipe)
    x, t, s = torch.randn(50, 2), torch.rand(50), torch.rand(50)
    exact = untrained.joint(x, t, s)  # type: ignore[operator]
    with torch.autocast("cpu", torch.bfloat16):
        for mixed, expected in zip(untrained.joint(x, t, s), exact, strict=True):  # type: ignore[operator]
            torch.testing.assert_close(mixed.float(), expected)


def test_losses_that_stay_non_finite_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "loss_of", lambda *_: torch.tensor(float("nan")))
    with pytest.raises(trainer.TrainingError, match="not finite"):
        train("gmm-2d", "meanflow", out=tmp_path, steps=100)


def test_untrained_map_is_the_gaussian_of_the_data() -> None:
    network = build("gmm-2d", recipe_for("gmm-2d", "meanflow-f2d2"))
    mean, covariance = closed_form("gmm-2d").mean_and_covariance()
    exact = Gaussian(mean, covariance)
    x, t, s = torch.randn(50, 2), torch.rand(50), torch.rand(50)
    for found, expected in zip(network.joint(x, t, s), exact.joint(x, t, s), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_a_layer_of_the_divergences_own_starts_at_the_gaussian_too() -> None:
    recipe = recipe_for("gmm-64d", "direct-f2d2")
    assert recipe.network["head_hidden"]
    network = build("gmm-64d", recipe)
    mean, covariance = closed_form("gmm-64d").mean_and_covariance()
    x, t, s = torch.randn(20, 64), torch.rand(20), torch.rand(20)
    found = network.joint(x, t, s)  # type: ignore[operator]
    for one, other in zip(found, Gaussian(mean, covariance).joint(x, t, s), strict=True):
        torch.testing.assert_close(one, other.float(), atol=2e-3, rtol=1e-3)
    before = sum(p.numel() for p in network.divergence_head())  # type: ignore[operator]
    assert before == 256 * 128 + 128 + 128 * 65 + 65


def test_map_without_head_has_no_joint() -> None:
    from flowlik_models.interfaces import FlowMap, JointFlowMap

    bare = build("gmm-2d", recipe_for("gmm-2d", "meanflow"))
    assert isinstance(bare, FlowMap)
    assert not isinstance(bare, JointFlowMap)
    assert isinstance(build("gmm-2d", recipe_for("gmm-2d", "meanflow-f2d2")), JointFlowMap)


@pytest.mark.parametrize("task", ["gmm-2d", "gmm-64d"])
def test_difference_derivative_agrees_with_the_exact_one(task: str) -> None:
    recipe, truth = recipe_for(task, "meanflow-f2d2"), closed_form(task)
    torch.manual_seed(0)
    network = build(task, recipe)
    for parameter in network.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    generator = torch.Generator().manual_seed(0)
    t, s = torch.rand(200, generator=generator), torch.rand(200, generator=generator)
    x = truth.sample(200, generator=generator, t=0.5)
    velocity, divergence = truth.velocity_and_divergence(x, t)
    batch = Batch(x, t, s, velocity, divergence)
    both = [
        total_derivative(network.joint, batch, method=method, end=1.0)  # type: ignore[arg-type]
        for method in ("jvp", "difference")
    ]
    for exact, difference in zip(*both, strict=True):
        scale = exact.abs().mean()
        assert float((exact - difference).abs().mean() / scale) < 5e-3


def test_a_loss_takes_one_error_a_sample() -> None:
    with pytest.raises(ValueError, match="one error a sample"):
        adaptive(torch.ones(3, 1), 1.0)


def test_missing_models_come_after_those_they_build_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(zoo, "SHIPPED", tmp_path)
    assert zoo.missing_models([("digits", "lsd-f2d2"), ("gmm-2d", "closed-form"), ("digits", "teacher")]) == [
        ("digits", "teacher"),
        ("digits", "lsd"),
        ("digits", "lsd-f2d2"),
    ]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    network = build("gmm-2d", RECIPES["gmm-2d"]["meanflow"])
    path = tmp_path / "meanflow.safetensors"
    save_checkpoint(path, network, {"task": "gmm-2d", "model": "meanflow"})
    return path


def test_checkpoint_comes_back(checkpoint: Path) -> None:
    network = load_model("gmm-2d", "meanflow", path=checkpoint)
    assert isinstance(network, VectorFlowMap)
    assert not network.training


def test_truncated_checkpoint_is_named(checkpoint: Path) -> None:
    content = checkpoint.read_bytes()
    checkpoint.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=r"meanflow\.safetensors.*complete"):
        load_model("gmm-2d", "meanflow", path=checkpoint)


def test_checkpoint_of_another_task_is_named(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match="expected meanflow on thin-2d, found meanflow on gmm-2d"):
        load_model("thin-2d", "meanflow", path=checkpoint)


@pytest.mark.parametrize("with_card", [True, False])
def test_weights_of_another_model_under_the_right_name_are_refused(tmp_path: Path, with_card: bool) -> None:
    """Of one architecture, so that every tensor fits, and with the right model's card beside it or none."""
    file = tmp_path / "gmm-2d" / "meanflow-f2d2.safetensors"
    file.parent.mkdir()
    file.write_bytes((SHIPPED / "gmm-2d" / "direct-f2d2.safetensors").read_bytes())
    if with_card:
        card = (SHIPPED / "gmm-2d" / "meanflow-f2d2.json").read_bytes()
        file.with_suffix(".json").write_bytes(card)
    found = "expected meanflow-f2d2 on gmm-2d, found direct-f2d2 on gmm-2d"
    with pytest.raises(CheckpointError, match=found):
        load_model("gmm-2d", "meanflow-f2d2", path=file)
    features = SHIPPED / "digits" / "features.safetensors"
    with pytest.raises(CheckpointError, match="expected features on cifar10, found features on digits"):
        load_extractor("cifar10", path=features)


def test_missing_checkpoint_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="flowlik train gmm-2d meanflow"):
        load_model("gmm-2d", "meanflow", path=tmp_path / "none.safetensors")


def test_other_tensors_are_named(checkpoint: Path) -> None:
    tensors = tensors_of(checkpoint)
    network = build("gmm-2d", RECIPES["gmm-2d"]["meanflow"])
    for changed, message in (
        ({**tensors, "extra": torch.zeros(1)}, "unexpected tensor 'extra'"),
        ({n: v for n, v in tensors.items() if n != "shift.weight"}, "expected a tensor 'shift.weight'"),
        ({**tensors, "shift.bias": torch.zeros(3)}, r"of shape \(2,\), found \(3,\)"),
        ({**tensors, "shift.bias": torch.full((2,), float("nan"))}, "finite"),
    ):
        with pytest.raises(CheckpointError, match=message):
            fill(network, changed, checkpoint)


def test_unknown_names_come_with_the_nearest_match() -> None:
    with pytest.raises(ValueError, match="did you mean 'gmm-2d'"):
        load_model("gmm2d", "meanflow")
    with pytest.raises(ValueError, match="did you mean 'meanflow'"):
        load_model("gmm-2d", "meanfow")
    with pytest.raises(ValueError, match="exact and not trained"):
        recipe_for("gmm-2d", "closed-form")
